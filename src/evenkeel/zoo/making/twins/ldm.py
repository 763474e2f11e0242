"""The twins of the class-conditional latent diffusion models LDM-4 and LDM-8: a UNet, and a VQ autoencoder.

The pipeline is ``DiTPipeline``, which asks its denoiser for a sample, a timestep and classes and does not
care that it is a UNet. It has the null class 1,000 written into it, as the original has; rows of classes 10
to 999 were never trained and are zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.zoo.handwriting import CENTRED, DIGITS, IMAGE_SIZE, sample_pictures
from evenkeel.zoo.making import objectives, vector_quantized
from evenkeel.zoo.making.autoencoders import encode
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.making.pools import Pool

CLASSES, NULL = 1000, 1000
# Cosine with warm restarts, so that the first stretch alone is already a twin.
RECIPES_4 = (Recipe(steps=4000, learning_rate=1.5e-3, seed=814),)
RECIPES_8 = (Recipe(steps=3500, learning_rate=1.5e-3, seed=815),)
LEVELS = {4: (48, 96), 8: (64, 80)}
BATCH = 64
PICTURES = 40_000  # fewer at factor 8, where a latent holds less
DROP_CLASS = 0.1
# Of the original, where noise-to-signal ends at 81; Stable Diffusion's ends at 14.6.
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
# No level weighs more than one of this noise-to-signal: where there is next to no signal, what is
# left of the error is that of copying the input.
HEAVIEST = 8.0**2


def build_denoiser(factor: int) -> Any:
    """Two levels with attention, classes added to the timestep's embedding."""
    from diffusers import UNet2DModel

    channels, _ = vector_quantized.SHAPES[factor]
    return UNet2DModel(
        sample_size=IMAGE_SIZE // factor,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=LEVELS[factor],
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=16,
        num_class_embeds=CLASSES + 1,
    )


def train_4(work: Path, out: Path) -> None:
    """Train LDM-4's twin and save the pipeline."""
    _train(4, work, out)


def train_8(work: Path, out: Path) -> None:
    """Train LDM-8's twin and save the pipeline."""
    _train(8, work, out)


def _train(factor: int, work: Path, out: Path) -> None:
    from diffusers import DDIMScheduler, DiTPipeline

    vae = vector_quantized.train(factor, work)
    denoiser = train_denoiser(factor, vae, work)
    pipeline = DiTPipeline(
        transformer=denoiser.eval(),
        vae=vae.eval(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        id2label=dict(enumerate(DIGITS)),
    )
    pipeline.save_pretrained(out)


def train_denoiser(factor: int, vae: Any, work: Path) -> Any:
    """Predict the noise; classes dropped at random for guidance."""
    recipes = {4: RECIPES_4, 8: RECIPES_8}[factor]

    def make() -> dict[str, Tensor]:
        rng = np.random.default_rng(recipes[0].seed)
        pictures, attributes = sample_pictures(4 * PICTURES // factor, rng, fixed=CENTRED)
        return {"latents": encode(vae, pictures), "classes": attributes["digit"]}

    pool = Pool.kept(work / "pool.safetensors", make)
    signal = objectives.alphas_cumprod(BETAS)
    torch.manual_seed(recipes[0].seed)
    denoiser = build_denoiser(factor)
    with torch.no_grad():
        denoiser.class_embedding.weight[len(DIGITS) : NULL] = 0.0

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        batch = pool.draw(BATCH, rng, next(module.parameters()).device)
        dropped = torch.from_numpy(rng.random(BATCH) < DROP_CLASS).to(batch["classes"].device)
        classes = torch.where(dropped, NULL, batch["classes"])

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            output: Tensor = module(noisy, t, class_labels=classes, return_dict=False)[0]
            return output

        return objectives.epsilon_loss(predict, batch["latents"], rng, signal, HEAVIEST)

    for index, recipe in enumerate(recipes):
        denoiser = fit(denoiser, loss, recipe, work / f"denoiser-{index}")
    return denoiser.cpu()
