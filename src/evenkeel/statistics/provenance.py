"""What a record was made for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from evenkeel.sampling.step_law import Array


@dataclass(frozen=True)
class Provenance:
    """What a record was made for. Two records with equal provenance measure the same thing.

    Attributes:
        pipeline_class: diffusers class name.
        denoiser: name of the component, ``transformer`` or ``unet``.
        reference, quantized: fingerprints of the two denoisers.
        quantizer: what quantized it, as text ("none" if it does not say).
        scheduler_class, scheduler_config: as configured.
        prediction: what the raw outputs are.
        num_inference_steps, guidance_scale: as passed to the pipeline.
        timesteps, alpha, sigma: of the sampler's calls.
        call: further JSON-safe arguments of the pipeline call.
        trajectory: whose outputs advanced the sample: full-precision, quantized or corrected; or noised.
        layout: LatentLayout fields.
        latent_shape: of one prompt.
        dtype: of the samples that entered the scheduler.
        elements: latent elements per channel of one prompt.
        versions: of the libraries; informative, not compared.
        correction: name and options of what was applied along a corrected trajectory, else "".
        guidance: how the denoiser's outputs were combined, measured: ``-4 5`` are the shares of two;
            "" where it is not known.

    """

    pipeline_class: str
    denoiser: str
    reference: str
    quantized: str
    quantizer: str
    scheduler_class: str
    scheduler_config: dict[str, Any]
    prediction: str
    num_inference_steps: int
    guidance_scale: float | None
    timesteps: list[float]
    alpha: list[float]
    sigma: list[float]
    call: dict[str, Any]
    trajectory: str
    layout: dict[str, int]
    latent_shape: list[int]
    dtype: str
    elements: int
    versions: dict[str, str]
    correction: str = ""
    guidance: str = ""

    @property
    def levels(self) -> tuple[Array, Array]:
        """(T,) signal and noise levels as arrays."""
        return np.array(self.alpha), np.array(self.sigma)


def differences(a: Provenance, b: Provenance, ignore: tuple[str, ...] = ("versions",)) -> list[str]:
    """One line per field in which two provenances differ."""
    return [
        f"  {f.name}: {getattr(a, f.name)!r} against {getattr(b, f.name)!r}"
        for f in fields(Provenance)
        if f.name not in ignore and getattr(a, f.name) != getattr(b, f.name)
    ]
