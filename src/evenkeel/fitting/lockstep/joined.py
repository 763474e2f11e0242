"""Sums of all processes, as if one had seen every prompt.

Each process sums over its own batches. Scatters are brought to the common mean first, so that they add;
what is left to differ from one process is the order of additions in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from evenkeel.corrections.reconstruction import GainSums
from evenkeel.hosts.processes import Processes
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.normal_equations import NormalEquations, settle


def equations_of_all(us: Processes, own: Sequence[NormalEquations]) -> list[NormalEquations]:
    """The equations of every process's rows; those given are used up."""
    if us.count == 1:
        return list(own)
    settle(own)
    whole = us.summed(torch.cat([_first_order(e) for e in own]))
    parts = torch.split(whole, [1 + e.features + e.targets for e in own])
    for equations, part in zip(own, parts, strict=True):
        count = int(part[0])
        mean = (part[1:] / max(count, 1)).numpy()
        equations.move_to(mean[: equations.features], mean[equations.features :])
        equations.count = count
        for name in ("hh", "ht", "tt"):
            total = us.summed(torch.from_numpy(getattr(equations, name)))
            setattr(equations, name, total.numpy())
    said = [rounding for rounding, _ in us.gathered([e.rounding for e in own])]
    for equations, *rounding in zip(own, *said, strict=True):
        equations.rounding = max(rounding)
    return list(own)


def gains_of_all(us: Processes, own: GainSums) -> GainSums:
    """The sums of every process's outputs."""
    if us.count == 1:
        return own
    parts = torch.stack([own.qe, own.qq, own.ee, own.ratio, own.ratio_squared, own.count])
    samples = int(us.summed(torch.tensor(own.samples)))
    qe, qq, ee, ratio, ratio_squared, count = us.summed(parts)
    return GainSums(qe, qq, ee, ratio, ratio_squared, count, samples, own.size)


def moments_of_all(
    us: Processes, own: Sequence[list[PairedMoments] | None]
) -> list[list[PairedMoments] | None]:
    """Of every batch its moments per step: own ones, or of each process all batches at once."""
    if us.count == 1:
        return list(own)
    whole: dict[str, Tensor] = {}
    known = [steps for steps in own if steps is not None]
    if len(known) == len(own):
        joined = PairedMoments.joined([PairedMoments.joined(steps, 1) for steps in known], 0)
        whole = {f.name: getattr(joined, f.name) for f in fields(joined)}
    return [
        [PairedMoments(**tensors)] if tensors else None for _, tensors in us.gathered(None, whole)
    ]


def _first_order(equations: NormalEquations) -> Tensor:
    """Rows, and the sums of features and targets over them."""
    n, means = equations.count, (equations.mean_h, equations.mean_t)
    return torch.cat([torch.tensor([float(n)]).double(), *(n * torch.from_numpy(m) for m in means)])
