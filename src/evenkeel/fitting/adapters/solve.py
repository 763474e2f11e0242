"""From the rows of all layers to adapters within a budget, one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from evenkeel.fitting.adapters.effective_weight import (
    effective_weight,
    reference_bias,
    reference_weight,
)
from evenkeel.fitting.adapters.row_sample import folds_of
from evenkeel.fitting.adapters.sites import Site
from evenkeel.hosts.actuators.head_rows import sizes
from evenkeel.low_rank.budget import Option, share_out
from evenkeel.low_rank.factors import LayerAdapter, bytes_of, fit_factors, without_empty
from evenkeel.low_rank.metric import Components, OutputMetric
from evenkeel.low_rank.moment import Moment, moment_as_it_is, second_moment
from evenkeel.low_rank.rounding_slope import rounding_slope

LARGEST_RANK = 128
Tried = tuple[str, str]  # a metric and a target


@dataclass
class LayerProblem:
    """One layer: what its adapter should be, and in which metric.

    Attributes:
        name, kernel: of the layer.
        change: D, what the adapter should be, (O, F).
        metric: of the output, or local.
        held_out: the same metric from fewer rows.
        error: of no adapter at all, where it is known.

    """

    name: str
    kernel: tuple[int, ...]
    change: Tensor
    metric: OutputMetric
    held_out: OutputMetric
    error: float | None = None
    _known: Components | None = None

    def components(self, limit: int = LARGEST_RANK) -> Components:
        """Of the change: so many, or more where they are known."""
        if self._known is None or len(self._known) < min(limit, *self.change.shape):
            self._known = self.metric.components(self.change, limit, self.error)
            self.error = self._known.error
        return self._known

    @property
    def nbytes(self) -> int:
        """Of its matrices, nearly, with the roots that are made of them and all components."""
        sides = [self.metric.inputs, self.metric.outputs]
        held = sum((m if isinstance(m, Tensor) else m.rows).nbytes for m in sides if m is not None)
        return 4 * held + self.change.nbytes + 8 * LARGEST_RANK * sum(self.change.shape)

    def options(self, left: Tensor, bits: int) -> list[Option]:
        """What ranks 0, 1, ... cost with such factors, and the errors (r + 1,) that they leave."""
        outputs, features = self.change.shape
        return [
            Option(bytes_of(rank, features, outputs, bits) if rank else 0, error, rank)
            for rank, error in enumerate(left.tolist())
        ]


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
    inputs: tuple[Moment, Moment]
    gradients: dict[str, tuple[Moment, Moment]]

    @classmethod
    def of(
        cls, name: str, site: Site, metrics: Collection[str], *, centred: bool = False
    ) -> Measured | None:
        """None for a layer that computes with its full-precision weight; ``metrics`` will be asked for.

        ``centred``: about the mean, where a bias takes that.
        """
        keys, x = site.inputs.sorted()
        weight = effective_weight(site.quantized, site.dtype)
        difference = reference_weight(site.reference) - weight
        if not (len(x) and bool(difference.any())):  # some layers are never called
            return None
        kernel = sizes(site.reference.kernel_size) if site.head.kind == "convolution" else ()
        gradients = _gradients(site, metrics)
        middle, regressed = x.mean(0) if centred else torch.zeros(()), None
        if site.outputs is not None:
            bias = reference_bias(site.reference)
            noise = x @ weight.T - site.outputs.sorted()[1].to(x) + (0.0 if bias is None else bias)
            noise = noise - noise.mean(0) if centred else noise
            outputs = next((g for g, _ in gradients.values()), None)
            regressed = difference + rounding_slope(x - middle, noise, folds_of(keys), outputs)
        return cls(
            name, kernel, difference, regressed, _both(x - middle, folds_of(keys)), gradients
        )

    def problem(self, metric: str, target: str = "difference") -> LayerProblem | None:
        """None where an output's metric is asked for and the output does not depend on the layer."""
        if metric != "local" and metric not in self.gradients:
            return None
        gradients = self.gradients.get(metric, (None, None))
        whole, held_out = map(OutputMetric, self.inputs, gradients)
        rounding = target == "regressed" and self.regressed is not None
        change = self.regressed if rounding else self.difference
        assert change is not None
        return LayerProblem(self.name, self.kernel, whole.working(change), whole, held_out)


def _gradients(site: Site, metrics: Collection[str]) -> dict[str, tuple[Moment, Moment]]:
    """Second moments of gradients: each weighted by its step, or as they are."""
    if (felt := site.felt()) is None:
        return {}
    keys, rows, weight = felt
    weighted = {"output": weight, "uniform": torch.ones_like(weight)}
    return {m: _both(rows * w, folds_of(keys)) for m, w in weighted.items() if m in metrics}


def _both(rows: Tensor, folds: Tensor) -> tuple[Moment, Moment]:
    return second_moment(rows), moment_as_it_is(rows[folds])


@dataclass
class Solution:
    """Adapters of one fit.

    Attributes:
        bits: of a value in their factors.
        layers: the adapters.
        before, after: error of the final sample by the fit's metric, without and with them.

    """

    bits: int
    layers: list[LayerAdapter] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0

    @property
    def predicted(self) -> float:
        """Predicted error with the adapters over the one without."""
        return self.after / self.before if self.before else 1.0

    @property
    def stored_bytes(self) -> int:
        """Of all adapters."""
        return sum(layer.stored_bytes for layer in self.layers)

    def without(self, error: float) -> None:
        """Count a layer's error."""
        self.before += error
        self.after += error

    def add(self, p: LayerProblem, components: Components, rank: int) -> None:
        """Fit one layer's adapter of this rank, or none; keep it if held-out rows confirm it."""
        self.without(components.error)
        if not rank:
            return
        fit = fit_factors(p.name, p.metric, p.change, components, rank, self.bits)
        adapter = without_empty(fit)
        if adapter is None:
            return
        factors = adapter.down.dense(), adapter.up.dense()
        if p.held_out.gained(p.change, *factors) > 0:
            self.layers.append(replace(adapter, kernel=p.kernel))
            self.after -= p.metric.gained(p.change, *factors)


def solve(
    sites: Mapping[str, Site],
    tried: Sequence[Tried],
    bits: Sequence[int],
    budget: int | None,
    rank: int | None,
    memory: float = 0.0,
) -> tuple[int, dict[Tried, Solution]]:
    """The layers that could have an adapter, and the best fit of every metric and target.

    All layers are gone through twice: for what each rank would be worth, and, bytes being shared out, for
    the factors. One layer's matrices are in memory at a time, and those of so many more as ``memory``
    holds, which are not made twice. Of several precisions the
    one with the smallest error by the metric is kept: within one metric it compares like with like.

    Args:
        sites: with their rows.
        tried: metrics and targets.
        bits: precisions of the factors.
        budget: bytes of all adapters together; None gives every layer the same rank.
        rank: that rank.
        memory: bytes for matrices that are kept from one time to the other.

    """
    layers = _Layers(sites, tried, memory)
    ranks = _ranks(layers, bits, budget, rank)
    found = {(t, b): Solution(b) for t in tried for b in bits}
    count = 0
    for problems in layers:
        count += 1
        for t, problem in problems.items():
            wanted = {b: ranks[t, b].get(problem.name, 0) for b in bits}
            for b, r in wanted.items():
                if not r and problem.error is not None:
                    found[t, b].without(problem.error)
                    continue
                components = problem.components(max(1, *wanted.values()))
                found[t, b].add(problem, components, min(r, len(components)))
    return count, {
        t: min((found[t, b] for b in bits), key=lambda solution: solution.predicted) for t in tried
    }


@dataclass
class _Layers:
    """All layers' problems, one layer after another; of as many as ``memory`` holds they stay in it."""

    sites: Mapping[str, Site]
    tried: Sequence[Tried]
    memory: float
    _kept: dict[str, dict[Tried, LayerProblem]] = field(default_factory=dict)
    _errors: dict[tuple[str, Tried], float | None] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict[Tried, LayerProblem]]:
        for name, site in self.sites.items():
            if (problems := self._kept.get(name)) is None:
                measured = Measured.of(name, site, {metric for metric, _ in self.tried})
                if measured is None:
                    continue
                problems = {t: p for t in self.tried if (p := measured.problem(*t)) is not None}
                for t, problem in problems.items():
                    problem.error = self._errors.get((name, t))
                size = sum(problem.nbytes for problem in problems.values())
                if size <= self.memory:
                    self.memory -= size
                    self._kept[name] = problems
            yield problems
            self._errors |= {(name, t): problem.error for t, problem in problems.items()}


def _ranks(
    layers: _Layers, bits: Sequence[int], budget: int | None, rank: int | None
) -> dict[tuple[Tried, int], dict[str, int]]:
    """Fit -> layer -> rank."""
    fits = [(t, b) for t in layers.tried for b in bits]
    if budget is None:
        return dict.fromkeys(fits, dict.fromkeys(layers.sites, rank or 0))
    options: dict[tuple[Tried, int], dict[str, list[Option]]] = {fit: {} for fit in fits}
    for problems in layers:
        for t, problem in problems.items():
            left = problem.components().left()
            for b in bits:
                options[t, b][problem.name] = problem.options(left, b)
    return {
        fit: {name: int(str(o.choice)) for name, o in share_out(of, budget).items()}
        for fit, of in options.items()
    }
