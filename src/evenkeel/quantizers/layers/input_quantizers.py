"""What enters a quantized layer, rounded: on scales of its own, or on scales fixed beforehand.

Both work on the last dimension as features, so a convolution hands its channels over last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.timed_inputs import TimedInput
from evenkeel.quantizers.numbers.formats import Format, Integer, format_named, wide


class DynamicInput(nn.Module):
    """Every group of features (or token) is rounded on the scale of its own largest value.

    Signed: x_q = s round(x / s), s = max|x| / largest, where ``largest`` is the format's.
    Unsigned, with ``shift`` d (one number, or one per feature): x_q = s round((x + d) / s) - d,
    s = max(x + d) / (2^b - 1), negative x + d clipped to zero (SVDQuant, arXiv:2411.05007, for
    inputs that an activation function bounds below). Its authors fold -W d into the bias; taking d
    off the rounded input is the same sum and leaves no error of its own.
    With ``zero_point``: s = (max - min) / (2^b - 1), min and max widened to contain zero.
    Values are not checked; NaN spreads over its group.

    Args:
        format: an element of :mod:`evenkeel.quantizers.numbers.formats`.
        group: features per scale; None is all features of a token.
        zero_point: asymmetric codes; the format must be an unsigned integer.
        shift: added before rounding and taken off after it, one number or (features,); the format
            must be an unsigned integer.
        across_batch: one scale for the same token of every sample, as ViDiT-Q's released code has
            it. The result then depends on what else is in the batch.

    Raises:
        QuantizationError: options that do not go together.

    >>> DynamicInput(Integer(4))(torch.tensor([[7.0, 2.6], [0.7, 0.26]]))
    tensor([[7.0000, 3.0000],
            [0.7000, 0.3000]])

    """

    shift: float | Tensor

    def __init__(
        self,
        format: Format,
        group: int | None = None,
        *,
        zero_point: bool = False,
        shift: float | Tensor = 0.0,
        across_batch: bool = False,
    ) -> None:
        super().__init__()
        shifted = isinstance(shift, Tensor) or shift != 0
        if (zero_point or shifted) and not (isinstance(format, Integer) and not format.signed):
            raise QuantizationError(
                f"zero_point={zero_point}, shift={shift}: both need an unsigned integer format, "
                f"got {format.name}."
            )
        if zero_point and shifted:
            raise QuantizationError(
                f"A zero point shifts by itself; give zero_point or shift={shift}, not both."
            )
        if group is not None and group < 1:
            raise QuantizationError(f"group must be at least 1, or None, got {group!r}.")
        self.format, self.group, self.zero_point = format, group, zero_point
        self.across_batch = across_batch
        if isinstance(shift, Tensor):
            self.register_buffer("shift", shift.detach().clone())
        else:
            self.shift = float(shift)

    @property
    def bits(self) -> int:
        """Of one value."""
        return self.format.bits

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> the same shape and dtype."""
        plain = isinstance(self.format, Integer) and self.format.signed
        if plain and not self.across_batch:
            return fake_quantize(x, self.format.bits, self.group)
        width = x.shape[-1]
        size = min(self.group or width, width)
        # Padding with zeros changes no scale: every range below contains zero.
        rows = nn.functional.pad(wide(x) + self.shift, (0, -width % size))
        rows = rows.reshape(*x.shape[:-1], -1, size)
        low, high = self._range(rows)
        if self.zero_point:
            scale = _safe((high - low) / self.format.largest)
            zero = (-low / scale).round_()
            rounded = ((rows / scale).round_() + zero).clamp_(0, self.format.largest)
            rounded = (rounded - zero) * scale
        else:
            scale = _safe(torch.maximum(high, -low) / self.format.largest)
            rounded = self.format.round(rows / scale) * scale
        result: Tensor = rounded.flatten(-2)[..., :width] - self.shift
        return result.to(x.dtype)

    def _range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        dims = [0, -1] if self.across_batch and rows.ndim > 3 else [-1]
        low = rows.amin(dims, keepdim=True).clamp_(max=0)
        high = rows.amax(dims, keepdim=True).clamp_(min=0)
        return (low if self.format.lowest < 0 or self.zero_point else torch.zeros_like(low)), high

    def as_dict(self) -> dict[str, Any]:
        """In types that JSON knows; :func:`input_from` is the inverse."""
        return {
            "kind": "dynamic",
            "format": self.format.name,
            "group": self.group,
            "zero_point": self.zero_point,
            "shift": None if isinstance(self.shift, Tensor) else self.shift,
            "across_batch": self.across_batch,
        }

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        each = isinstance(self.shift, Tensor)
        shift = "+shift" if each else f"+{self.shift}" if self.shift else ""
        marks = ("zero_point" if self.zero_point else "", shift)
        return ", ".join(filter(None, (f"{self.format.name}/{self.group or 'token'}", *marks)))


class StaticInput(nn.Module):
    """All values are rounded on one scale, fixed beforehand; what lies outside is clipped.

    x_q = (clip(round(x / s) + z, 0, 2^b - 1) - z) s. With ``split`` k the features before k and from
    k on have scales of their own: the two halves of a concatenated skip connection (Q-Diffusion,
    arXiv:2302.04304, Eq. 7).

    Args:
        bits: 2 to 8.
        scale: (1,), or (2,) with a split; positive, float32.
        zero: codes of zero, same shape.
        split: first feature of the second half, or None.

    Raises:
        QuantizationError: a scale that is not positive and finite, or shapes that do not fit.

    >>> StaticInput(4, torch.tensor([0.5]), torch.tensor([8.0]))(torch.tensor([1.2, -9.0]))
    tensor([ 1., -4.])

    """

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, scale: Tensor, zero: Tensor, split: int | None = None) -> None:
        super().__init__()
        expected = (1,) if split is None else (2,)
        if tuple(scale.shape) != expected or tuple(zero.shape) != expected:
            raise QuantizationError(
                f"expected scale and zero of shape {expected} with split={split}, got "
                f"{tuple(scale.shape)} and {tuple(zero.shape)}."
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise QuantizationError(f"scales must be positive and finite, got {scale.tolist()}.")
        self.format = Integer(bits, signed=False)
        self.split = split
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @property
    def bits(self) -> int:
        """Of one value."""
        return self.format.bits

    @property
    def group(self) -> None:
        """There is none; the scales do not depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> the same shape and dtype."""
        units = wide(x)
        scale, zero = self.scale.to(units), self.zero.to(units)
        if self.split is not None:
            counts = torch.tensor([self.split, x.shape[-1] - self.split], device=x.device)
            scale, zero = scale.repeat_interleave(counts), zero.repeat_interleave(counts)
        codes = ((units / scale).round_() + zero).clamp_(0, self.format.largest)
        return ((codes - zero) * scale).to(x.dtype)

    def as_dict(self) -> dict[str, Any]:
        """In types that JSON knows; :func:`input_from` is the inverse, given the tensors."""
        return {"kind": "static", "bits": self.bits, "split": self.split}

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        return f"{self.format.name}, static" + (f", split={self.split}" if self.split else "")


Input = DynamicInput | StaticInput | TimedInput


def fake_quantize(x: Tensor, bits: int, group: int | None) -> Tensor:
    """Round every value to the nearest of its group's ``2**bits - 1`` levels.

    x_q = scale * round(x / scale),  scale = max|x| / (2^(b - 1) - 1) per group; ties go to the even code.

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
    largest = Integer(bits).largest
    grouped = _grouped(x, group)
    absmax = grouped.abs().amax(-1, keepdim=True)
    empty = absmax < largest * torch.finfo(grouped.dtype).tiny
    scale = torch.where(empty, 1.0, absmax / largest)
    return (grouped / scale).round_().mul_(scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def input_from(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Input:
    """The inverse of ``as_dict``.

    Args:
        found: what ``as_dict`` gave.
        tensors: by name, ``scale`` and ``zero`` of a static or timed one.

    Raises:
        QuantizationError: no such kind, or fields or tensors that are missing or unknown.

    >>> input_from(DynamicInput(Integer(4), 64).as_dict(), {})
    DynamicInput(int4/64)

    """
    fields = dict(found)
    kind = fields.pop("kind", None)
    try:
        if kind == "dynamic":
            if fields["shift"] is None:
                fields["shift"] = tensors["shift"]
            return DynamicInput(format_named(fields.pop("format")), **fields)
        if kind == "static":
            return StaticInput(scale=tensors["scale"], zero=tensors["zero"], **fields)
        if kind == "timed":
            return TimedInput(scale=tensors["scale"], zero=tensors["zero"], **fields)
    except (KeyError, TypeError) as error:
        raise QuantizationError(
            f"{dict(found)} does not describe the rounding of an input: {error}."
        ) from error
    raise QuantizationError(
        f"an input is rounded by a kind 'dynamic', 'static' or 'timed', found {kind!r}."
    )


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
    width = x.shape[-1]
    size = width if group is None else min(group, width)
    padded = torch.nn.functional.pad(wide(x), (0, -width % size))
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // size, size)


def _safe(scale: Tensor) -> Tensor:
    """One where nothing is to be scaled, as in :func:`evenkeel.quantizers.numbers.scales.fit`."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
