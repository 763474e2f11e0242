"""Number formats in code units: which values a few bits can say, whatever they are scaled by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError


def wide(x: Tensor) -> Tensor:
    """At least float32: what rounding computes in.

    >>> wide(torch.ones(1, dtype=torch.float16)).dtype, wide(torch.ones(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Format(Protocol):
    """A finite set of values with codes for them; a grid scales it to the tensor at hand."""

    @property
    def name(self) -> str:
        """What :func:`format_named` calls it."""

    @property
    def bits(self) -> int:
        """Bits per code."""

    @property
    def largest(self) -> float:
        """The largest magnitude, in code units."""

    @property
    def lowest(self) -> float:
        """The smallest value, in code units; 0 for an unsigned format."""

    def round(self, x: Tensor) -> Tensor:
        """The nearest value of the format, saturating; float32 or float64; NaN stays NaN."""

    def encode(self, values: Tensor) -> Tensor:
        """The codes (uint8) of values of the format; any other value is refused."""

    def decode(self, codes: Tensor) -> Tensor:
        """The values (float32) of codes; a code without a finite value is refused."""


class _Tabulated:
    """Codes by table, which every format of at most 8 bits can afford."""

    def _levels(self) -> tuple[float, ...]:
        """The value of every code, NaN for a code without a finite value."""
        raise NotImplementedError

    def _codes(self, values: Tensor) -> Tensor:
        """Codes of values that were checked, any integer dtype."""
        raise NotImplementedError

    def round(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, values: Tensor) -> Tensor:
        """Codes of values of the format, in the lowest bits of a uint8.

        Integers are two's complement, floating point is sign, exponent and mantissa, and a code
        of a codebook is a position in it.

        Raises:
            QuantizationError: a value that the format does not have, or NaN.

        >>> Integer(4).encode(torch.tensor([-1.0, 7.0]))
        tensor([15,  7], dtype=torch.uint8)
        >>> Float(2, 1).encode(torch.tensor([0.5, -6.0]))
        tensor([ 1, 15], dtype=torch.uint8)

        """
        wrong = self.round(values) != values
        if bool(wrong.any()):
            raise QuantizationError(
                f"{int(wrong.sum())} of {values.numel()} values are not values of {self}, "
                f"such as {float(values[wrong][0])}. Round them first."
            )
        return self._codes(values.contiguous()).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes, float32; the inverse of :meth:`encode`.

        Raises:
            QuantizationError: not uint8, a code of more bits, or of an infinity or NaN.

        >>> Float(2, 1).decode(torch.tensor([1, 15], dtype=torch.uint8))
        tensor([ 0.5000, -6.0000])

        """
        if codes.dtype != torch.uint8:
            raise QuantizationError(f"Codes are uint8, got {codes.dtype}.")
        table = torch.full((256,), float("nan"))
        levels = self._levels()
        table[: len(levels)] = torch.tensor(levels)
        found = table.to(codes.device)[codes.long()]
        wrong = found.isnan()
        if bool(wrong.any()):
            raise QuantizationError(
                f"{int(wrong.sum())} of {codes.numel()} codes have no value in {self}, such as "
                f"{int(codes[wrong][0])}. The file is damaged, or is of another format."
            )
        return found


@dataclass(frozen=True)
class Integer(_Tabulated):
    """Whole numbers: -(2^(b-1) - 1) .. 2^(b-1) - 1, or 0 .. 2^b - 1 without a sign.

    Signed is narrow and symmetric: -2^(b-1) is not used, and 2 bits are ternary. There is one
    zero: -0 becomes +0.

    Raises:
        QuantizationError: bits outside 2..8.

    >>> Integer(4).round(torch.tensor([2.5, -9.0, -0.2])), Integer(4, signed=False).largest
    (tensor([ 2., -7.,  0.]), 15.0)

    """

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise QuantizationError(f"An integer format has 2 to 8 bits, got {self.bits!r}.")

    @property
    def name(self) -> str:
        """``int4``, ``uint4``."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def largest(self) -> float:
        """7 for int4, 15 for uint4."""
        return float((1 << (self.bits - self.signed)) - 1)

    @property
    def lowest(self) -> float:
        """-7 for int4, 0 for uint4."""
        return -self.largest if self.signed else 0.0

    def round(self, x: Tensor) -> Tensor:
        """The nearest whole number in range; ties go to the even one.

        Raises:
            QuantizationError: not float32 or float64.

        >>> Integer(2).round(torch.tensor([0.5, 1.5]))
        tensor([0., 1.])

        """
        return _checked(x).round().clamp(self.lowest, self.largest) + 0.0  # -0 + 0 is +0

    def _codes(self, values: Tensor) -> Tensor:
        return values.to(torch.int16) & ((1 << self.bits) - 1)

    def _levels(self) -> tuple[float, ...]:
        top = int(self.largest)
        if not self.signed:
            return tuple(map(float, range(top + 1)))
        return (*map(float, range(top + 1)), float("nan"), *map(float, range(-top, 0)))


# (exponent bits, mantissa bits): the largest finite value. The eight-bit kinds reserve codes for
# NaN (e4m3: one; e5m2: the top exponent, as in IEEE 754); the smaller ones reserve none
# (OCP Microscaling Formats 1.0, section 5.3).
_LARGEST = {(4, 3): 448.0, (5, 2): 57344.0, (2, 3): 7.5, (3, 2): 28.0, (2, 1): 6.0}


@dataclass(frozen=True)
class Float(_Tabulated):
    """A small floating point number: sign, exponent, mantissa, with subnormals, saturating.

    value = (-1)^s 2^(max(e, 1) - bias) (f 2^-m + [e > 0]),  bias = 2^(exponent_bits - 1) - 1.
    Kinds: e4m3 ("fn"), e5m2, e2m3, e3m2, e2m1 (OCP OFP8 1.0 and MX 1.0). Infinities and NaN have
    no code here; a value beyond ``largest`` becomes ``largest``. -0 is a value of its own.

    Raises:
        QuantizationError: another kind.

    >>> Float(2, 1).round(torch.tensor([0.25, 2.5, -100.0]))
    tensor([ 0.,  2., -6.])

    """

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        if (self.exponent_bits, self.mantissa_bits) not in _LARGEST:
            raise QuantizationError(
                f"There is no format e{self.exponent_bits}m{self.mantissa_bits}; there are "
                f"{', '.join(f'e{e}m{m}' for e, m in _LARGEST)}."
            )

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def name(self) -> str:
        """Such as ``fp4_e2m1``."""
        return f"fp{self.bits}_e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def largest(self) -> float:
        """The largest finite value, 448 for e4m3 and 6 for e2m1."""
        return _LARGEST[self.exponent_bits, self.mantissa_bits]

    @property
    def lowest(self) -> float:
        """The smallest finite value, -448 for e4m3."""
        return -self.largest

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal: 1/512 for e4m3."""
        return float(2.0 ** (2 - 2 ** (self.exponent_bits - 1) - self.mantissa_bits))

    def round(self, x: Tensor) -> Tensor:
        """The nearest value of the format; ties go to the even mantissa.

        Raises:
            QuantizationError: not float32 or float64.

        >>> Float(4, 3).round(torch.tensor([1.0625, 1e9, 1e-9]))
        tensor([  1., 448.,   0.])

        """
        # Saturating first gives the same values, and keeps the powers of two in range.
        inside = _checked(x).clamp(self.lowest, self.largest)
        step = power_of_two_below(inside) * 2.0**-self.mantissa_bits
        step = step.clamp_(min=self.smallest)
        return (inside / step).round_().mul_(step)  # exact but for the rounding itself

    def _codes(self, values: Tensor) -> Tensor:
        # Without the sign, codes count the values in rising order.
        positive = [v for v in self._levels()[: 1 << (self.bits - 1)] if v <= self.largest]
        table = torch.tensor(positive, dtype=values.dtype, device=values.device)
        sign = torch.signbit(values).long() << (self.bits - 1)
        return torch.searchsorted(table, values.abs()) + sign

    def _levels(self) -> tuple[float, ...]:
        return _float_levels(self)


@dataclass(frozen=True)
class Codebook(_Tabulated):
    """A list of values in rising order; a code is a position in it.

    ``levels`` are kept as float32. A tie goes to the lower level, as in bitsandbytes.

    Raises:
        QuantizationError: fewer than 2 or more than 256 levels, or not rising.

    >>> Codebook("ternary", (-1.0, 0.0, 1.0)).round(torch.tensor([0.4, 0.6, 7.0]))
    tensor([0., 1., 1.])

    """

    name: str
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        levels = tuple(torch.tensor(self.levels, dtype=torch.float32).tolist())
        if not 2 <= len(levels) <= 256 or not all(a < b for a, b in pairwise(levels)):
            raise QuantizationError(
                f"The codebook {self.name!r} needs 2 to 256 levels in rising order (as float32), "
                f"got {levels}."
            )
        object.__setattr__(self, "levels", levels)

    @property
    def bits(self) -> int:
        """Bits that count the levels."""
        return (len(self.levels) - 1).bit_length()

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.levels[0]), abs(self.levels[-1]))

    @property
    def lowest(self) -> float:
        """The first level."""
        return self.levels[0]

    def round(self, x: Tensor) -> Tensor:
        """The nearest level.

        Raises:
            QuantizationError: not float32 or float64.

        >>> NF4.round(torch.tensor([0.95, -3.0]))
        tensor([ 1., -1.])

        """
        table = torch.tensor(self.levels, dtype=_checked(x).dtype, device=x.device)
        nearest = torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2)
        return torch.where(x.isnan(), x, table[nearest])

    def _codes(self, values: Tensor) -> Tensor:
        table = torch.tensor(self.levels, dtype=values.dtype, device=values.device)
        return torch.searchsorted(table, values)

    def _levels(self) -> tuple[float, ...]:
        return self.levels


def power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above ``|x|``; 0 where ``x`` is 0 or subnormal.

    2^floor(log2 |x|), exactly, by keeping the exponent bits; a logarithm rounds wrongly near
    powers of two.

    Args:
        x: float32 or float64, finite.

    Returns:
        Same shape and dtype.

    >>> power_of_two_below(torch.tensor([6.0, -0.3, 0.0]))
    tensor([4.0000, 0.2500, 0.0000])

    """
    if x.dtype == torch.float64:
        return (x.contiguous().view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)


def _normal_float_levels() -> tuple[float, ...]:
    """The 16 levels of QLoRA's NormalFloat: quantiles of N(0, 1), with an exact 0, within [-1, 1].

    Eight positive and seven negative quantiles evenly spaced in probability from 1/2 to
    1 - (1/32 + 1/30)/2, divided by the largest. QLoRA (arXiv:2305.14314) equation 4 averages
    quantiles at multiples of 1/17 and has no zero; its appendix E lists these values instead,
    which are those of bitsandbytes' ``create_normal_map``, so this follows the code.
    """
    top = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (top - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (top - 0.5) * i / 7) for i in range(7, 0, -1)]
    return tuple(v / positive[-1] for v in (*negative, 0.0, *positive))


NF4 = Codebook("nf4", _normal_float_levels())

_FORMATS: dict[str, Format] = {NF4.name: NF4}
_FORMATS |= {kind.name: kind for kind in (Float(e, m) for e, m in _LARGEST)}


def format_named(text: str) -> Format:
    """The format of this name.

    Raises:
        QuantizationError: no such format; the message lists those that there are.

    >>> format_named("uint8"), format_named("fp4_e2m1")
    (Integer(bits=8, signed=False), Float(exponent_bits=2, mantissa_bits=1))

    """
    if re.fullmatch("u?int[2-8]", text):
        return Integer(int(text[-1]), signed=text[0] != "u")
    if text not in _FORMATS:
        raise QuantizationError(
            f"There is no number format {text!r}; there are int2 to int8, uint2 to uint8, "
            f"{', '.join(_FORMATS)}."
        )
    return _FORMATS[text]


def _checked(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        raise QuantizationError(
            f"Rounding works on float32 or float64, got {x.dtype}. Convert with .float() first."
        )
    return x


@cache
def _float_levels(kind: Float) -> tuple[float, ...]:
    normal = 1 << kind.mantissa_bits  # the first code with an implicit one
    positive = []
    for code in range(1 << (kind.bits - 1)):
        exponent, fraction = divmod(code, normal)
        whole = fraction if exponent == 0 else (normal + fraction) << (exponent - 1)
        value = whole * kind.smallest
        positive.append(value if value <= kind.largest else float("nan"))
    return (*positive, *(-v for v in positive))
