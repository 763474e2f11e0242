"""What a record of this calibration is for."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from torch import Tensor

from evenkeel.corrections.base import text_of
from evenkeel.fitting.request import Settings
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import denoiser_name
from evenkeel.hosts.scheduler.schedulers import config_of
from evenkeel.record import Provenance
from evenkeel.sampling.step_law import StepLaw
from evenkeel.storage import json_safe


def provenance_of(
    pipeline: Any, law: StepLaw, x: Tensor, layout: LatentLayout, settings: Settings
) -> Provenance:
    """Everything two records must agree on before they may be merged or applied."""
    scheduler = pipeline.scheduler
    return Provenance(
        pipeline_class=type(pipeline).__name__,
        denoiser=denoiser_name(pipeline),
        reference=settings.twins[0],
        quantized=settings.twins[1],
        quantizer=settings.quantizer,
        scheduler_class=type(scheduler).__name__,
        scheduler_config=config_of(scheduler),
        prediction=law.prediction,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        timesteps=law.timesteps.tolist(),
        alpha=law.alpha[:-1].tolist(),
        sigma=law.sigma[:-1].tolist(),
        call=json_safe(settings.call),
        trajectory=settings.trajectory,
        layout=layout.as_dict(),
        latent_shape=list(x.shape[2:]),
        dtype=str(x.dtype).removeprefix("torch."),
        elements=x[0, 0].numel() // layout.channels,
        versions={
            name: importlib.metadata.version(name)
            for name in ("evenkeel", "diffusers", "torch", "transformers")
        },
        correction=text_of(settings.correction),
    )
