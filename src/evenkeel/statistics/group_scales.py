"""Refit the scales of a group-wise quantized weight: one factor per output and group of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.normal_equations import NormalEquations, Solution

ROWS_AT_A_TIME = 32e6  # bytes of one chunk of rows: their normal matrices and products


@dataclass(frozen=True)
class Scales:
    """What is added to a weight when its groups are scaled, and the constant that goes with it.

    Attributes:
        factors: (O, G) float64, 1 + d.
        change: (O, F) float64, d times the weight, group by group.
        constant: (O,) float64.

    """

    factors: Tensor
    change: Tensor
    constant: Tensor

    @property
    def solution(self) -> Solution:
        """The same as a pair (D, b): D (F, O)."""
        return self.change.T.contiguous(), self.constant


def group_scales(
    equations: NormalEquations, weight: Tensor, group: int | None, penalty: float
) -> Scales:
    """Best scales for what passes through: ``min sum |t_o - d_o^T Z_o h - b_o|^2 + p m |d_o|^2``.

    Z_o (G, F) holds row o of the weight, one group of inputs per row; S and C are the scatters of
    features and of features with targets, m the mean diagonal of Z_o S Z_o^T:

        d_o = (Z_o S Z_o^T + p m I)^-1 Z_o C_o

    Group scales are stored in 16 bits anyway: changing them costs nothing at inference.

    Args:
        equations: of inputs h (F) and the layer's error t (O).
        weight: (O, F), dequantized.
        group: inputs per scale; None is one scale per output.
        penalty: p > 0; a large one leaves d = 0, that is the constant alone.

    Raises:
        CalibrationError: shapes that do not belong together, or a penalty out of range.

    >>> h = torch.randn(99, 4, dtype=torch.double)
    >>> weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.double)
    >>> t = h @ (weight * torch.tensor([0.5, 0.5, -0.25, -0.25])).T
    >>> equations = NormalEquations(4, 1); equations.add(h, t)
    >>> group_scales(equations, weight, 2, 1e-9).factors.round(decimals=4).tolist()
    [[1.5, 0.75]]

    """
    return next(every_group_scales(equations, weight, group, [penalty]))


def every_group_scales(
    equations: NormalEquations, weight: Tensor, group: int | None, penalties: Sequence[float]
) -> Iterator[Scales]:
    """The same for several penalties, in turn.

    Z_o S Z_o^T, which takes nearly all of the time, does not depend on the penalty and is made once.
    """
    targets, features = weight.shape
    fits = (features, targets) == (equations.features, equations.targets)
    for penalty in penalties:
        if not fits or not 0 < penalty < np.inf:
            raise CalibrationError(
                f"expected a weight of {equations.targets} rows of {equations.features} and a positive "
                f"finite penalty; got {tuple(weight.shape)} and {penalty}."
            )
    upper = torch.from_numpy(np.triu(lapack.dtfttr(features, equations.hh)[0]))
    scatter = upper + torch.triu(upper, 1).T
    cross = torch.from_numpy(equations.ht)
    size = min(group or features, features)
    groups = -(-features // size)
    index = torch.arange(features) // size
    w = weight.detach().cpu().double()
    step = max(1, int(ROWS_AT_A_TIME / (8 * (groups * groups + 2 * features))))
    parts = [
        _solve(w[i : i + step], cross[:, i : i + step], scatter, size, penalties)
        for i in range(0, targets, step)
    ]
    for found in zip(*parts, strict=True):
        d = torch.cat(found)
        change = w * d[:, index]
        constant = torch.zeros(targets, dtype=torch.float64)
        if equations.intercept:
            constant = torch.from_numpy(equations.mean_t - equations.mean_h @ change.T.numpy())
        yield Scales(1 + d, change, constant)


def _solve(
    w: Tensor, cross: Tensor, scatter: Tensor, size: int, penalties: Sequence[float]
) -> list[Tensor]:
    """(rows, G) factors less one. Z itself is never formed: all but one group of a row are zero."""
    starts = range(0, w.shape[1], size)
    groups = [slice(i, i + size) for i in starts]
    inner = torch.stack([_summed(w[:, g] @ scatter[g] * w, size) for g in groups], 1)
    right = _summed(w * cross.T, size)
    mean = inner.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, 1.0)  # a row without weight or input keeps its scales
    found = []
    for penalty in penalties:
        system = inner.clone()
        system.diagonal(dim1=1, dim2=2).add_(penalty * mean[:, None])
        found.append(torch.linalg.solve(system, right))
    return found


def _summed(x: Tensor, size: int) -> Tensor:
    """Sums over groups of neighbouring columns, the last of which may be smaller."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % size))
    return padded.reshape(len(x), -1, size).sum(-1)
