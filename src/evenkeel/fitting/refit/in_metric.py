"""Branches refitted by the engine of recovery adapters: for the final sample, not for their layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError
from evenkeel.fitting.adapters.collect import collect
from evenkeel.fitting.adapters.effective_weight import reference_bias, reference_weight
from evenkeel.fitting.adapters.fit_adapters import PROBED
from evenkeel.fitting.adapters.sites import Site, opened, sites_of
from evenkeel.fitting.adapters.solve import Measured
from evenkeel.fitting.refit.site import LayerRefit
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.quantizers.layers.quantized_layers import QuantizedLinear


class Refitted(NamedTuple):
    """What a layer gets: down (r, F), up (O, r), and its bias (O,) if it has one."""

    down: Tensor
    up: Tensor
    bias: Tensor | None


def branches_in_metric(
    run: Run, metric: str, rows: int, memory: float, *, progress: bool
) -> tuple[dict[str, LayerRefit], dict[str, Refitted]]:
    """The best branch of every layer that has one, along the run of the network with its present ones.

    With U V the branch there is and D the change of weight that would be right beside it (``LayerProblem``),
    the new branch is the truncated SVD of D + U V in the metric, of the same rank. A bias takes the mean of
    what is left, and the metric is centred then. Both are taken where rows of one fold say that the branch
    is better than the present one.

    Args:
        run: with a quantized twin that has branches.
        metric: of ``fit_adapters``.
        rows: kept of each layer, at most.
        memory: bytes for them.
        progress: show a bar.

    Returns:
        What was found for each of these layers, and the new branches, down (r, F) and up (O, r), of those
        that change. ``before`` and ``after`` are the metric's value on these rows over that without a branch.

    Raises:
        CalibrationError: no layer has a branch.

    """
    places = {
        name: p
        for name, p in sites_of(run).items()
        if isinstance(p.quantized, QuantizedLinear) and p.quantized.rank
    }
    if not places:
        raise CalibrationError(
            f"no layer has a low-rank branch, so there is nothing to refit in the metric {metric!r}. Leave "
            f"the metric out to refit scales and biases, or fit recovery adapters."
        )
    found: dict[str, LayerRefit] = {}
    branches: dict[str, Refitted] = {}
    probed = 0 if metric == "local" else PROBED
    with processes().telling(), opened(places, rows, memory, gradients=probed > 0) as sites:
        collect(run, sites, probed=probed, progress=progress)
        for name, site in sites.items():
            found[name], branch = _decided(name, site, metric)
            if branch is not None:
                branches[name] = branch
    return found, branches


def put(network: nn.Module, branches: Mapping[str, Refitted]) -> None:
    """Give layers these branches and biases."""
    layers = dict(network.named_modules())
    for name, found in branches.items():
        layer = layers[name]
        assert isinstance(layer, QuantizedLinear)
        layer.down, layer.up, layer.bias = found


@torch.no_grad()
def _decided(name: str, site: Site, metric: str) -> tuple[LayerRefit, Refitted | None]:
    layer: QuantizedLinear = site.quantized
    assert layer.down is not None and layer.up is not None
    said = LayerRefit(name, layer.rank, what="branch")
    measured = Measured.of(name, site, {metric}, centred=layer.bias is not None)
    problem = None if measured is None else measured.problem(metric, "regressed")
    if problem is None:
        why = "was not called" if measured is None else "the output does not depend on it"
        return replace(said, reason=why), None
    stretch = 1.0 if layer.smoothing is None else layer.smoothing.float()
    old = layer.down.float() / stretch, layer.up.float().T
    change = problem.change + problem.metric.working(old[1].T @ old[0])
    best = problem.metric.components(change, said.rank)
    down, up = (best.down.float() * stretch).to(layer.down), best.up.T.to(layer.up)
    new = down.float() / stretch, up.float().T
    alone = problem.held_out.error(change)
    before, after = (alone - problem.held_out.gained(change, *b) for b in (old, new))
    said = replace(said, before=before / alone, after=after / alone)
    if not after < before:
        return replace(said, reason="no gain on held-out rows"), None
    bias = layer.bias
    if bias is not None:
        change = new[1].T @ new[0] - old[1].T @ old[0]
        bias = (bias.float() + _mean_error(site, change)).to(bias)
    return said, Refitted(down, up, bias)


def _mean_error(site: Site, change: Tensor) -> Tensor:
    """(O,) the full-precision output minus that of the layer with this change (O, F), mean over all rows."""
    mean = site.inputs.sorted()[1].mean(0)
    bias = reference_bias(site.reference)
    exact = reference_weight(site.reference) @ mean + (0.0 if bias is None else bias)
    if site.outputs is not None:
        given = site.outputs.sorted()[1].mean(0)
    else:
        given = site.quantized(mean.to(site.dtype)).float()
    return exact - given - change @ mean
