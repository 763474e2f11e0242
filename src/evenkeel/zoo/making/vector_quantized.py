"""Autoencoders with a codebook (``VQModel``), as latent diffusion uses them: trained in two stretches.

First without the codebook, which is then set to the means of clusters of latents, then with it: no entry
starts where no latent is. The other weights start as those of the embedded pipeline's autoencoder, where
it has such; this saves an hour. Denoisers see latents that are not rounded; decoding rounds them, so that
the codebook belongs to the decoder (Rombach et al. 2022, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel import zoo
from evenkeel.zoo.handwriting import CENTRED, IMAGE_SIZE, sample_pictures
from evenkeel.zoo.making.autoencoders import encode, picture_loss
from evenkeel.zoo.making.loop import Recipe, fit

# Factor in height and width -> (channels of the latents, channels of the levels); the originals' latents
# have as many channels (ImageNet: 3 at factor 4, 4 at factor 8).
SHAPES = {4: (3, (24, 48, 64)), 8: (4, (24, 48, 64, 64))}
RECIPES = {
    "vq-4-continuous": Recipe(steps=400, learning_rate=1e-3, seed=811, save_every=100),
    "vq-4-rounded": Recipe(steps=250, learning_rate=5e-4, seed=812, save_every=100),
    "vq-8-continuous": Recipe(steps=320, learning_rate=1e-3, seed=813, save_every=100),
    "vq-8-rounded": Recipe(steps=160, learning_rate=5e-4, seed=814, save_every=100),
}
TEACHER = "pixart-sigma"  # whose autoencoder's weights are where these start
BATCH = 32
ENTRIES = 1024
PICTURES = 2000  # whose latents are clustered
ROUNDS = 10  # of clustering
COMMITMENT = 0.25  # weight of the distance between latents and their entries
SIZE = 1e-3  # weight of the latents' squares, which nothing else holds where they are


def build(factor: int) -> Any:
    """``VQModel``, ``factor`` times smaller in height and width."""
    from diffusers import VQModel

    latents, levels = SHAPES[factor]
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        block_out_channels=levels,
        layers_per_block=1,
        latent_channels=latents,
        sample_size=IMAGE_SIZE,
        num_vq_embeddings=ENTRIES,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def train(factor: int, work: Path) -> Any:
    """The autoencoder of that factor, trained in ``work`` or continued there."""
    continuous, rounded = f"vq-{factor}-continuous", f"vq-{factor}-rounded"
    torch.manual_seed(RECIPES[continuous].seed)
    vae: Any = build(factor)
    _start(vae, zoo.load(TEACHER).vae)
    vae = fit(vae, _loss_of(vae, _continuous), RECIPES[continuous], work / continuous).cpu()
    rng = np.random.default_rng(RECIPES[rounded].seed)
    _set_entries(vae, rng)
    vae = fit(vae, _loss_of(vae, _rounded), RECIPES[rounded], work / rounded).cpu()
    rng = np.random.default_rng(RECIPES[rounded].seed)
    latents = encode(vae, _digits(1024, rng), scaled=False)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def _start(vae: Any, other: Any) -> None:
    """Weights of the other autoencoder where names and shapes are the same.

    The decoder counts its levels from the smallest, of which one more is at the front here.
    """
    more = len(vae.config.block_out_channels) - len(other.config.block_out_channels)
    mine = vae.state_dict()
    for name, value in other.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up_blocks"]:
            parts[2] = str(int(parts[2]) + more)
        target = mine.get(".".join(parts))
        if target is not None and target.shape == value.shape:
            target.copy_(value)


def _digits(n: int, rng: np.random.Generator) -> Tensor:
    return sample_pictures(n, rng, fixed=CENTRED)[0]


def _loss_of(vae: Any, loss: Callable[[Any, Tensor], Tensor]) -> Any:
    def loss_of(module: nn.Module, rng: np.random.Generator) -> Tensor:
        x = _digits(BATCH, rng).to(next(module.parameters()).device) * 2 - 1
        return loss(vae, x)

    return loss_of


def _continuous(vae: Any, x: Tensor) -> Tensor:
    latents = vae.encode(x).latents
    # Rounding will move them; a decoder that has never seen latents moved starts badly.
    moved = latents + 0.1 * latents.detach().std() * torch.randn_like(latents)
    decoded = vae.decode(moved, force_not_quantize=True).sample
    held: Tensor = SIZE * latents.square().mean()
    return picture_loss(x, decoded) + held


def _rounded(vae: Any, x: Tensor) -> Tensor:
    latents = vae.encode(x).latents
    made = vae.decode(latents)
    held: Tensor = COMMITMENT * made.commit_loss + SIZE * latents.square().mean()
    return picture_loss(x, made.sample) + held


@torch.no_grad()
def _set_entries(vae: Any, rng: np.random.Generator) -> None:
    """The codebook's entries become the means of clusters of latents (Lloyd's algorithm)."""
    latents = encode(vae, _digits(PICTURES, rng), scaled=False)
    points = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    chosen = rng.choice(len(points), ENTRIES, replace=len(points) < ENTRIES)
    entries = points[torch.from_numpy(chosen)]
    for _ in range(ROUNDS):
        nearest = torch.cat([torch.cdist(p, entries).argmin(1) for p in torch.split(points, 8192)])
        sums = torch.zeros_like(entries).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=ENTRIES)[:, None]
        entries = torch.where(counts > 0, sums / counts.clamp_min(1), entries)
    vae.quantize.embedding.weight.copy_(entries)
