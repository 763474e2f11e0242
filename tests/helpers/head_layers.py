"""What the tests of heads share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import tiny_pipelines as tp
import torch
from torch import Tensor, nn

d = tp.d
PATCHED = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "num_layers": 1}
LLAMA = {"llama_layers": [0], "caption_channels": [8, 8], "max_resolution": (8, 8)}
ROPE = [1.0] * 48
#: What the constructors need where their own defaults do not build a model.
NEEDED: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"in_channels": 16, "patch_size": 2, **LLAMA},
    "HunyuanDiT2DModel": {"activation_fn": "gelu-approximate", **PATCHED, "num_layers": 2},
    "LatteTransformer3DModel": {"caption_channels": 8, **PATCHED},
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": ROPE, "long_factor": ROPE}},
    "Transformer2DModel": {"num_embeds_ada_norm": 9, "norm_type": "ada_norm_zero", **PATCHED},
    "TransformerTemporalModel": {"in_channels": 32},
    "UniDiffuserModel": {"text_dim": 32, "clip_img_dim": 32, "out_channels": 4, **PATCHED},
}


def on_meta(name: str) -> nn.Module:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return getattr(d, name)(**NEEDED.get(name, {}))


def seen(layer: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What enters and leaves the layer during a call, and what the denoiser gives."""
    seen: list[Tensor] = []
    keep = layer.register_forward_hook(lambda _, args, out: seen.extend((args[0], out.clone())))
    prediction = call()
    keep.remove()
    h, out = seen
    return h, out, prediction


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
