"""The networks of the embedded pipeline: real diffusers and transformers classes, small configurations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evenkeel.zoo.handwriting import ATTRIBUTES, IMAGE_SIZE
from evenkeel.zoo.making import objectives

CAPTION_TOKENS = 24
CAPTION_WIDTH = 96
LATENT_CHANNELS = 4
LATENT_SIZE = IMAGE_SIZE // 4

SCHEDULER = {
    **objectives.BETAS,
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
}


def build_denoiser() -> Any:
    """PixArt-Sigma's transformer: 8 blocks of width 96, patch 2, 1.4 million parameters."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_layers=8,
        num_attention_heads=3,
        attention_head_dim=32,
        cross_attention_dim=96,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        caption_channels=CAPTION_WIDTH,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )


class Evaluator(nn.Module):
    """Sees pictures: 64 features for distances, and one score per value of every attribute.

    Call it with pictures (n, 3, 32, 32) in [0, 1]; ``features`` returns (n, 64) float32.
    """

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.SiLU(inplace=True)
            )

        self.trunk = nn.Sequential(
            block(3, 32, 1), block(32, 48, 2), block(48, 64, 1), block(64, 96, 2), block(96, 96, 2)
        )
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(96 * 16, 64), nn.SiLU())
        self.heads = nn.ModuleDict({k: nn.Linear(64, len(v)) for k, v in ATTRIBUTES.items()})

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (n, 64)."""
        features: Tensor = self.project(self.trunk(images * 2 - 1))
        return features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Scores per attribute: name -> (n, number of values)."""
        features = self.features(images)
        return {k: head(features) for k, head in self.heads.items()}
