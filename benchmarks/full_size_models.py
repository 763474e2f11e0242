"""Pipelines of real widths with random weights, and twins of theirs in 4 bits.

Text encoders have one layer and the width of the originals: what they say is random either way.
Autoencoders are as small as their class allows; nothing is decoded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

import evenkeel
from evenkeel.quantizers.methods.spec import QuantizerSpec
from evenkeel.zoo.making.text_encoders import build, build_t5
from evenkeel.zoo.scene_captions import vocabulary

GROUP = 64
GEOMETRY = {
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "padding_mode", "dilation", "groups"),
}
NOISE = 1 << 20  # random numbers of which all weights are made


@dataclass(frozen=True)
class Size:
    """A pipeline of one size, how it is called, and how its denoiser is quantized.

    ``twin`` makes the quantized denoiser; ``refitted`` the one that a refit starts from, None where
    there is none.
    """

    pipeline: Callable[[], Any]
    call: dict[str, Any]
    guidance: float
    twin: Callable[[nn.Module], nn.Module]
    refitted: Callable[[nn.Module], nn.Module] | None = None


# ---- weights


def filled(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with random weights, without the minutes that drawing 2.6 billion of them takes.

    Matrices are tiles of the same million numbers, each from another place, of variance 1 / inputs.
    """
    with patch.object(nn.Linear, "reset_parameters"), patch.object(_ConvNd, "reset_parameters"):
        network = make()
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
    for index, (name, weight) in enumerate(network.named_parameters()):
        weight.requires_grad_(False)
        if weight.dim() < 2:
            weight.fill_(float(name.endswith("weight")))
            continue
        scale = (weight.numel() / len(weight)) ** -0.5
        flat, offset = weight.data.view(-1), 7919 * index % NOISE
        tile = torch.cat([noise[offset:], noise[:offset]]) * scale
        for start in range(0, len(flat), NOISE):
            part = flat[start : start + NOISE]
            part.copy_(tile[: len(part)])
    return network.eval()


# ---- a packed twin


class Packed(nn.Module):
    """A linear layer or convolution that keeps two codes of 4 bits in a byte and unpacks per call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight: Tensor = layer.get_parameter("weight").data
        self.shape, self.like = weight.shape, copy.copy(layer)
        self.like._parameters = {"weight": None, "bias": None}
        for key in GEOMETRY & vars(layer).keys():
            setattr(self, key, getattr(layer, key))
        rows = weight.reshape(len(weight), -1)
        rows = F.pad(rows, (0, -rows.shape[1] % GROUP)).reshape(len(weight), -1, GROUP)
        scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 7
        codes = (rows / scale).round_().add_(8).to(torch.uint8)
        self.register_buffer("codes", codes[..., ::2] | codes[..., 1::2] << 4)
        self.register_buffer("scale", scale)
        bias = layer._parameters["bias"]
        self.register_buffer("bias", None if bias is None else bias.data)

    def unpacked(self) -> Tensor:
        """The weight. No attribute of that name: a fingerprint that looks for one would unpack it."""
        pairs = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2)
        rows = (pairs.to(self.scale.dtype) - 8).mul_(self.scale).flatten(1)
        return rows[:, : self.shape[1:].numel()].reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it stands for."""
        if isinstance(self.like, nn.Conv2d):
            return self.like._conv_forward(x, self.unpacked(), self.bias)
        return F.linear(x, self.unpacked(), self.bias)


def packed(denoiser: nn.Module) -> nn.Module:
    """The same network with packed layers; the output layer and all that is small are shared."""
    memo: dict[int, Any] = {}
    for name, layer in denoiser.named_modules():
        large = isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.numel() > 2**16
        if large and name not in ("conv_out", "proj_out") and "embed" not in name:
            memo[id(layer)] = Packed(layer)
    for parameter in denoiser.parameters():
        memo[id(parameter)] = parameter
    return copy.deepcopy(denoiser, memo)


def simulated(bits: str, only: tuple[str, ...] = ()) -> Callable[[nn.Module], nn.Module]:
    """By this library: values of few bits in the model's own dtype."""

    def make(denoiser: nn.Module) -> nn.Module:
        spec = QuantizerSpec.parse(bits)
        found = QuantizerSpec(
            spec.weight_bits, spec.activation_bits, spec.group, spec.rank, only=only
        )
        return evenkeel.quantize_module(denoiser, found)[0]

    return make


# ---- pipelines


def clip(width: int, heads: int, *, projected: bool) -> tuple[Any, Any]:
    """Tokenizer and text encoder."""
    import transformers as tf

    tokenizer, small = build("clip-l")
    sizes = {"hidden_size": width, "intermediate_size": width, "projection_dim": width}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": heads}
    config = tf.CLIPTextConfig(**{**small.config.to_dict(), **sizes})
    kind = tf.CLIPTextModelWithProjection if projected else tf.CLIPTextModel
    return tokenizer, kind(config).eval()


def t5(tokens: int) -> tuple[Any, Any]:
    """Tokenizer and text encoder of T5-XXL's width."""
    tokenizer, encoder = build_t5(vocabulary(), tokens, 4096, layers=1)
    return tokenizer, encoder.eval()


def autoencoder(channels: int) -> Any:
    """Eight times smaller in height and width."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=0.0,
    ).eval()


def sdxl() -> Any:
    """StableDiffusionXLPipeline, 2.6 billion weights, Euler."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    def unet() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )

    (words, small), (_, large) = clip(768, 12, projected=False), clip(1280, 20, projected=True)
    return StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=small,
        text_encoder_2=large,
        tokenizer=words,
        tokenizer_2=words,
        unet=filled(unet),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def flux() -> Any:
    """FluxPipeline of width 3,072 with one block of each kind."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    words, small = clip(768, 12, projected=False)
    tokens, large = t5(512)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder(16),
        text_encoder=small,
        tokenizer=words,
        text_encoder_2=large,
        tokenizer_2=tokens,
        transformer=filled(
            lambda: FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        ),
    )


def pixart() -> Any:
    """PixArtSigmaPipeline, 610 million weights, DPM-Solver++."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    tokens, encoder = t5(300)
    return PixArtSigmaPipeline(
        tokenizer=tokens,
        text_encoder=encoder,
        vae=autoencoder(4),
        transformer=filled(lambda: PixArtTransformer2DModel(sample_size=64, caption_channels=4096)),
        scheduler=DPMSolverMultistepScheduler(),
    )


def wan() -> Any:
    """WanPipeline of the width of Wan 1.3B, 1,536, with two blocks."""
    import diffusers as d
    import transformers as tf

    tokens, encoder = t5(64)
    kinds = {**encoder.config.to_dict(), "architectures": None, "model_type": "umt5"}
    scale = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    return d.WanPipeline(
        tokenizer=tokens,
        text_encoder=tf.UMT5EncoderModel(tf.UMT5Config(**kinds)).eval(),
        vae=d.AutoencoderKLWan(base_dim=4, dim_mult=[1] * 4, num_res_blocks=1, **scale),
        scheduler=d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        transformer=filled(
            lambda: d.WanTransformer3DModel(
                num_attention_heads=12, ffn_dim=8960, num_layers=2, text_dim=4096
            )
        ),
    )


SIZES = {
    "sdxl": Size(sdxl, {"height": 512, "width": 512}, 1.0, packed),
    "pixart": Size(
        pixart,
        {"height": 256, "width": 256, "use_resolution_binning": False, "clean_caption": False},
        4.5,
        packed,
        simulated("w4a8", ("*transformer_blocks.0.*",)),
    ),
    "flux": Size(
        flux,
        {"height": 1024, "width": 1024, "max_sequence_length": 512},
        3.5,
        packed,
        simulated("w4a8", ("*transformer_blocks.0.attn*",)),
    ),
    "wan": Size(
        wan,
        {"height": 256, "width": 256, "num_frames": 29, "max_sequence_length": 64},
        1.0,
        packed,
        simulated("w4a8", ("*blocks.0.*",)),
    ),
}
