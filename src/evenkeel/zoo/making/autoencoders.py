"""The autoencoders of the zoo, one for each width of latents, and how they are trained.

``kl-4`` (Stable Diffusion and SDXL) and ``kl-16`` (FLUX) give latents (channels, 8, 8) for pictures
(3, 32, 32); ``dc-32`` (Sana), of the deep-compression kind without normalisation of latents, gives
(32, 4, 4). Scenes of one and two digits train them; the embedded pipeline has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel.zoo.handwriting import IMAGE_SIZE
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.scenes import sample_scene_pictures

RECIPES = {
    "kl-4": Recipe(steps=2500, learning_rate=2e-3, seed=112, weight_decay=1e-4, bfloat16=True),
    "kl-16": Recipe(steps=1500, learning_rate=2e-3, seed=113, weight_decay=1e-4, bfloat16=True),
    "dc-32": Recipe(steps=2500, learning_rate=2e-3, seed=114, weight_decay=1e-4, bfloat16=True),
}
BATCH = 64
# Of the Kullback-Leibler term. Four times the channels hold more than the pictures do; pressed harder, those
# that are not needed become noise, which a denoiser learns at once.
DIVERGENCE = {4: 2e-3, 16: 2e-2}
# A diffusion model's samples are never exactly where encoded pictures are: the deep-compression
# decoder, which no Kullback-Leibler term smooths, sees latents this far off (in their deviations).
LATENT_NOISE = 0.1

Pictures = Callable[[int, np.random.Generator], Tensor]


def build_kl(
    latent_channels: int, channels: tuple[int, int, int] = (24, 48, 64), size: int = IMAGE_SIZE
) -> Any:
    """``AutoencoderKL``, 4 times smaller in height and width, for pictures of ``size`` pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
        shift_factor=None if latent_channels == 4 else 0.0,
        use_quant_conv=latent_channels == 4,
        use_post_quant_conv=latent_channels == 4,
    )


def build_dc(latent_channels: int = 32) -> Any:
    """``AutoencoderDC``, 8 times smaller in height and width (the original: 32 times)."""
    from diffusers import AutoencoderDC

    options: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        options[f"{side}_block_types"] = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
        options[f"{side}_block_out_channels"] = (24, 48, 96, 96)
        options[f"{side}_layers_per_block"] = (1, 1, 1, 1)
        options[f"{side}_qkv_multiscales"] = ((), (), (), (5,))
    return AutoencoderDC(
        latent_channels=latent_channels,
        attention_head_dim=32,
        downsample_block_type="conv",
        **options,
    )


def build(name: str) -> Any:
    """The autoencoder of that name, not trained."""
    kind, channels = name.split("-")
    return (build_kl if kind == "kl" else build_dc)(int(channels))


def train(name: str, work: Path) -> Any:
    """The autoencoder ``kl-4``, ``kl-16`` or ``dc-32``, trained in ``work`` or continued there."""
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)

    def scenes(n: int, rng: np.random.Generator) -> Tensor:
        return sample_scene_pictures(n, rng)[0]

    return fit_autoencoder(build(name), scenes, recipe, work / name)


def fit_autoencoder(
    vae: Any, pictures_of: Pictures, recipe: Recipe, folder: Path, batch: int = BATCH
) -> Any:
    """Train with an L1, an L2 and a gradient loss, and set scale and shift of the latents."""

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        x = pictures_of(batch, rng).to(device) * 2 - 1
        latents, penalty = _noisy_latents(vae, x)
        return picture_loss(x, vae.decode(latents).sample.float()) + penalty

    fit(vae, loss, recipe, folder)
    vae = vae.cpu()
    latents = encode(vae, pictures_of(1024, np.random.default_rng(recipe.seed)), scaled=False)
    if vae.config.get("shift_factor") is not None:
        vae.register_to_config(shift_factor=round(latents.mean().item(), 4))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def picture_loss(x: Tensor, y: Tensor) -> Tensor:
    """Absolute, squared and edge differences of pictures (n, 3, h, w)."""
    edges = (x.diff(dim=-1) - y.diff(dim=-1)).abs().mean()
    edges = edges + (x.diff(dim=-2) - y.diff(dim=-2)).abs().mean()
    return (x - y).abs().mean() + 0.5 * F.mse_loss(y, x) + 0.5 * edges


@torch.no_grad()
def encode(vae: Any, pictures: Tensor, *, scaled: bool = True) -> Tensor:
    """Latents of pictures (n, 3, 32, 32) in [0, 1], as the denoiser sees them unless not ``scaled``."""
    parts = []
    for part in torch.split(pictures, 500):
        encoded = vae.encode(part * 2 - 1)
        parts.append(encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0])
    latents = torch.cat(parts)
    if not scaled:
        return latents
    shift = vae.config.get("shift_factor") or 0.0
    scaled_latents: Tensor = (latents - shift) * vae.config.scaling_factor
    return scaled_latents


def _noisy_latents(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents to decode while training, and what is added to the loss."""
    encoded = vae.encode(x)
    if hasattr(encoded, "latent_dist"):
        posterior = encoded.latent_dist
        weight = DIVERGENCE[vae.config.latent_channels]
        return posterior.sample(), weight * posterior.kl().mean() / x[0].numel()
    latents: Tensor = encoded.latent
    noise = LATENT_NOISE * latents.detach().std() * torch.randn_like(latents)
    return latents + noise, 1e-3 * latents.square().mean()
