"""The twin of the CIFAR-10 model of DDIM: unconditional, in pixel space, 32 x 32.

``DDIMPipeline`` turns whatever scheduler it is given into DDIM; the pipeline is ``DDPMPipeline``, which
takes any, with a DDIM scheduler.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.zoo.handwriting import CENTRED_WHITE, IMAGE_SIZE, sample_pictures
from evenkeel.zoo.making import objectives
from evenkeel.zoo.making.loop import Recipe, fit

RECIPES = (
    Recipe(steps=7000, learning_rate=1e-3, seed=714, bfloat16=True),
    Recipe(steps=4000, learning_rate=7e-4, seed=715, bfloat16=True),
)
BATCH = 64


def build_denoiser() -> Any:
    """Levels of 16, 32, 64 and 96 channels from 32 x 32 to 4 x 4, attention at 8 x 8."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def train(work: Path, out: Path) -> None:
    """Train the denoiser and save the pipeline."""
    from diffusers import DDIMScheduler, DDPMPipeline

    scheduler = DDIMScheduler(**objectives.BETAS, clip_sample=False, set_alpha_to_one=True)
    DDPMPipeline(unet=train_denoiser(work).eval(), scheduler=scheduler).save_pretrained(out)


def train_denoiser(work: Path) -> Any:
    """Predict the noise in pictures from -1 to 1."""
    signal = objectives.alphas_cumprod()
    torch.manual_seed(RECIPES[0].seed)
    denoiser = build_denoiser()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        pictures, _ = sample_pictures(BATCH, rng, fixed=CENTRED_WHITE)
        x = pictures.to(next(module.parameters()).device) * 2 - 1

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            output: Tensor = module(noisy, t, return_dict=False)[0].float()
            return output

        return objectives.epsilon_loss(predict, x, rng, signal)

    for index, recipe in enumerate(RECIPES):
        denoiser = fit(denoiser, loss, recipe, work / f"denoiser-{index}")
    return denoiser.cpu()
