"""Symmetric uniform quantization: integers times one scale per group of neighbouring values."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError


def q_max(bits: int) -> int:
    """The largest code; codes run from ``-q_max`` to ``q_max``, and 2 bits are ternary.

    Raises:
        QuantizationError: bits outside 2..8.

    >>> q_max(4), q_max(2)
    (7, 1)

    """
    if not 2 <= bits <= 8:
        raise QuantizationError(f"A uniform quantizer has 2 to 8 bits, got {bits!r}.")
    return int((1 << (bits - 1)) - 1)


def scale_of(x: Tensor, bits: int, group: int | None) -> Tensor:
    """The step between neighbouring codes, per group of ``group`` values of the last dimension.

    scale = max|x| / q_max;  1 where the group is zero (or so small that the step would be
    subnormal, below about 1e-38 in float32: such a group is zero for the quantizer).

    Args:
        x: (..., width), floating point.
        bits: 2 to 8.
        group: values per scale; None is the whole last dimension. The last group is smaller
            where ``group`` does not divide the width.

    Returns:
        (..., number of groups), float32 (float64 for float64 input), in the units of ``x``.

    Raises:
        QuantizationError: not floating point, no last dimension, or bits or group out of range.

    >>> scale_of(torch.tensor([7.0, -3.0, 0.0, 0.0, 14.0]), 4, 2)
    tensor([1., 1., 2.])

    """
    return _scale(_grouped(x, group), q_max(bits)).squeeze(-1)


def fake_quantize(x: Tensor, bits: int, group: int | None) -> Tensor:
    """Round every value to the nearest of its group's ``2**bits - 1`` levels.

    x_q = scale * round(x / scale),  scale = max|x| / q_max per group; ties go to the even code.

    The largest magnitude of a group is a level, so nothing is ever clipped and the error is at
    most scale / 2. The largest value fixes the scale, so an outlier costs its own group only.
    Computed in float32 (float64 for float64 input). Values are not inspected, because this runs
    on every activation: a NaN or infinity turns its whole group into NaN. The gradient is zero
    almost everywhere; this is for inference.

    Args:
        x: (..., width), floating point.
        bits: 2 to 8.
        group: values per scale; None is the whole last dimension.

    Returns:
        Same shape and dtype as ``x``.

    Raises:
        QuantizationError: not floating point, no last dimension, or bits or group out of range.

    >>> fake_quantize(torch.tensor([7.0, 2.6, -0.4]), 4, None)
    tensor([7., 3., -0.])

    """
    grouped = _grouped(x, group)
    scale = _scale(grouped, q_max(bits))
    return (grouped / scale).round_().mul_(scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def quantize_weight(
    weight: Tensor, bits: int, group: int | None, where: str = "the weight"
) -> Tensor:
    """Round a weight with groups along its input features, separately per output channel.

    In a convolution every kernel position has its own groups of input channels; with ``group``
    None one scale serves the whole filter of an output channel.

    Args:
        weight: (out, in), or (out, in, height, width) for a convolution.
        bits: 2 to 8, or 16 to leave it as it is.
        group: input features per scale, or None.
        where: how to call this tensor in an error.

    Returns:
        Same shape and dtype as ``weight``.

    Raises:
        QuantizationError: NaN or infinity in the weight, or what :func:`fake_quantize` refuses.

    >>> quantize_weight(torch.tensor([[3.0, 1.4], [0.3, 0.1]]), 3, None)
    tensor([[3.0000, 1.0000],
            [0.3000, 0.1000]])

    """
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise QuantizationError(
            f"{where} holds {count} of {weight.numel()} values that are NaN or infinite. "
            "Load the checkpoint again, or convert it in a wider dtype (bfloat16 or float32)."
        )
    if bits == 16:
        return weight
    if weight.ndim == 4 and group is not None:
        last = weight.permute(0, 2, 3, 1)
        return fake_quantize(last, bits, group).permute(0, 3, 1, 2).contiguous()
    return fake_quantize(weight.flatten(1), bits, group).reshape(weight.shape)


def group_count(shape: torch.Size, group: int | None) -> int:
    """How many scales :func:`quantize_weight` uses for a weight of this shape.

    >>> group_count(torch.Size((8, 65)), 64), group_count(torch.Size((8, 65, 3, 3)), None)
    (16, 8)
    """
    if group is None:
        return shape[0]
    return shape.numel() // shape[1] * -(-shape[1] // group)


def _grouped(x: Tensor, group: int | None) -> Tensor:
    """(..., width) -> (..., groups, size), padded with zeros, which change no maximum."""
    if not x.is_floating_point():
        raise QuantizationError(f"Only floating point tensors can be quantized, got {x.dtype}.")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise QuantizationError(
            f"The last dimension is what gets grouped and must not be empty, got {tuple(x.shape)}."
        )
    if group is not None and group < 1:
        raise QuantizationError(f"group must be at least 1, or None, got {group!r}.")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    width = x.shape[-1]
    size = width if group is None else min(group, width)
    if width % size:
        wide = torch.nn.functional.pad(wide, (0, size - width % size))
    return wide.reshape(*x.shape[:-1], wide.shape[-1] // size, size)


def _scale(grouped: Tensor, codes: int) -> Tensor:
    absmax = grouped.abs().amax(-1, keepdim=True)
    too_small = absmax < codes * torch.finfo(grouped.dtype).tiny
    return torch.where(too_small, 1.0, absmax / codes)
