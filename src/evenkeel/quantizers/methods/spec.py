"""Plain rounding said in one word: ``w3a4-g32-r16``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.patterns import DEFAULT_SKIP
from evenkeel.quantizers.layers.quantized_layers import Quantized
from evenkeel.quantizers.methods.base import check_bits
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.workspace.workspace import Workspace

Activation = Literal["group", "token"]

GRAMMAR = (
    "w<2..8|16>a<4..8|16>[-g<size>|-gnone][-r<rank>][-token], "
    "for example w4a8, w3a4-g32-r16, w4a8-gnone-token"
)
_TEXT = re.compile(r"w(\d+)a(\d+)(?:-g(\d+|none))?(?:-r(\d+))?(-token)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class QuantizerSpec:
    """The text form of :class:`RoundToNearest`: bits, groups, rank, and in which layers.

    ``weight_bits``: 2 to 8, or 16 for not quantized. ``activation_bits``: 4 to 8, or 16.
    ``group``: values along the input features that share a scale; None is one scale per output
    channel for weights and one per token for activations. ``rank``: width of the 16-bit branch
    that carries the best low-rank part of every linear weight. ``activation``: ``"group"`` shares
    ``group`` with the weights, ``"token"`` is one scale per token (per pixel). ``skip`` and
    ``only``: patterns of :func:`first_match`; skip wins. They are not in the text form.

    Raises:
        QuantizationError: a field outside its range, or a rank without quantized weights.

    >>> QuantizerSpec.parse("w3a4-g32-r16")  # doctest: +ELLIPSIS
    QuantizerSpec(weight_bits=3, activation_bits=4, group=32, rank=16, activation='group', ...
    >>> str(QuantizerSpec(4, 8, group=None, activation="token"))
    'w4a8-gnone-token'

    """

    weight_bits: int
    activation_bits: int = 16
    group: int | None = 64
    rank: int = 0
    activation: Activation = "group"
    skip: tuple[str, ...] = DEFAULT_SKIP
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits, 4)
        if self.group is not None and (type(self.group) is not int or self.group < 2):
            raise QuantizationError(
                f"group must be an integer of at least 2, or None, got {self.group!r}."
            )
        if self.activation not in ("group", "token"):
            raise QuantizationError(
                f"activation must be 'group' or 'token', got {self.activation!r}."
            )
        _ = self.method  # refuses the rest

    @classmethod
    def parse(
        cls, text: str, *, skip: tuple[str, ...] = DEFAULT_SKIP, only: tuple[str, ...] = ()
    ) -> QuantizerSpec:
        """Read the text form; what it leaves out has the default value.

        Raises:
            QuantizationError: not of the grammar (which the message shows), or out of range.

        >>> QuantizerSpec.parse("w4a8").group
        64

        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise QuantizationError(
                f"{text!r} is not a quantizer specification. The grammar is {GRAMMAR}."
            )
        weight, activation, group, rank, token = found.groups()
        sizes: dict[str, int | None] = {"64": 64, "none": None}
        try:
            return cls(
                weight_bits=int(weight),
                activation_bits=int(activation),
                group=sizes[group or "64"] if (group or "64") in sizes else int(group),
                rank=int(rank or 0),
                activation="token" if token else "group",
                skip=skip,
                only=only,
            )
        except QuantizationError as error:
            raise QuantizationError(f"{text!r}: {error} The grammar is {GRAMMAR}.") from error

    def __str__(self) -> str:
        group = "" if self.group == 64 else f"-g{self.group or 'none'}"
        rank = f"-r{self.rank}" if self.rank else ""
        token = "-token" if self.activation == "token" else ""
        return f"w{self.weight_bits}a{self.activation_bits}{group}{rank}{token}"

    @property
    def method(self) -> RoundToNearest:
        """What this stands for."""
        return RoundToNearest(
            self.weight_bits,
            self.activation_bits,
            group=self.group,
            activation=self.activation,
            rank=self.rank,
            skip=self.skip,
            only=self.only,
        )

    @property
    def calibrated(self) -> bool:
        """False: it needs no denoiser calls."""
        return self.method.calibrated

    def quantize(self, workspace: Workspace) -> None:
        """As the method does."""
        self.method.quantize(workspace)

    def layer(self, old: nn.Module, name: str = "layer") -> Quantized:
        """One layer quantized, see :meth:`RoundToNearest.layer`."""
        return self.method.layer(old, name)

    def as_dict(self) -> dict[str, Any]:
        """Every field, patterns included, in types that JSON knows.

        >>> QuantizerSpec.from_dict(QuantizerSpec(4).as_dict()) == QuantizerSpec(4)
        True
        """
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "group": self.group,
            "rank": self.rank,
            "activation": self.activation,
            "skip": list(self.skip),
            "only": list(self.only),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizerSpec:
        """The inverse of :meth:`as_dict`.

        Raises:
            QuantizationError: a field is missing, unknown, or out of range.

        """
        expected, found = set(cls.__slots__), set(fields)
        if expected != found:
            raise QuantizationError(
                f"A quantizer specification has exactly the fields {sorted(expected)}; missing "
                f"{sorted(expected - found)}, unknown {sorted(found - expected)}."
            )
        patterns = {k: fields[k] for k in ("skip", "only")}
        for name, value in patterns.items():
            if not isinstance(value, list):
                raise QuantizationError(f"{name} must be a list of patterns, got {value!r}.")
        return cls(**{**fields, **{k: tuple(v) for k, v in patterns.items()}})
