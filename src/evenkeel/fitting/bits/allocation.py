"""Which choice every layer gets within a budget of bytes: the hull of predicted error against bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.fitting.adapters.effective_weight import reference_weight
from evenkeel.fitting.adapters.sites import Site
from evenkeel.fitting.bits.families import Family
from evenkeel.low_rank.budget import Option, share_out
from evenkeel.low_rank.metric import OutputMetric
from evenkeel.low_rank.moment import second_moment

Options = dict[str, dict[str, Option]]  # layer -> choice -> what it costs and leaves


@dataclass(frozen=True)
class Uniform:
    """One choice for all layers.

    Attributes:
        choice: in the family's word.
        bytes: of all weights.
        error: predicted, in the unit of the metric.

    """

    choice: str
    bytes: int
    error: float


def metric_of(site: Site) -> OutputMetric | None:
    """S and G of a layer; None where it was never called, or the output does not depend on it."""
    (_, x), felt = site.inputs.sorted(), site.felt()
    if felt is None or not len(x):
        return None
    _, gradients, weights = felt
    return OutputMetric(second_moment(x), second_moment(gradients * weights))


def options_of(
    family: Family,
    layers: Mapping[str, nn.Module],
    metric_for: Callable[[str], OutputMetric | None],
    otherwise: str,
) -> Options:
    """Bytes and predicted error of every choice of every layer.

    The error is ``tr(G E S E^T)`` with E = W - W_q, W_q what the built layer computes with. What rounding
    of inputs does is left out: it hardly depends on these choices. One layer's metric is in memory at a time.

    Args:
        family: what can be chosen.
        layers: by name, in full precision.
        metric_for: of a layer by name; one without, not measured, gets ``otherwise`` alone, at no error.
        otherwise: a choice that all layers have.

    """
    found: Options = {}
    for name, layer in layers.items():
        metric = metric_for(name)
        found[name] = {}
        for choice in family.choices(layer) if metric else [otherwise]:
            built, error = family.build(name, layer, choice), 0.0
            if metric is not None:
                weight = metric.working(reference_weight(layer))
                w_q = family.weight(built, layer.get_parameter("weight").dtype)
                error = metric.error(weight - metric.working(w_q))
            found[name][choice] = Option(family.bytes_of(built, choice), error, choice)
    return found


def kinds_of(options: Options) -> dict[str, list[str]]:
    """Layers that differ by the number of their block alone, where they were measured.

    >>> one = Option(1, 1.0, "w4-g32")
    >>> kinds_of({f"blocks.{i}.to_q": {"w3-g32": one, "w4-g32": one} for i in range(2)})
    {'blocks.*.to_q': ['blocks.0.to_q', 'blocks.1.to_q']}

    """
    found: dict[str, list[str]] = {}
    for name, choices in options.items():
        if len(choices) > 1:
            found.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), []).append(name)
    return found


def scaled(options: Options, choice: str, measure: Callable[[list[str]], float]) -> Options:
    """The same with predictions of a kind of layer multiplied by what is measured over what is predicted.

    What K-FAC leaves out is alike in layers of one kind: inputs that stay the same from token to token or
    step to step (text) make errors that add up instead of averaging out, so that keys and values of
    cross-attention were measured up to 20 times as sensitive as predicted, relative to the median layer.

    Args:
        options: of every layer.
        choice: with which layers are measured.
        measure: the squared error of final samples with these layers quantized so, and no others.

    """
    found = dict(options)
    for names in kinds_of(options).values():
        expected = sum(options[name][choice].error for name in names)
        factor = measure(names) / expected if expected else 1.0
        for name in names:
            each = options[name].items()
            found[name] = {c: replace(o, error=factor * o.error) for c, o in each}
    return found


def uniforms_of(options: Options) -> list[Uniform]:
    """One choice for all layers, where all have it; a layer that was not measured keeps its own."""
    measured = [found for found in options.values() if len(found) > 1]
    common = [c for c in measured[0] if all(c in found for found in measured)] if measured else []
    taken = {
        choice: [found.get(choice, next(iter(found.values()))) for found in options.values()]
        for choice in common
    }
    return [
        Uniform(choice, sum(o.bytes for o in chosen), sum(o.error for o in chosen))
        for choice, chosen in taken.items()
    ]


def best_uniform(options: Options, budget: int) -> Uniform:
    """The one of least predicted error that fits.

    Raises:
        QuantizationError: none fits.

    """
    fitting = [u for u in uniforms_of(options) if u.bytes <= budget]
    if not fitting:
        least = min((u.bytes for u in uniforms_of(options)), default=0)
        raise QuantizationError(
            f"the budget of {budget} bytes holds no uniform quantization of these layers; the smallest "
            f"takes {least} bytes. Ask for at least {least / max(budget, 1):.2f} times as much."
        )
    return min(fitting, key=lambda u: u.error)


def mixed(
    family: Family, options: Options, budget: int, near: int | None = None
) -> dict[str, Option]:
    """What every layer gets: sum of predicted errors small, bytes within the budget.

    Args:
        family: of the choices.
        options: of every layer.
        budget: bytes for all together.
        near: keep weight bits within 1 of this number; few bits are where a second-order prediction
            holds least. None lets all of them be chosen.

    """
    allowed = {
        name: [
            option
            for choice, option in found.items()
            if near is None or abs(family.bits_of(choice) - near) <= 1
        ]
        for name, found in options.items()
    }
    return share_out({n: found or [*options[n].values()] for n, found in allowed.items()}, budget)


def widest_uniform(family: Family, layers: Mapping[str, nn.Module], budget: int) -> str:
    """The uniform choice to measure along: the most bits that fit, and of these the most bytes.

    No metric is known yet. Only one layer of every shape is built.

    Raises:
        QuantizationError: no choice that all layers have fits.

    """
    common = [
        c
        for c in family.choices(next(iter(layers.values())))
        if all(c in family.choices(layer) for layer in layers.values())
    ]
    shapes = {name: tuple(layer.get_parameter("weight").shape) for name, layer in layers.items()}
    sizes: dict[str, int] = {}
    for choice in common:
        known: dict[object, int] = {}
        for name, layer in layers.items():
            kind = (type(layer), shapes[name], getattr(layer, "groups", 1))
            if kind not in known:
                with torch.no_grad():
                    known[kind] = family.bytes_of(family.build(name, layer, choice), choice)
            sizes[choice] = sizes.get(choice, 0) + known[kind]
    fitting = [c for c in common if sizes[c] <= budget]
    if not fitting:
        least = min(sizes.values(), default=0)
        raise QuantizationError(
            f"the budget of {budget} bytes holds none of the choices that all layers have in common; the "
            f"smallest takes {least} bytes. Ask for at least {least / max(budget, 1):.2f} times as much."
        )
    return max(fitting, key=lambda c: (family.bits_of(c), sizes[c]))
