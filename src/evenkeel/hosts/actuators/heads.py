"""Finding the last layer of a denoiser.

A head is the linear layer or convolution whose output values, reordered, are the denoiser's output;
nothing else may happen to them. Layers are recognised by what they say about themselves
(``in_features``, ``in_channels``, ...), because quantized ones belong to no common class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.actuators.head_rows import Head, border, sizes
from evenkeel.statistics.exact import working

# Where the denoisers of diffusers keep it; a star is the only entry of a ModuleDict (Z-Image).
_PLACES = (
    "proj_out_2",  # DiT, next to proj_out_1, which modulates
    "proj_out",
    "conv_out",
    "final_linear",
    "final_layer.linear",
    "all_final_layer.*.linear",
    "norm_out.linear_2",
    "out_layer.out_layer",
    "head.head",
    "proj_to_clip_embeddings",
    "spec_out",
    "clf.1",
)

# Layers after the head, or a second head beside it: direct children of the denoiser that end so.
_RIVALS = ("_proj_out", "_out_layer", "lm_head", "postprocess_conv", "mlm_layer")

_ADDS_INPUT = "it adds its own input to what its last layer gives"
_REFUSED = {
    "DreamLiteTransformer2DModel": _ADDS_INPUT,
    "TransformerTemporalModel": _ADDS_INPUT,
    "LongCatAudioDiTTransformer": "it masks what its last layer gives",
    "ErnieImageTransformer2DModel": "its last layer receives the tokens before the batch",
}

# Token models that predict a variance. All of them unpack a token as (patch, patch, channel).
_CHANNEL_LAST = {
    "AllegroTransformer3DModel",
    "DiTTransformer2DModel",
    "HunyuanDiT2DModel",
    "LatteTransformer3DModel",
    "LuminaNextDiT2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel",
    "Transformer2DModel",
}


def find_head(denoiser: nn.Module, name: str | None = None, *, channels: int | None = None) -> Head:
    """The output head of any diffusers denoiser.

    Args:
        denoiser: the network; torch.compile's wrapper is looked through.
        name: the layer's dotted path, where it is not found or there are several.
        channels: channels of the latents. Only needed where the configuration does not tell that a
            variance is predicted: denoisers that take an image beside the latents (Kandinsky
            inpainting takes 9 channels and gives 4 + 4; the upscalers of IF take 6 and give 3 + 3).

    Raises:
        UnsupportedPipeline: no such layer, several, one whose output is changed afterwards, or a
            geometry that cannot be written as rows.

    >>> denoiser = nn.Module()
    >>> denoiser.proj_out = nn.Linear(8, 4)
    >>> find_head(denoiser)
    Head(name='proj_out', kind='linear', features=8, targets=4, has_bias=True, corrected=(0, 1, 2, 3))

    """
    model = _unwrapped(denoiser)
    place = _place(model) if name is None else name
    layer: Any = _child(model, place)
    if layer is None or not _is_layer(layer):
        raise UnsupportedPipeline(
            f"The head of {type(model).__name__} should be a linear layer or a convolution; "
            f"{place!r} is {'not in it' if layer is None else f'a {type(layer).__name__}'}. "
            f"{_ADVICE}"
        )
    has_bias = isinstance(getattr(layer, "bias", None), Tensor)
    if hasattr(layer, "in_features"):
        features, targets = int(layer.in_features), int(layer.out_features)
        corrected = _corrected(model, targets, channels, tokens=True)
        return Head(place, "linear", features, targets, has_bias, corrected)
    features, targets = _convolution_size(model, place, layer)
    corrected = _corrected(model, targets, channels, tokens=False)
    return Head(place, "convolution", features, targets, has_bias, corrected)


_ADVICE = 'Name the last layer with head="...", if there is one.'


def layer_of(denoiser: nn.Module, head: Head) -> nn.Module:
    """The layer itself, looked up in a denoiser that may be compiled or wrapped.

    Raises:
        UnsupportedPipeline: this denoiser has no such layer.

    >>> denoiser = nn.ModuleDict({"proj_out": nn.Linear(8, 4)})
    >>> layer_of(denoiser, find_head(denoiser))
    Linear(in_features=8, out_features=4, bias=True)

    """
    model = _unwrapped(denoiser)
    layer = _child(model, head.name)
    if layer is None:
        raise UnsupportedPipeline(f"{type(model).__name__} has no layer called {head.name!r}.")
    return layer


def is_reordered(out: Tensor, prediction: Tensor) -> bool:
    """Whether a prediction consists of values of the head's output and of nothing else.

    What the name of a layer cannot show: after one call of the denoiser this confirms that
    `find_head` was right. A part of the output, in any order and floating-point dtype, is enough.

    >>> out = torch.tensor([[1.0, 2.0, 3.0]])
    >>> is_reordered(out, torch.tensor([3.0, 1.0])), is_reordered(out, torch.tensor([6.0]))
    (True, False)

    """
    given, found = (working(x).flatten() for x in (prediction, out))
    if given.numel() == found.numel():
        return torch.equal(given.sort().values, found.sort().values)
    return bool(torch.isin(given, found).all())


def is_plain(layer: Any) -> bool:
    """Whether the weight can be overwritten in place: an ordinary layer with ordinary tensors.

    False for quantized weights, subclasses of the layers, float8 storage and the meta device;
    there a correction has to be added beside the layer.

    >>> is_plain(nn.Linear(8, 4)), is_plain(nn.Linear(8, 4, device="meta"))
    (True, False)

    """
    if type(layer) not in _ORDINARY:
        return False
    return all(
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.dtype in _DENSE
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        for tensor in (layer.weight, layer.bias)
        if tensor is not None
    )


_ORDINARY = (nn.Linear, nn.Conv2d, nn.Conv3d)
_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _unwrapped(module: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(module, "_orig_mod", module)  # torch.compile
    return inner


def _child(model: nn.Module, path: str) -> nn.Module | None:
    module: Any = model
    for part in path.split("."):
        module = dict(_unwrapped(module).named_children()).get(part)
        if module is None:
            return None
    return _unwrapped(module)


def _is_layer(module: nn.Module) -> bool:
    size = ("in_features", "out_features"), ("in_channels", "out_channels", "kernel_size")
    return any(all(hasattr(module, key) for key in keys) for keys in size)


def _place(model: nn.Module) -> str:
    """Where the head is: the one known place that holds a layer, with nothing behind or beside."""
    kind = type(model).__name__
    places = [p for place in _PLACES for p in _written_out(model, place)]
    found = [p for p in places if (layer := _child(model, p)) is not None and _is_layer(layer)]
    if len(found) > 1:  # beside any other layer it is part of the normalisation (Cosmos)
        found = [p for p in found if p != "norm_out.linear_2"]
    rivals = [key for key, _ in model.named_children() if key.endswith(_RIVALS)]
    reason = _changed_by(model)
    if reason is None and rivals:
        reason = f"it has {', '.join(rivals)} behind or beside {', '.join(found) or 'its layers'}"
    if reason is None and len(found) != 1:
        last = ", ".join(key for key, _ in list(model.named_children())[-4:])
        reason = (
            f"several layers could be it: {', '.join(found)}"
            if found
            else f"no layer is called {', '.join(_PLACES)}; its last components are {last or 'none'}"
        )
    if reason is not None:
        raise UnsupportedPipeline(
            f"A denoiser should end in one linear layer or convolution whose output is only "
            f"reordered. {kind} does not show such a layer: {reason}. {_ADVICE}"
        )
    return found[0]


def _written_out(model: nn.Module, place: str) -> list[str]:
    if "*" not in place:
        return [place]
    before, after = place.split(".*.")
    entries = _child(model, before)
    return [f"{before}.{key}.{after}" for key, _ in entries.named_children()] if entries else []


def _changed_by(model: nn.Module) -> str | None:
    """What some classes, and some configurations, do to the output of their last layer."""
    config, classes = _config(model), _classes(model)
    for name in classes & _REFUSED.keys():
        return _REFUSED[name]
    if getattr(model, "is_input_continuous", False):
        return _ADDS_INPUT
    if "UNet2DModel" in classes and config.get("time_embedding_type") == "fourier":
        return "it divides what its last layer gives by the noise level"
    if {"SkipUpBlock2D", "AttnSkipUpBlock2D"} & set(config.get("up_block_types") or ()):
        return "it adds a skip connection to what its last layer gives"
    return None


def _classes(model: nn.Module) -> set[str]:
    # With the base classes: backends and users subclass a denoiser and keep its forward.
    return {kind.__name__ for kind in type(model).__mro__}


def _config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}


def _corrected(
    model: nn.Module, targets: int, channels: int | None, *, tokens: bool
) -> tuple[int, ...]:
    """Output columns without those of a learned variance: the second half of the channels."""
    config = _config(model)
    given, out = config.get("in_channels"), config.get("out_channels")
    if isinstance(given, int) and {"learn_sigma", "pred_sigma"} & set(config):
        out = 2 * given if config.get("learn_sigma") or config.get("pred_sigma") else given
    kept = channels if channels is not None else given
    if not isinstance(kept, int) or not isinstance(out, int) or out != 2 * kept:
        return tuple(range(targets))
    kind = type(model).__name__
    known = bool(_classes(model) & _CHANNEL_LAST) if tokens else targets == out
    if targets % out or not known:
        raise UnsupportedPipeline(
            f"{kind} gives {out} channels for {kept}, so half of them should be a learned variance, "
            f"but in which of the {targets} outputs of its last layer they lie is not known; known "
            f"are convolutions and {', '.join(sorted(_CHANNEL_LAST))}."
        )
    return tuple(column for column in range(targets) if column % out < kept)


def _convolution_size(model: nn.Module, place: str, layer: Any) -> tuple[int, int]:
    """Inputs of one output value, and output channels.

    Rows exist for what `torch.nn.functional.unfold` can cut into patches, and for points.
    """
    kernel = sizes(layer.kernel_size)
    points = [*kernel, *sizes(layer.stride)] == [1] * 6 and border(layer, kernel) == [0] * 6
    reason = None
    if getattr(layer, "transposed", False):
        reason = "transposed"
    elif getattr(layer, "groups", 1) != 1:
        reason = f"in {layer.groups} groups"
    elif len(kernel) != 2 and not points:
        reason = f"over {len(kernel)} axes with kernel {kernel}"
    if reason is not None:
        raise UnsupportedPipeline(
            f"The head {place!r} of {type(model).__name__} is a convolution {reason}; a linear layer, "
            f"an ungrouped two-dimensional convolution, or a three-dimensional one of kernel, stride "
            f"1 and no padding was expected. Such a denoiser cannot be corrected at its head."
        )
    return int(layer.in_channels) * math.prod(kernel), int(layer.out_channels)
