"""A tensor laid on a grid: the scales that fit it, its codes, and the values that these stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, cast

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import Float, power_of_two_below, wide
from evenkeel.quantizers.numbers.grids import Grid

SHRINK_FACTORS = tuple((100 - i) / 100 for i in range(80))  # Q-Diffusion: 1.00 .. 0.21
CLIPS = (0.999, 0.9999, 0.99999)  # PTQ4DiT
_E4M3 = Float(4, 3)


@dataclass(frozen=True)
class Scales:
    """What turns codes into values: value = scale (code - zero).

    ``scale``: x.shape[:-1] + (groups,), or (1, ..., 1) per tensor; float32 (float64 for float64
    ``x``), positive, in the units of ``x``. ``zero``: the same shape and dtype, whole numbers
    0 .. 2^b - 1; None without zero points. ``unit``: for scales stored in fp8_e4m3 the float32
    number they are relative to (scale / unit is a value of e4m3), else None.
    """

    scale: Tensor
    zero: Tensor | None = None
    unit: Tensor | None = None


def fit(x: Tensor, grid: Grid, where: str = "the tensor", *, unit: Tensor | None = None) -> Scales:
    """Scales (and zero points) for one tensor.

    absmax:     scale = max|x| / largest;  with a zero point scale = (max - min) / (2^b - 1) over
                the range widened to contain 0, zero = round(-min / scale).
    mse:        the range times f = 1.00, 0.99, ..., 0.21, whichever has the least
                sum |x - Q(x)|^exponent in its group (Q-Diffusion, arXiv:2302.04304). Its released
                code searches a symmetric grid with other code limits than it then uses; here
                search and use are one function.
    percentile: the range from the 0.999, 0.9999 or 0.99999 quantile, by squared error (PTQ4DiT,
                arXiv:2405.16005, released code).
    e8m0:       2^(floor(log2 max|x|) - emax), emax = floor(log2 largest) (OCP MX 1.0, 6.3).
    fp8_e4m3:   unit = max|x| of the tensor / (448 largest), scale = unit e4m3(max|x| / largest / unit),
                at least unit 2^-9.
    A zero group has scale 1 (``unit`` for fp8_e4m3), and so has one whose step would be subnormal.
    An unsigned format without zero point takes its range from the positive values.

    Args:
        x: (..., width), floating point. The last group is smaller where ``group`` does not divide
            the width.
        grid: what to fit.
        where: how to call this tensor in an error.
        unit: for fp8_e4m3 scales, the unit of the tensor that ``x`` is a part of.

    Raises:
        QuantizationError: NaN or infinity, not floating point, or empty.

    >>> fit(torch.tensor([[7.0, -3.0, 0.0, 0.0, 14.0]]), Grid.parse("int4-g2")).scale
    tensor([[1., 1., 2.]])

    """
    _check(x, where)
    whole = wide(x.detach())
    if grid.scale == "fp8_e4m3" and unit is None:
        unit = whole.abs().amax() / (_E4M3.largest * grid.format.largest)
        unit = torch.where(unit < torch.finfo(unit.dtype).tiny / _E4M3.smallest, 1.0, unit)
    fitted = [_fit_rows(rows, grid, unit) for rows in _rows(whole, grid)]
    scale = torch.cat([s for s, _ in fitted], -2).squeeze(-1)
    zeros = [z for _, z in fitted if z is not None]
    zero = torch.cat(zeros, -2).squeeze(-1) if zeros else None
    if grid.per_tensor:
        one = (1,) * x.ndim
        return Scales(scale.reshape(one), None if zero is None else zero.reshape(one), unit)
    return Scales(scale, zero, unit)


def to_codes_space(x: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """Values in code units, x / scale + zero, before rounding and clamping.

    Raises:
        QuantizationError: shapes that do not belong together.

    >>> to_codes_space(torch.tensor([3.5, 1.3]), Grid.parse("int4"), Scales(torch.tensor([0.5])))
    tensor([7.0000, 2.6000])

    """
    scale, zero = spread(scales, grid, x.shape)
    units = wide(x) / scale
    return units if zero is None else units + zero


def snap(x: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """The nearest value of the grid: scale (clamp(round(x / scale) + zero) - zero).

    Any ``x`` of the shape that ``scales`` were fitted for, also outside their range, where it
    saturates. Values are not inspected, because this runs on every activation; NaN stays NaN.

    Returns:
        Same shape; float32 (float64 for float64 ``x``).

    Raises:
        QuantizationError: shapes that do not belong together.

    >>> grid = Grid.parse("uint2-zero")
    >>> x = torch.tensor([-1.0, 0.2, 0.9, 2.0])
    >>> snap(x, grid, fit(x, grid))
    tensor([-1.,  0.,  1.,  2.])

    """
    scale, zero = spread(scales, grid, x.shape)
    return _values(_round(wide(x), grid, scale, zero), scale, zero)


def codes_of(values: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """Codes (uint8) of the nearest values of the grid.

    The code of a value that was since rounded to bfloat16 or float16 is found again, for normal
    numbers of that dtype. The exception is uint8 in bfloat16, which cannot tell all of its codes
    apart; also there the value of the code found rounds to the same bfloat16 number.

    Raises:
        QuantizationError: NaN, or shapes that do not belong together.

    >>> grid = Grid.parse("int4")
    >>> codes_of(torch.tensor([7.0, -1.0]), grid, Scales(torch.tensor([1.0])))
    tensor([ 7, 15], dtype=torch.uint8)

    """
    scale, zero = spread(scales, grid, values.shape)
    return grid.format.encode(_round(wide(values), grid, scale, zero))


def values_of(codes: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """The values of codes: exactly what :func:`snap` returned.

    Raises:
        QuantizationError: a code that the format does not have, or shapes that do not match.

    >>> grid = Grid.parse("int4")
    >>> values_of(torch.tensor([7, 15], dtype=torch.uint8), grid, Scales(torch.tensor([0.5])))
    tensor([ 3.5000, -0.5000])

    """
    scale, zero = spread(scales, grid, codes.shape)
    return _values(grid.format.decode(codes).to(scale.dtype), scale, zero)


def spread(scales: Scales, grid: Grid, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Scale and zero per value, so that they broadcast over a tensor of this shape.

    Raises:
        QuantizationError: the scales are not those of a tensor of this shape on this grid.

    >>> spread(Scales(torch.tensor([1.0, 2.0])), Grid.parse("int4-g2"), torch.Size([3]))[0]
    tensor([1., 1., 2.])

    """
    width = shape[-1] if shape else 0
    size = width if grid.per_tensor else min(grid.group or width, width)
    groups = -(-width // max(size, 1))
    expected = (1,) * len(shape) if grid.per_tensor else (*shape[:-1], groups)
    if tuple(scales.scale.shape) != expected or (scales.zero is None) == grid.zero_point:
        _refuse(
            f"the grid {grid} lays a tensor of shape {tuple(shape)} on scales of shape {expected} "
            f"{'with' if grid.zero_point else 'without'} zero points, got shape "
            f"{tuple(scales.scale.shape)} {'without' if scales.zero is None else 'with'}"
        )
    both = (scales.scale, scales.zero)
    if groups == 1:
        return both
    scale, zero = (t if t is None else t.repeat_interleave(size, -1)[..., :width] for t in both)
    return cast(Tensor, scale), zero


def last(weight: Tensor, grid: Grid) -> Tensor:
    """Bring what shares a scale to the last dimension of a weight.

    (out, in, h, w) -> (out, h, w, in) with groups, so that every kernel position has its own;
    (out, in h w) without, one scale per output channel. A matrix stays.

    >>> w = torch.zeros(8, 6, 3, 3)
    >>> last(w, Grid.parse("int4-g2")).shape, last(w, Grid.parse("int4")).shape
    (torch.Size([8, 3, 3, 6]), torch.Size([8, 54]))
    """
    return weight.flatten(1) if grid.group is None else weight.movedim(1, -1).contiguous()


def unlast(x: Tensor, shape: torch.Size, grid: Grid) -> Tensor:
    """The inverse of :func:`last` for a weight of this shape.

    The strides of a 1 x 1 filter can be in two orders that both count as contiguous, and a
    convolution may sum in another order for each: here they follow from shape and grid alone, so a
    layer that was read from a file computes what the written one did.

    >>> w, grid = torch.rand(8, 6, 3, 3), Grid.parse("int4-g2")
    >>> torch.equal(unlast(last(w, grid), w.shape, grid), w)
    True
    """
    if grid.group is None or len(shape) == 2:
        return x.reshape(shape)
    if shape[1] % min(grid.group, shape[1]):
        return torch.empty(shape, dtype=x.dtype, device=x.device).copy_(x.movedim(-1, 1))
    return x.movedim(-1, 1).contiguous()


def snap_weight(weight: Tensor, grid: Grid, where: str = "the weight") -> tuple[Tensor, Scales]:
    """Round a weight to the nearest, with scales fitted to it.

    Args:
        weight: (out, in), or (out, in, height, width) for a convolution.
        grid: what to round to.
        where: how to call this tensor in an error.

    Returns:
        The values in the weight's shape, float32 (float64 for a float64 weight), and the scales
        of ``last(weight, grid)``.

    Raises:
        QuantizationError: what :func:`fit` refuses.

    >>> snap_weight(torch.tensor([[3.0, 1.4]]), Grid.parse("int3"))[0]
    tensor([[3., 1.]])

    """
    x = last(weight.detach(), grid)
    scales = fit(x, grid, where)
    return unlast(snap(x, grid, scales), weight.shape, grid), scales


def _rows(x: Tensor, grid: Grid) -> Iterator[Tensor]:
    """The groups as (..., groups, size): those of full size, then a smaller last one."""
    if grid.per_tensor:
        yield x.reshape(1, 1, -1)
        return
    width = x.shape[-1]
    size = min(grid.group or width, width)
    whole = width // size * size
    yield x[..., :whole].reshape(*x.shape[:-1], -1, size)
    if whole < width:
        yield x[..., None, whole:]


def _fit_rows(rows: Tensor, grid: Grid, unit: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero, each (..., groups, 1), of rows (..., groups, size)."""
    candidates = _ranges(rows, grid)
    scale, zero = _scale(*next(candidates), grid, unit)
    if grid.range == "absmax":
        return scale, zero
    step = scale  # errors in the first candidate's steps neither overflow nor underflow
    least = _error(rows, grid, scale, zero, step)
    for low, high in candidates:
        other, shift = _scale(low, high, grid, unit)
        error = _error(rows, grid, other, shift, step)
        better = error < least
        scale, least = torch.where(better, other, scale), torch.where(better, error, least)
        zero = None if zero is None or shift is None else torch.where(better, shift, zero)
    return scale, zero


def _ranges(rows: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates for what the lowest and the highest code stand for; (0, size) if symmetric."""
    x = rows if grid.format.lowest == 0 else rows.abs()
    if grid.range == "percentile":
        x = x.sort(-1).values
        for clip in CLIPS:
            low = _quantile(x, 1 - clip) if grid.zero_point else torch.zeros(())
            yield low.clamp(max=0).to(x), _quantile(x, clip).clamp(min=0)
        return
    high = x.amax(-1, keepdim=True).clamp(min=0)
    low = x.amin(-1, keepdim=True).clamp(max=0) if grid.zero_point else torch.zeros_like(high)
    for factor in SHRINK_FACTORS if grid.range == "mse" else (1.0,):
        yield low * factor, high * factor


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Linear interpolation, as torch.quantile, which refuses more than 2^24 values."""
    position = q * (ordered.shape[-1] - 1)
    below = int(position)
    above = min(below + 1, ordered.shape[-1] - 1)
    first, second = ordered[..., below, None], ordered[..., above, None]
    return torch.lerp(first, second, position - below)


def _scale(
    low: Tensor, high: Tensor, grid: Grid, unit: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    largest = grid.format.largest
    scale = high / largest - low / largest  # divided first: the difference could overflow
    empty = scale < torch.finfo(scale.dtype).tiny
    if unit is not None:
        relative = _E4M3.round(scale / unit).clamp(min=_E4M3.smallest)
        return torch.where(empty, 1.0, relative) * unit, None
    if grid.scale == "e8m0":
        emax = power_of_two_below(torch.tensor(largest)).item()
        scale = power_of_two_below(high) / emax
        empty = scale < torch.finfo(scale.dtype).tiny
    scale = torch.where(empty, 1.0, scale)
    return scale, (-low / scale).round() + 0.0 if grid.zero_point else None


def _error(rows: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None, step: Tensor) -> Tensor:
    found = _values(_round(rows, grid, scale, zero), scale, zero)
    return ((found - rows) / step).abs().pow(grid.exponent).sum(-1, keepdim=True)


def _round(x: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None) -> Tensor:
    """To values of the format. Rounds before it shifts, or ties would depend on the zero."""
    return grid.format.round(x / scale if zero is None else (x / scale).round() + zero)


def _values(rounded: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return rounded * scale if zero is None else (rounded - zero) * scale


def _check(x: Tensor, where: str) -> None:
    if not x.is_floating_point() or x.ndim == 0 or x.numel() == 0:
        _refuse(f"{where} must be floating point and not empty, got {tuple(x.shape)} of {x.dtype}")
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        _refuse(
            f"{where} holds {bad} of {x.numel()} values that are NaN or infinite. Load the "
            "checkpoint again, or run it in a wider dtype (bfloat16 or float32)"
        )


def _refuse(message: str) -> NoReturn:
    raise QuantizationError(f"{message[0].upper()}{message[1:]}.")
