"""What a post-training quantization method is: a frozen configuration that works on a workspace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from evenkeel.errors import QuantizationError

if TYPE_CHECKING:
    from typing_extensions import Self

    from evenkeel.quantizers.workspace.workspace import Workspace

_BITS = re.compile(r"w(\d+)a(\d+)", re.ASCII)


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses whose defaults are the paper's.

    Attributes:
        name: as the literature writes it, in lower case.

    """

    name: ClassVar[str]

    weight_bits: int
    activation_bits: int

    @property
    def calibrated(self) -> bool:
        """False if the method needs no denoiser calls to calibrate on."""
        return True

    @classmethod
    def of_bits(cls, text: str, **options: Any) -> Self:
        """From the short form ``w4a8``, with other fields as keywords.

        Raises:
            QuantizationError: not of that form, an unknown field, or a value out of range.

        """
        found = _BITS.fullmatch(text)
        if found is None:
            raise QuantizationError(
                f"bits are written w<weights>a<activations>, for example w4a8; got {text!r}."
            )
        weight, activation = map(int, found.groups())
        return cls.from_dict({"weight_bits": weight, "activation_bits": activation, **options})

    def as_dict(self) -> dict[str, Any]:
        """Every field, and ``method``, in types that JSON knows."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"method": self.name, **{k: _plain(v) for k, v in own.items()}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_dict`; fields left out have their defaults.

        Raises:
            QuantizationError: an unknown field, or a value out of range.

        """
        known = [f.name for f in fields(cls)]
        given = {k: v for k, v in found.items() if k != "method"}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise QuantizationError(
                f"{cls.name} has no option {', '.join(unknown)}; it has {', '.join(known)}."
            )
        return cls(**{k: _frozen(v) for k, v in given.items()})

    def __str__(self) -> str:
        bits = ("weight_bits", "activation_bits")
        changed = [
            f"-{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in bits and getattr(self, f.name) != f.default
        ]
        return f"{self.name}-w{self.weight_bits}a{self.activation_bits}{''.join(changed)}"

    def quantize(self, workspace: Workspace) -> None:
        """Decide about every layer of the workspace: replace it, or keep it for a reason."""
        raise NotImplementedError


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    return value


def check_bits(name: str, bits: object, least: int = 2) -> None:
    """Raise unless ``bits`` is an integer from ``least`` to 8, or 16 for not quantized."""
    if type(bits) is not int or not (least <= bits <= 8 or bits == 16):
        raise QuantizationError(
            f"{name} must be an integer from {least} to 8, or 16 for not quantized, got {bits!r}."
        )
