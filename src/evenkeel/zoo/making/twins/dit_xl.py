"""The twin of DiT-XL/2: class-conditional, learned variance, DDIM and DDPM.

A class is a digit (0 to 9), large in the middle; colours are free. diffusers' ``DiTPipeline``
has 1,000 classes and a null class written into it, so there are as many rows of embeddings here; those
of classes 10 to 999 were never trained and are zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.zoo.handwriting import CENTRED, DIGITS, sample_pictures
from evenkeel.zoo.making import objectives
from evenkeel.zoo.making.autoencoders import encode
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.making.pools import Pool

CLASSES, NULL = 1000, 1000
RECIPES = (
    Recipe(steps=8000, learning_rate=1e-3, seed=214),
    Recipe(steps=8000, learning_rate=1e-3, seed=215),
)
BATCH = 64
PICTURES = 40_000
DROP_CLASS = 0.1


def build_denoiser() -> Any:
    """DiT with 8 blocks of width 96, patch 2; a table of 1,001 classes in every block."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,  # noise and variance
        num_layers=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_type="ada_norm_zero",
    )


def train(work: Path, out: Path) -> None:
    """Train the denoiser on latents of the embedded pipeline's autoencoder and save the pipeline."""
    from diffusers import DDIMScheduler, DiTPipeline

    from evenkeel import zoo

    vae = zoo.load("pixart-sigma").vae
    denoiser = train_denoiser(vae, work)
    pipeline = DiTPipeline(
        transformer=denoiser.eval(),
        vae=vae,
        scheduler=DDIMScheduler(**objectives.BETAS, clip_sample=False, set_alpha_to_one=False),
        id2label=dict(enumerate(DIGITS)),
    )
    pipeline.save_pretrained(out)


def train_denoiser(vae: Any, work: Path) -> Any:
    """Noise and variance, classes dropped at random for guidance."""

    def make() -> dict[str, Tensor]:
        rng = np.random.default_rng(RECIPES[0].seed)
        pictures, attributes = sample_pictures(PICTURES, rng, fixed=CENTRED)
        return {"latents": encode(vae, pictures), "classes": attributes["digit"]}

    pool = Pool.kept(work / "pool.safetensors", make)
    signal = objectives.alphas_cumprod()
    torch.manual_seed(RECIPES[0].seed)
    denoiser = build_denoiser()
    _start_at_zero(denoiser)

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        batch = pool.draw(BATCH, rng, next(module.parameters()).device)
        dropped = torch.from_numpy(rng.random(BATCH) < DROP_CLASS).to(batch["classes"].device)
        classes = torch.where(dropped, NULL, batch["classes"])

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            output: Tensor = module(noisy, timestep=t, class_labels=classes, return_dict=False)[0]
            return output

        return objectives.epsilon_loss(predict, batch["latents"], rng, signal)

    for index, recipe in enumerate(RECIPES):
        denoiser = fit(denoiser, loss, recipe, work / f"denoiser-{index}")
    return denoiser.cpu()


def _start_at_zero(denoiser: Any) -> None:
    """Modulation and output start at zero (adaLN-zero); so do the classes without pictures."""
    nn.init.zeros_(denoiser.proj_out_2.weight)
    nn.init.zeros_(denoiser.proj_out_2.bias)
    for block in denoiser.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        embedder = block.norm1.emb.class_embedder
        embedder.dropout_prob = 0.0  # it would drop the class in some blocks and keep it in others
        nn.init.normal_(embedder.embedding_table.weight, std=0.02)
        with torch.no_grad():
            embedder.embedding_table.weight[len(DIGITS) : NULL] = 0.0
