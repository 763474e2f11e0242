"""What a pipeline hands its denoiser: shapes per class of denoiser, and how often per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.planning.blueprint import Blueprint


@dataclass(frozen=True)
class Size:
    """Of what is made.

    Attributes:
        height, width: in pixels.
        frames: of a video; 1 for images.

    """

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class Guidance:
    """How a pipeline asks for both branches.

    Attributes:
        rows: of a denoiser call, per prompt.
        calls: of the denoiser, per step.

    """

    rows: int
    calls: int


class Shapes:
    """The tensors of one denoiser call, made on the meta device.

    Args:
        blueprint: of the pipeline.
        size: of what is made.
        dtype: of the denoiser.

    """

    def __init__(self, blueprint: Blueprint, size: Size, dtype: torch.dtype) -> None:
        self.blueprint, self.size, self.dtype = blueprint, size, dtype
        self.config: Any = blueprint.denoiser.config

    @property
    def latent(self) -> tuple[int, ...]:
        """Channels, (frames,) height and width of one sample as the autoencoder takes it."""
        vae = self.blueprint.autoencoder
        size, down = self.size, spatial_factor(vae)
        if vae is None:
            return (self.config.in_channels, size.height, size.width)
        space = (size.height // down, size.width // down)
        if hasattr(vae.config, "z_dim"):
            time = int(getattr(vae.config, "scale_factor_temporal", None) or 4)
            return (vae.config.z_dim, (size.frames - 1) // time + 1, *space)
        return (vae.config.latent_channels, *space)

    @property
    def tokens(self) -> int:
        """Of a prompt, as the pipeline pads it: its own limit, or what its tokenizers take."""
        known = self.blueprint.tokens.values()
        limit = self.blueprint.default("max_sequence_length")
        longest = max(known, default=10**9)
        return int(min(longest, limit or 10**9) if min(longest, limit or 10**9) < 10**9 else 77)

    def known(self) -> bool:
        """Whether this denoiser's inputs are known."""
        return type(self.blueprint.denoiser).__name__ in _INPUTS

    def inputs(self, rows: int) -> dict[str, Any]:
        """Keywords of the denoiser's forward for so many rows."""
        return _INPUTS[type(self.blueprint.denoiser).__name__](self, rows)

    def empty(self, *shape: int) -> Tensor:
        """A floating tensor of the denoiser's dtype."""
        return torch.empty(shape, device="meta", dtype=self.dtype)

    def state(self, rows: int) -> Tensor:
        """What the scheduler steps from: packed for FLUX, else as the autoencoder takes it."""
        channels, *space = self.latent
        if type(self.blueprint.denoiser).__name__ == "FluxTransformer2DModel":
            return self.empty(rows, space[0] * space[1] // 4, channels * 4)
        return self.empty(rows, channels, *space)


def spatial_factor(autoencoder: nn.Module | None) -> int:
    """Pixels per latent position and axis."""
    config: Any = getattr(autoencoder, "config", None)
    if config is None:
        return 1
    if getattr(config, "scale_factor_spatial", None):
        return int(config.scale_factor_spatial)
    for key in ("encoder_block_out_channels", "block_out_channels", "dim_mult"):
        if getattr(config, key, None) is not None:
            return int(2 ** (len(getattr(config, key)) - 1))
    return 8


def guidance_of(blueprint: Blueprint, scale: float | None) -> Guidance:
    """Rows and calls of a step at this guidance scale."""
    name, pipeline = type(blueprint.denoiser).__name__, blueprint.pipeline.__name__
    guided = scale is not None and scale > 1
    if name == "FluxTransformer2DModel" or not guided or name == "UNet2DModel":
        return Guidance(1, 1)  # FLUX takes the scale as an input
    return Guidance(1, 2) if pipeline.startswith("Wan") else Guidance(2, 1)


def _time(shapes: Shapes, rows: int) -> Tensor:
    return torch.empty((rows,), device="meta", dtype=shapes.dtype)


def _unet(shapes: Shapes, rows: int) -> dict[str, Any]:
    config = shapes.config
    found: dict[str, Any] = {"sample": shapes.state(rows)}
    found["timestep"] = torch.empty((), device="meta", dtype=torch.int64)
    width = config.cross_attention_dim
    width = width[0] if isinstance(width, (list, tuple)) else width
    found["encoder_hidden_states"] = shapes.empty(rows, shapes.tokens, width)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": shapes.empty(rows, pooled), "time_ids": shapes.empty(rows, 6)}
        return {**found, "added_cond_kwargs": added}
    return found


def _class_unet(shapes: Shapes, rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {"sample": shapes.state(rows)}
    found["timestep"] = torch.empty((), device="meta", dtype=torch.int64)
    if shapes.config.class_embed_type is not None or shapes.config.num_class_embeds is not None:
        found["class_labels"] = torch.empty((rows,), device="meta", dtype=torch.int64)
    return found


def _flux(shapes: Shapes, rows: int) -> dict[str, Any]:
    state, config = shapes.state(rows), shapes.config
    found = {
        "hidden_states": state,
        "encoder_hidden_states": shapes.empty(rows, shapes.tokens, config.joint_attention_dim),
        "pooled_projections": shapes.empty(rows, config.pooled_projection_dim),
        "timestep": _time(shapes, rows),
        "img_ids": shapes.empty(state.shape[1], 3),
        "txt_ids": shapes.empty(shapes.tokens, 3),
    }
    return found | ({"guidance": _time(shapes, rows)} if config.guidance_embeds else {})


def _captioned(shapes: Shapes, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": shapes.state(rows),
        "encoder_hidden_states": shapes.empty(rows, shapes.tokens, shapes.config.caption_channels),
        "encoder_attention_mask": shapes.empty(rows, shapes.tokens),
        "timestep": _time(shapes, rows),
    }


def _pixart(shapes: Shapes, rows: int) -> dict[str, Any]:
    added = {"resolution": None, "aspect_ratio": None}
    return {**_captioned(shapes, rows), "added_cond_kwargs": added}


def _wan(shapes: Shapes, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": shapes.state(rows),
        "encoder_hidden_states": shapes.empty(rows, shapes.tokens, shapes.config.text_dim),
        "timestep": _time(shapes, rows),
    }


def _sd3(shapes: Shapes, rows: int) -> dict[str, Any]:
    config = shapes.config
    return {
        "hidden_states": shapes.state(rows),
        "encoder_hidden_states": shapes.empty(rows, 77 + shapes.tokens, config.joint_attention_dim),
        "pooled_projections": shapes.empty(rows, config.pooled_projection_dim),
        "timestep": _time(shapes, rows),
    }


def _labelled(shapes: Shapes, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": shapes.state(rows),
        "timestep": _time(shapes, rows),
        "class_labels": torch.empty((rows,), device="meta", dtype=torch.int64),
    }


_INPUTS: dict[str, Callable[[Shapes, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _class_unet,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _captioned,
    "WanTransformer3DModel": _wan,
    "SD3Transformer2DModel": _sd3,
    "DiTTransformer2DModel": _labelled,
}
