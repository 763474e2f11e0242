"""A real diffusers pipeline with tiny random weights, built in memory without any download."""

from __future__ import annotations

from typing import Any

import torch

from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw

STEPS = 4


def tiny_pipeline() -> Any:
    """Class-conditional, in latent space, with DDIM; its weights are always the same.

    One image of 16 pixels in four steps takes some ten milliseconds.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,  # a learned variance beside the noise
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
        )
        autoencoder = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = diffusers.DiTPipeline(
        transformer.eval(), autoencoder.eval(), scheduler, id2label={3: "three", 7: "seven"}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_law() -> StepLaw:
    """Of the runs of ``sampled``."""
    scheduler = tiny_pipeline().scheduler
    scheduler.set_timesteps(STEPS)
    return probe_scheduler(scheduler)


def sampled(pipeline: Any) -> torch.Tensor:
    """Two images of ``tiny_pipeline``, the same with every call."""
    images = pipeline(
        [3, 7],
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="pt",
    ).images
    return torch.as_tensor(images)
