"""From the rows of all layers to adapters within a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from evenkeel.fitting.adapters.collect import Site
from evenkeel.fitting.adapters.effective_weight import effective_weight, reference_weight
from evenkeel.hosts.actuators.head_rows import sizes
from evenkeel.low_rank.budget import Option, share_out
from evenkeel.low_rank.factors import LayerAdapter, bytes_of, fit_factors, without_empty
from evenkeel.low_rank.metric import Components, OutputMetric, second_moment
from evenkeel.statistics.exact import working

LARGEST_RANK = 128


@dataclass
class LayerProblem:
    """One layer: what its adapter should be, and in which metric.

    Attributes:
        name, kernel: of the layer.
        change: D = W - W_q, (O, F).
        metric: of the output, or local.
        held_out: the same metric from other rows.
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
    """What a run told of one layer; its problem in either metric follows.

    Attributes:
        name, kernel: of the layer.
        change: D = W - W_q, (O, F).
        inputs, gradients: second moments from all rows kept, and from every second one.

    """

    name: str
    kernel: tuple[int, ...]
    change: Tensor
    inputs: tuple[Tensor, Tensor]
    gradients: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, name: str, site: Site) -> Measured | None:
        """None for a layer that computes with its full-precision weight."""
        (_, x), (_, g) = site.inputs.sorted(), site.gradients.sorted()
        change = reference_weight(site.reference) - effective_weight(site.quantized, site.dtype)
        if not (len(x) and bool(change.any())):  # some layers are never called
            return None
        kernel = sizes(site.reference.kernel_size) if site.head.kind == "convolution" else ()
        return cls(name, kernel, working(change), _both(x), _both(g) if len(g) else None)

    def problem(self, *, local: bool) -> LayerProblem | None:
        """None where the output's metric is asked for and the output does not depend on the layer."""
        gradients = (None, None) if local else self.gradients
        if gradients is None:
            return None
        metric, held_out = map(OutputMetric, self.inputs, gradients)
        components = metric.components(self.change, min(LARGEST_RANK, *self.change.shape))
        return LayerProblem(self.name, self.kernel, self.change, metric, held_out, components)


def _both(rows: Tensor) -> tuple[Tensor, Tensor]:
    return second_moment(rows), second_moment(rows[1::2])


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
