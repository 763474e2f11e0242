"""Recovery adapters: low-rank maps beside the layers of a quantized denoiser, as a correction."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenkeel.corrections.base import Correction, Tables
from evenkeel.corrections.plan import SamplerPlan, plain_plan
from evenkeel.low_rank.factors import BITS, GROUP, Factor, LayerAdapter
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.provenance import Provenance
from evenkeel.storage.checks import Number, Tensors, check_json, check_tensors
from evenkeel.storage.packing import pack, unpack

_SIDES = ("down", "up")
_LAYER = {
    "name": str,
    "kernel": [Number(int, low=1)],
    **dict.fromkeys(("rank", "features", "outputs"), Number(int, low=1)),
}
_DESCRIPTION = {"bits": int, "metric": {"output", "local"}, "layers": [_LAYER]}


@dataclass(frozen=True)
class RecoveryAdapters(Correction):
    """Beside layer l of the quantized denoiser stands ``up_l^T (down_l x)``, at every step.

    Ours; ``fit_adapters`` fits it in closed form, docs/adapters.md derives it. It belongs beside the
    quantized layer: merged into the weight and quantized again, most of what it brings is lost.
    The sampler is left alone, and any scheduler, step count and guidance scale may be used with it.

    Attributes:
        provenance: what it was fitted for.
        metric: ``output`` or ``local``, see ``OutputMetric``.
        bits: of a value in the factors.
        layers: one adapter per layer that has one.

    """

    name: ClassVar[str] = "adapters"
    references: ClassVar[tuple[str, ...]] = ("evenkeel, docs/adapters.md",)
    stages: ClassVar[tuple[str, ...]] = ("layers",)

    provenance: Provenance
    metric: str
    bits: int
    layers: tuple[LayerAdapter, ...]

    @property
    def made_for(self) -> Provenance:
        """What it was fitted for."""
        return self.provenance

    @property
    def beside(self) -> tuple[LayerAdapter, ...]:
        """What stands beside which layer."""
        return self.layers

    @property
    def options(self) -> dict[str, Any]:
        """The knobs, without what was fitted."""
        return {"metric": self.metric, "bits": self.bits}

    @property
    def stored_bytes(self) -> int:
        """Of all factors, packed."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def report(self) -> str:
        """How many layers, of which ranks, how large."""
        ranks = sorted(layer.rank for layer in self.layers)
        if not ranks:
            return "no layer has an adapter"
        return (
            f"{len(ranks)} layers with adapters of rank {ranks[0]} to {ranks[-1]} (median "
            f"{ranks[len(ranks) // 2]}), factors of {self.bits} bits, {self.stored_bytes / 1e6:.3f} MB"
        )

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The sampler does nothing different."""
        del allow_range
        return plain_plan(law)

    def description(self) -> dict[str, Any]:
        """Layers with their ranks, and what all of it was fitted for."""
        return {
            **self._described(),
            "bytes": self.stored_bytes,
            "quantizer": self.provenance.quantizer,
            "provenance": asdict(self.provenance),
        }

    def _described(self) -> dict[str, Any]:
        layers = [
            {
                "name": a.name,
                "rank": a.rank,
                "features": a.down.width,
                "outputs": a.up.width,
                "kernel": list(a.kernel),
            }
            for a in self.layers
        ]
        return {"bits": self.bits, "metric": self.metric, "layers": layers}

    def tables(self) -> Tables:
        """Packed codes with their scales, or float16 values; ``<layer>.down`` and ``<layer>.up``."""
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            for side in _SIDES:
                factor: Factor = getattr(layer, side)
                key = f"{layer.name}.{side}"
                if factor.scale is None:
                    tensors[key] = factor.values
                    continue
                codes = (factor.values.to(torch.int16) + _offset(factor.bits)).to(torch.uint8)
                tensors[key] = pack(codes, factor.bits)
                tensors[f"{key}.scale"] = factor.scale
        return Tables(self._described(), tensors)

    @classmethod
    def from_tables(cls, tables: Tables, made_for: Provenance) -> RecoveryAdapters:
        """See ``Correction``."""
        described, tensors = tables.described, tables.tensors
        check_json(described, _DESCRIPTION, "adapters")
        bits, layers = described["bits"], described["layers"]
        if bits not in BITS:
            raise ValueError(f"factors of {bits} bits, expected one of {BITS}")
        if len({layer["name"] for layer in layers}) != len(layers):
            raise ValueError("a layer is listed twice")
        wanted: dict[str, Tensors] = {}
        for layer in layers:
            for side, width in _widths(layer):
                wanted |= _stored(f"{layer['name']}.{side}", layer["rank"], width, bits)
        check_tensors(tensors, wanted)
        found = []
        for layer in layers:
            name, rank = layer["name"], layer["rank"]
            down, up = (
                _factor(tensors, f"{name}.{side}", rank, width, bits)
                for side, width in _widths(layer)
            )
            found.append(LayerAdapter(name, down, up, tuple(layer["kernel"])))
        return cls(made_for, described["metric"], bits, tuple(found))


def _offset(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def _widths(layer: dict[str, Any]) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("down", layer["features"]), ("up", layer["outputs"])


def _stored(key: str, rank: int, width: int, bits: int) -> dict[str, Tensors]:
    """What a file holds of one factor."""
    if bits == 16:
        return {key: Tensors(torch.float16, (rank, width))}
    groups = -(-width // GROUP)
    return {
        key: Tensors(torch.uint8, (-(-rank * width * bits // 8),)),
        f"{key}.scale": Tensors(torch.float16, (rank, groups), low=0.0),
    }


def _factor(tensors: dict[str, Tensor], key: str, rank: int, width: int, bits: int) -> Factor:
    if bits == 16:
        return Factor(bits, tensors[key], None)
    codes = unpack(tensors[key], bits, rank * width).to(torch.int16) - _offset(bits)
    if int(codes.max()) > _offset(bits):
        raise ValueError(f"{key} holds a code that no factor of {bits} bits has")
    return Factor(bits, codes.to(torch.int8).reshape(rank, width), tensors[f"{key}.scale"])
