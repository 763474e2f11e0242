"""The parts of a denoiser that are quantized one after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True, slots=True)
class Unit:
    """A block or a single layer, and the layers in it that are to be quantized.

    ``name`` is the dotted path of the block, or of the layer itself.
    """

    name: str
    layers: tuple[str, ...]
    kind: Literal["block", "layer"]


def units_of(module: nn.Module, layers: Sequence[str]) -> list[Unit]:
    """Blocks with their layers, and the layers outside any block on their own, in module order.

    A block is an entry of a ``ModuleList`` with at least two of the layers in it and no smaller such
    entry inside: a transformer block, a residual block. That is the unit of reconstruction of BRECQ
    (arXiv:2102.05426) and of the papers that follow it.

    Args:
        module: the denoiser.
        layers: dotted names of the layers to be quantized.

    >>> net = nn.ModuleDict({
    ...     "blocks": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))]),
    ...     "head": nn.Linear(2, 2),
    ... })
    >>> [(u.name, u.kind) for u in units_of(net, ["blocks.0.0", "blocks.0.1", "head"])]
    [('blocks.0', 'block'), ('head', 'layer')]

    """
    entries = [
        f"{name}.{index}" if name else str(index)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList)
        for index in range(len(part))
    ]
    inside = {e: [n for n in layers if n.startswith(f"{e}.")] for e in entries}
    large = {e for e, names in inside.items() if len(names) > 1}
    blocks = [e for e in large if not any(o.startswith(f"{e}.") for o in large)]
    units: dict[str, Unit] = {}
    for name in layers:
        home = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if home is None:
            units[name] = Unit(name, (name,), "layer")
        elif home not in units:
            units[home] = Unit(home, tuple(inside[home]), "block")
    return list(units.values())


def in_call_order(units: Sequence[Unit], order: Sequence[str]) -> list[Unit]:
    """Units sorted by when their first layer is called; those never called come last.

    >>> a, b = Unit("a", ("a",), "layer"), Unit("b", ("b",), "layer")
    >>> [u.name for u in in_call_order([a, b], ["b", "a"])]
    ['b', 'a']

    """
    place = {name: index for index, name in enumerate(order)}
    return sorted(units, key=lambda u: min(place.get(n, len(place)) for n in u.layers))


def never_called(layers: Collection[str], order: Collection[str]) -> list[str]:
    """Layers that no calibration call reached."""
    return sorted(set(layers) - set(order))
