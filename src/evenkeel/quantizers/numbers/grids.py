"""How a tensor is laid on a number format: which values share a scale, and how it is chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import (
    Format,
    Integer,
    format_named,
)

Range = Literal["absmax", "mse", "percentile"]
ScaleFormat = Literal["float32", "fp8_e4m3", "e8m0"]


_ALIASES = {"nvfp4": "fp4_e2m1-g16-scale_fp8_e4m3", "mxfp4": "fp4_e2m1-g32-scale_e8m0"}
_GRAMMAR = (
    "<format>[-g<size>|-tensor][-zero][-mse[<exponent>]|-percentile][-scale_fp8_e4m3|-scale_e8m0], "
    "for example int4-g64, uint8-tensor-zero-mse2.4, nf4-g64, or nvfp4, mxfp4"
)
_TEXT = re.compile(
    r"([a-z0-9_]+)(?:-(?:g(\d+)|(tensor)))?(-zero)?(?:-(?:(mse)(\d+(?:\.\d+)?)?|(percentile)))?"
    r"(?:-scale_(fp8_e4m3|e8m0))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Grid:
    """A number format, which values share a scale, and how the scale is chosen and stored.

    ``group``: values of the last dimension per scale; None is all of them. ``per_tensor``: one
    scale for everything. ``zero_point``: codes 0 .. 2^b - 1 shifted by a whole number, integer
    formats only; a signed format stands for the unsigned one of as many bits. ``range``: what the
    largest code stands for: the largest magnitude (for ``zero_point``, minimum and maximum), the
    shrunk range of least sum |x - Q(x)|^``exponent``, or the best of three percentiles by squared
    error. ``scale``: how scales are stored; ``fp8_e4m3`` relative to one float32 number per
    tensor (NVFP4), ``e8m0`` as powers of two (OCP MX).

    Raises:
        QuantizationError: a field outside its range, or fields that do not go together.

    >>> str(Grid(Integer(4), group=64)), Grid.parse("mxfp4").scale
    ('int4-g64', 'e8m0')

    """

    format: Format
    group: int | None = None
    per_tensor: bool = False
    zero_point: bool = False
    range: Range = "absmax"
    exponent: float = 2.0
    scale: ScaleFormat = "float32"

    def __post_init__(self) -> None:
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            _refuse(f"group must be an integer of at least 1, or None, got {self.group!r}")
        if self.group is not None and self.per_tensor:
            _refuse(f"per_tensor means one scale, but there is also a group of {self.group}")
        if self.range not in ("absmax", "mse", "percentile"):
            _refuse(f"range must be 'absmax', 'mse' or 'percentile', got {self.range!r}")
        if not self.exponent > 0 or (self.range != "mse" and self.exponent != 2.0):
            _refuse(f"exponent is a positive number for range 'mse' only, got {self.exponent!r}")
        if self.scale not in ("float32", "fp8_e4m3", "e8m0"):
            _refuse(f"scale must be 'float32', 'fp8_e4m3' or 'e8m0', got {self.scale!r}")
        if self.zero_point and self.scale != "float32":
            _refuse(f"a grid with a zero point has float32 scales, got {self.scale!r}")
        if self.zero_point and not isinstance(self.format, Integer):
            _refuse(f"a zero point needs an integer format, got {self.format.name}")
        if self.zero_point:  # one spelling, so that equal grids are equal
            object.__setattr__(self, "format", Integer(self.format.bits, signed=False))

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read the text form; what it leaves out has the default value.

        Raises:
            QuantizationError: not of the grammar (which the message shows), or out of range.

        >>> Grid.parse("uint8-zero-mse2.4").exponent
        2.4

        """
        found = _TEXT.fullmatch(_ALIASES.get(text, text))
        if found is None:
            _refuse(f"{text!r} is not a grid; the grammar is {_GRAMMAR}")
        name, group, tensor, zero, mse, exponent, percentile, scale = found.groups()
        return cls(
            format=format_named(name),
            group=int(group) if group else None,
            per_tensor=bool(tensor),
            zero_point=bool(zero),
            range=cast(Range, mse or percentile or "absmax"),
            exponent=float(exponent or 2.0),
            scale=cast(ScaleFormat, scale or "float32"),
        )

    def __str__(self) -> str:
        layout = "-tensor" if self.per_tensor else f"-g{self.group}" if self.group else ""
        exponent = f"{self.exponent:g}" if self.exponent != 2.0 else ""
        search = "" if self.range == "absmax" else f"-{self.range}{exponent}"
        stored = "" if self.scale == "float32" else f"-scale_{self.scale}"
        return f"{self.format.name}{layout}{'-zero' * self.zero_point}{search}{stored}"

    def as_dict(self) -> dict[str, Any]:
        """Every field in types that JSON knows, the format by name.

        Raises:
            QuantizationError: the format has no name to find it by again.

        >>> Grid.from_dict(Grid(Integer(4)).as_dict()) == Grid(Integer(4))
        True

        """
        if format_named(self.format.name) != self.format:
            _refuse(f"only named formats can be written, and {self.format.name} is another one")
        return {
            **{k: getattr(self, k) for k in self.__dataclass_fields__},
            "format": self.format.name,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Grid:
        """The inverse of :meth:`as_dict`.

        Raises:
            QuantizationError: a field is missing, unknown, or out of range.

        """
        expected, found = set(cls.__dataclass_fields__), set(fields)
        if expected != found:
            _refuse(
                f"a grid has exactly the fields {sorted(expected)}; missing "
                f"{sorted(expected - found)}, unknown {sorted(found - expected)}"
            )
        return cls(**{**fields, "format": format_named(fields["format"])})


NVFP4, MXFP4 = Grid.parse("nvfp4"), Grid.parse("mxfp4")


def _refuse(message: str) -> NoReturn:
    raise QuantizationError(f"{message[0].upper()}{message[1:]}.")
