"""From the rows of all layers to adapters within a budget."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evenkeel.fitting.adapters.collect import Site
from evenkeel.fitting.adapters.effective_weight import effective_weight, reference_weight
from evenkeel.fitting.adapters.row_sample import folds_of
from evenkeel.hosts.actuators.head_rows import sizes
from evenkeel.low_rank.budget import Option, share_out
from evenkeel.low_rank.factors import LayerAdapter, bytes_of, fit_factors, without_empty
from evenkeel.low_rank.metric import Components, OutputMetric, second_moment
from evenkeel.low_rank.rounding_slope import rounding_slope
from evenkeel.statistics.exact import working

LARGEST_RANK = 128


@dataclass
class LayerProblem:
    """One layer: what its adapter should be, and in which metric.

    Attributes:
        name, kernel: of the layer.
        change: D, what the adapter should be, (O, F).
        metric: of the output, or local.
        held_out: the same metric from fewer rows.
        components: of the change.

    """

    name: str
    kernel: tuple[int, ...]
    change: Tensor
    metric: OutputMetric
    held_out: OutputMetric
    components: Components


@dataclass(frozen=True)
class Measured:
    """What a run told of one layer; its problem in any metric follows.

    Attributes:
        name, kernel: of the layer.
        difference: W - W_q, (O, F).
        regressed: the map of x that is nearest to the layer's whole error; None where it rounds no inputs.
        inputs: second moments from all rows kept, and from one fold of them.
        gradients: likewise, by metric; empty where none were taken.

    """

    name: str
    kernel: tuple[int, ...]
    difference: Tensor
    regressed: Tensor | None
    inputs: tuple[Tensor, Tensor]
    gradients: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, name: str, site: Site, metrics: Collection[str]) -> Measured | None:
        """None for a layer that computes with its full-precision weight; ``metrics`` will be asked for."""
        keys, x = site.inputs.sorted()
        weight = effective_weight(site.quantized, site.dtype)
        difference = working(reference_weight(site.reference) - weight)
        if not (len(x) and bool(difference.any())):  # some layers are never called
            return None
        kernel = sizes(site.reference.kernel_size) if site.head.kind == "convolution" else ()
        gradients = _gradients(*site.gradients.sorted(), metrics)
        regressed = None
        if site.outputs is not None:
            bias = getattr(site.reference, "bias", None)
            noise = x @ weight.T - site.outputs.sorted()[1].to(x)
            noise += 0.0 if bias is None else bias.detach().float()
            outputs = next((g for g, _ in gradients.values()), None)
            regressed = difference + rounding_slope(x, noise, folds_of(keys), outputs)
        return cls(name, kernel, difference, regressed, _both(x, folds_of(keys)), gradients)

    def problem(self, metric: str, target: str = "difference") -> LayerProblem | None:
        """None where an output's metric is asked for and the output does not depend on the layer."""
        if metric != "local" and metric not in self.gradients:
            return None
        gradients = self.gradients.get(metric, (None, None))
        whole, held_out = map(OutputMetric, self.inputs, gradients)
        rounding = target == "regressed" and self.regressed is not None
        change = self.regressed if rounding else self.difference
        assert change is not None
        components = whole.components(change, min(LARGEST_RANK, *change.shape))
        return LayerProblem(self.name, self.kernel, change, whole, held_out, components)


def _gradients(
    keys: Tensor, rows: Tensor, metrics: Collection[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Second moments of gradients: each weighted by its step, or as they are."""
    if not len(rows):
        return {}
    folds, weight, rows = folds_of(keys), rows[:, -1:], rows[:, :-1]
    weighted = {"output": weight, "uniform": torch.ones_like(weight)}
    return {m: _both(rows * w, folds) for m, w in weighted.items() if m in metrics}


def _both(rows: Tensor, folds: Tensor) -> tuple[Tensor, Tensor]:
    return second_moment(rows), second_moment(rows[folds])


def solve(
    problems: list[LayerProblem], bits: int, budget: int | None, rank: int | None
) -> tuple[LayerAdapter, ...]:
    """Adapters with factors of so many bits, within a budget of bytes or of one rank everywhere."""
    ranks = {p.name: min(rank or 0, len(p.components)) for p in problems}
    if budget is not None:
        chosen = share_out({p.name: _options(p, bits) for p in problems}, budget)
        ranks = {name: int(str(option.choice)) for name, option in chosen.items()}
    found = []
    for p in problems:
        if not ranks[p.name]:
            continue
        adapter = without_empty(
            fit_factors(p.name, p.metric, p.change, p.components, ranks[p.name], bits)
        )
        if adapter is not None and _helps(p, adapter):
            found.append(replace(adapter, kernel=p.kernel))
    return tuple(found)


def _options(p: LayerProblem, bits: int) -> list[Option]:
    outputs, features = p.change.shape
    return [
        Option(bytes_of(r, features, outputs, bits) if r else 0, float(left), r)
        for r, left in enumerate(p.components.left())
    ]


def _helps(p: LayerProblem, adapter: LayerAdapter) -> bool:
    """Whether it lowers the layer's error in the metric of the held-out rows."""
    left = p.change - adapter.change.to(p.change)
    return p.held_out.error(left) < p.held_out.error(p.change)


def predicted(problems: list[LayerProblem], adapters: tuple[LayerAdapter, ...]) -> float:
    """Predicted error with the adapters over the one without."""
    by_name = {a.name: a for a in adapters}
    before = after = 0.0
    for p in problems:
        error = p.metric.error(p.change)
        adapter = by_name.get(p.name)
        before += error
        left = p.change if adapter is None else p.change - adapter.change.to(p.change)
        after += error if adapter is None else p.metric.error(left)
    return after / before if before else 1.0
