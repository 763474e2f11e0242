"""Plain rounding with bits, group size and rank of its own in every layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.quantized_layers import Quantized
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.workspace.workspace import Workspace

GRAMMAR = "w<2..8>-g<size>|-gnone[-r<rank>], for example w4-g32 or w3-g64-r8"
_TEXT = re.compile(r"w([2-8])-g(\d+|none)(?:-r(\d+))?", re.ASCII)


@dataclass(frozen=True)
class PerLayer:
    """Every layer rounded as its own choice says; all else is as in ``base``.

    Which choice a layer gets is decided elsewhere: ``evenkeel.quantize_to_budget`` does.

    Attributes:
        base: formats, ranges, rounding, inputs, and the layers that stay in full precision.
        choices: layer -> ``w4-g32`` or ``w3-g64-r8``: weight bits, values per scale, width of a 16-bit
            low-rank branch. Layers without one stay in full precision.
        hessians: layer -> (in, in) second moment of its inputs, for ``rounding="gptq"``; a layer
            without one is rounded to the nearest.

    Raises:
        QuantizationError: a choice that is not of the grammar, or a base with a weight format of its
            own or static inputs.

    >>> mixed = PerLayer(RoundToNearest(4, 16), {"0": "w3-g16", "2": "w8-gnone"})
    >>> mixed.layer("0", nn.Linear(32, 4)).stored[0].group
    16

    """

    base: RoundToNearest
    choices: Mapping[str, str]
    hessians: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.base.weight_format != "int" or self.base.activation == "static":
            raise QuantizationError(
                "bits per layer are those of integers, and inputs are rounded dynamically; expected "
                "weight_format 'int' and activation 'token' or 'group', got "
                f"{self.base.weight_format!r} and {self.base.activation!r}."
            )
        for choice in set(self.choices.values()):
            method_of(self.base, choice)

    @property
    def calibrated(self) -> bool:
        """False: whatever it needs to know it has been given."""
        return False

    def layer(self, name: str, old: nn.Module) -> Quantized:
        """One layer quantized as its choice says; ``old`` is not changed.

        Raises:
            QuantizationError: as of :meth:`RoundToNearest.layer`.

        """
        return method_of(self.base, self.choices[name]).layer(old, name, self.hessians.get(name))

    def quantize(self, workspace: Workspace) -> None:
        """Layer by layer, independently of each other."""
        workspace.keep_matching(self.base.skip, self.base.only)
        for name in workspace.open:
            if name not in self.choices:
                workspace.keep(name, "no bits were chosen for it")
        for unit in workspace.work(workspace.units(workspace.open)):
            layers = {n: workspace.layers[n] for n in unit.layers}
            methods = {n: method_of(self.base, self.choices[n]) for n in layers}
            made = {n: self.layer(n, old) for n, old in layers.items()}
            workspace.replace(
                unit, made, notes={n: methods[n].note(old) for n, old in layers.items()}
            )

    def as_dict(self) -> dict[str, Any]:
        """Base and choices in types that JSON knows."""
        return {
            "method": "per-layer",
            "base": self.base.as_dict(),
            "choices": dict(self.choices),
        }

    def __str__(self) -> str:
        how = "-gptq" if self.base.rounding == "gptq" else ""
        kinds = sorted(set(self.choices.values()))
        weights = kinds[0] if len(kinds) == 1 else f"mixed-w{kinds[0][1]}..{kinds[-1][1]}"
        return f"{weights}-a{self.base.activation_bits}{how}"


def method_of(base: RoundToNearest, choice: str) -> RoundToNearest:
    """The method that rounds a layer as a choice says.

    Raises:
        QuantizationError: not of the grammar, which the message shows.

    >>> method_of(RoundToNearest(4, 8), "w3-g64-r8").rank
    8

    """
    found = _TEXT.fullmatch(choice)
    if found is None:
        raise QuantizationError(f"{choice!r} is no choice for a layer; the grammar is {GRAMMAR}.")
    bits, group, rank = found.groups()
    size = None if group == "none" else int(group)
    return replace(base, weight_bits=int(bits), group=size, rank=int(rank or 0))
