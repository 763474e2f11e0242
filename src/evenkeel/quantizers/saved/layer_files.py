"""One quantized layer as tensors and a description in JSON types, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import input_from
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
)
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, codes_of, last, unlast, values_of
from evenkeel.storage.packing import pack, unpack

CODES, SCALE, ZERO, UNIT = ("weight.codes", "weight.scale", "weight.zero", "weight.unit")
_PARTS = ("bias", "smoothing", "down", "up", "first_token")


def write_layer(layer: QuantizedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The layer's tensors by name, and what else is needed to make it again.

    The weight is written as packed codes and scales where these give back its very bits; a weight
    that was changed since (a refit) is written as it is.
    """
    tensors = {
        name: buffer.detach().cpu().clone().contiguous() for name, buffer in layer.named_buffers()
    }
    packed = _packed(layer)
    if packed is not None:
        tensors.pop("weight")
        tensors.update(packed)
    weight = {
        "shape": list(layer.weight.shape),
        "dtype": str(layer.weight.dtype).removeprefix("torch."),
        "grid": None if packed is None or layer.stored is None else layer.stored[0].as_dict(),
    }
    activation = None if layer.activation is None else layer.activation.as_dict()
    return tensors, {"weight": weight, "activation": activation}


def read_layer(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], like: nn.Module
) -> QuantizedLayer:
    """The inverse of :func:`write_layer`; ``like`` gives a convolution its geometry.

    Raises:
        QuantizationError: tensors or fields are missing, unknown, or do not fit ``like``.

    """
    left = dict(tensors)
    inputs = {
        k: left.pop(f"activation.{k}")
        for k in ("scale", "zero", "shift")
        if f"activation.{k}" in left
    }
    parts: dict[str, Any] = {name: left.pop(name, None) for name in _PARTS}
    try:
        weight, stored = _weight(description["weight"], left)
        activation = description["activation"]
    except KeyError as error:
        raise QuantizationError(
            f"a quantized layer lacks {error}. Save the model again."
        ) from error
    expected = getattr(like, "weight", weight).shape
    if left or weight.shape != expected:
        raise QuantizationError(
            f"a quantized layer of shape {tuple(weight.shape)} with unknown tensors {sorted(left)} "
            f"does not fit a {type(like).__name__} of shape {tuple(expected)}. Use the diffusers "
            "version that the model was saved with."
        )
    rest: dict[str, Any] = {
        "activation": None if activation is None else input_from(activation, inputs),
        "smoothing": parts.pop("smoothing"),
        "stored": stored,
    }
    if isinstance(like, nn.Conv2d):
        return QuantizedConv2d(like, weight, parts["bias"], **rest)
    return QuantizedLinear(weight, **parts, **rest)


def _packed(layer: QuantizedLayer) -> dict[str, Tensor] | None:
    """Codes and scales, or None where they are unknown or no longer give the weight."""
    if layer.stored is None:
        return None
    grid, scales = layer.stored
    weight = layer.weight.detach().cpu()
    own = Scales(*(None if t is None else t.cpu() for t in astuple(scales)))  # type: ignore[arg-type]
    codes = codes_of(last(weight, grid), grid, own)
    again = _values(codes, grid, own, weight.shape, weight.dtype)
    # Flat, because a 1 x 1 convolution counts as contiguous with strides that no view accepts.
    bits = (t.contiguous().flatten().view(torch.uint8) for t in (again, weight))
    if not torch.equal(*bits):
        return None
    tensors = {CODES: pack(codes, grid.format.bits)}
    if own.zero is not None:
        tensors[ZERO] = own.zero.to(torch.uint8)
    if own.unit is None:
        tensors[SCALE] = _narrow(own.scale)
    else:
        tensors[UNIT] = own.unit
        tensors[SCALE] = (own.scale / own.unit).to(torch.float8_e4m3fn)
    return tensors


def _weight(
    found: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[Tensor, tuple[Grid, Scales] | None]:
    if found["grid"] is None:
        return tensors.pop("weight"), None
    grid = Grid.from_dict(found["grid"])
    shape, dtype = torch.Size(found["shape"]), getattr(torch, found["dtype"])
    unit, scale = tensors.pop(UNIT, None), tensors.pop(SCALE)
    wide = torch.promote_types((scale if unit is None else unit).dtype, torch.float32)
    scale = scale.to(wide)
    zero = tensors.pop(ZERO).to(wide) if ZERO in tensors else None
    scales = Scales(scale if unit is None else scale * unit, zero, unit)
    like = last(torch.empty(shape, device="meta"), grid)
    codes = unpack(tensors.pop(CODES), grid.format.bits, like.numel()).reshape(like.shape)
    return _values(codes, grid, scales, shape, dtype), (grid, scales)


def _values(
    codes: Tensor, grid: Grid, scales: Scales, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    return unlast(values_of(codes, grid, scales), shape, grid).to(dtype)


def _narrow(scale: Tensor) -> Tensor:
    """In 16 bits where these are the same numbers (models in half precision), else as it is.

    Scales of float64 keep their width, as it says in what arithmetic the values were made.
    """
    for dtype in (torch.float16, torch.bfloat16):
        if scale.dtype == torch.float32 and torch.equal(scale.to(dtype).to(scale.dtype), scale):
            return scale.to(dtype)
    return scale
