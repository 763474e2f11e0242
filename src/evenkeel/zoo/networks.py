"""The networks of the embedded pipeline: real diffusers and transformers classes, small configurations."""

from __future__ import annotations

import string
from typing import Any

from torch import Tensor, nn

from evenkeel.zoo.captions import vocabulary
from evenkeel.zoo.handwriting import ATTRIBUTES, IMAGE_SIZE

CAPTION_TOKENS = 24
CAPTION_WIDTH = 96
LATENT_CHANNELS = 4
LATENT_SIZE = IMAGE_SIZE // 4

# Noise-to-signal ends at 14.6 (PixArt-Sigma's linear schedule: 157). A small network's error in eps is
# multiplied by that number in its guess of the clean latent; at 157 colours are lost.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
}


def build_tokenizer() -> Any:
    """A T5 tokenizer whose pieces are the grammar's words, with single characters as fallback."""
    from transformers import T5Tokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    words = vocabulary()
    pieces += [("▁" + w, -1.0) for w in words]
    pieces += [(c, -8.0) for c in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=CAPTION_TOKENS)


def build_text_encoder(vocab_size: int) -> Any:
    """A two-layer T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=CAPTION_WIDTH,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_autoencoder() -> Any:
    """Latents (4, 8, 8) for pictures (3, 32, 32)."""
    from diffusers import AutoencoderKL

    channels = (24, 48, 64)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


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
