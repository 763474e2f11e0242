"""Recovery adapters: low-rank maps beside the layers of a quantized denoiser, as a correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenkeel.corrections.base import Correction, Tables
from evenkeel.corrections.plan import SamplerPlan, plain_plan
from evenkeel.low_rank.factors import BITS, GROUP, Factor, LayerAdapter, top_of
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.provenance import Provenance
from evenkeel.storage.checks import Number, Tensors, check_json, check_tensors
from evenkeel.storage.packing import unpack

_LAYER = {
    "name": str,
    "kernel": [Number(int, low=1)],
    **dict.fromkeys(("rank", "features", "outputs"), Number(int, low=1)),
}
_DESCRIPTION = {"bits": int, "metric": {"output", "uniform", "local"}, "layers": [_LAYER]}


@dataclass(frozen=True)
class RecoveryAdapters(Correction):
    """Beside layer l of the quantized denoiser stands ``up_l^T (down_l x)``, at every step.

    Ours; ``fit_adapters`` fits it in closed form, docs/adapters.md derives it. It belongs beside the
    quantized layer: merged into the weight and quantized again, most of what it brings is lost.
    The sampler is left alone, and any scheduler, step count and guidance scale may be used with it.

    Attributes:
        provenance: what it was fitted for.
        metric: ``output``, ``uniform`` or ``local``, see ``fit_adapters``.
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
        """Packed codes and scales of all factors one after another, or their float16 values."""
        factors = [factor for layer in self.layers for factor in (layer.down, layer.up)]
        codes = [f.codes for f in factors]
        if self.bits == 16:
            return Tables(self._described(), {"values": _joined(codes)})
        scales = [f.scale for f in factors if f.scale is not None]
        tensors = {"codes": _joined(codes), "scales": _joined(scales)} if factors else {}
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
        shapes = [(x["rank"], x[width]) for x in layers for width in ("features", "outputs")]
        factors = iter(_factors(tensors, shapes, bits))
        found = (
            LayerAdapter(x["name"], next(factors), next(factors), tuple(x["kernel"]))
            for x in layers
        )
        return cls(made_for, described["metric"], bits, tuple(found))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _factors(
    tensors: Mapping[str, Tensor], shapes: Sequence[tuple[int, int]], bits: int
) -> list[Factor]:
    """Of these shapes, from what ``tables`` joined."""
    if not shapes:
        check_tensors(tensors, {})
        return []
    if bits == 16:
        sizes = [rank * width for rank, width in shapes]
        check_tensors(tensors, {"values": Tensors(torch.float16, (sum(sizes),))})
        values = torch.split(tensors["values"], sizes)
        return [Factor(bits, s[1], v.reshape(s), None) for v, s in zip(values, shapes, strict=True)]
    sizes = [-(-rank * width * bits // 8) for rank, width in shapes]
    groups = [(rank, -(-width // GROUP)) for rank, width in shapes]
    scales = [rank * count for rank, count in groups]
    check_tensors(
        tensors,
        {
            "codes": Tensors(torch.uint8, (sum(sizes),)),
            "scales": Tensors(torch.float16, (sum(scales),), low=0.0),
        },
    )
    parts = zip(
        *(torch.split(tensors[n], s) for n, s in (("codes", sizes), ("scales", scales))),
        strict=True,
    )
    found = []
    for (codes, scale), (rank, width), group in zip(parts, shapes, groups, strict=True):
        if int(unpack(codes, bits, rank * width).max()) > 2 * top_of(bits):
            raise ValueError(f"a code that no factor of {bits} bits has")
        found.append(Factor(bits, width, codes, scale.reshape(group)))
    return found
