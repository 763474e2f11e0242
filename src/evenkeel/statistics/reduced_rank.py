"""Ridge regression of limited rank, and whether it beats what is there on rows it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.normal_equations import NormalEquations, Solution
from evenkeel.statistics.student import student_margin

# Below it the Cholesky factorization may add to the penalty by itself, and the metric in which the
# rank is reduced would no longer be the one of the solution.
SMALLEST_PENALTY = 1e-8


@dataclass(frozen=True)
class LowRank:
    """The map ``h -> (h down^T) up^T + constant`` with down (R, F), up (O, R), constant (O,)."""

    down: Tensor
    up: Tensor
    constant: Tensor

    @property
    def solution(self) -> Solution:
        """The same as a pair (D, b): D (F, O) = down^T up^T, float64."""
        return (self.up.double() @ self.down.double()).T, self.constant.double()


def reduced_rank(
    equations: NormalEquations, penalty: float, rank: int, prior: Tensor | None = None
) -> LowRank:
    """The best map of rank R from features to targets: a branch that fits what passes through it.

    Minimizes ``sum |t - D^T h - b|^2 + p s |D - D_prior|^2`` over rank(D) <= R, where s is the
    ``scale`` of the equations. With M = S_hh + p s I and D_full the ridge solution, the objective is
    ``|M^(1/2) (D - D_full)|^2`` and a constant, so D = D_full V V^T with V the leading eigenvectors
    of ``D_full^T M D_full`` (Izenman 1975, reduced-rank regression; Mukherjee and Zhu 2011 with a
    ridge). The factors share each direction's norm evenly, which suits 16-bit storage.

    Args:
        equations: F features, O targets; features that never vary leave the best rank-R part of
            the prior.
        penalty: p, at least 1e-8.
        rank: R, 0 to min(F, O).
        prior: (F, O), what D is drawn to; zero without.

    Returns:
        Float64 factors; the constant is zero for equations without intercept.

    Raises:
        CalibrationError: penalty or rank out of range, or what ``NormalEquations.solve`` refuses.

    >>> h = torch.randn(99, 4, dtype=torch.double)
    >>> t = h @ torch.outer(torch.arange(4.0), torch.arange(1.0, 4.0)).double() + 5
    >>> equations = NormalEquations(4, 3); equations.add(h, t)
    >>> [(x.round(decimals=4) + 0).tolist() for x in reduced_rank(equations, 1e-8, 1).solution]
    [[[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]], [5.0, 5.0, 5.0]]

    """
    if not (SMALLEST_PENALTY <= penalty < np.inf):
        raise CalibrationError(f"expected a penalty of at least {SMALLEST_PENALTY}; got {penalty}.")
    if not 0 <= rank <= min(equations.features, equations.targets):
        raise CalibrationError(
            f"expected a rank from 0 to the smaller of {equations.features} features and "
            f"{equations.targets} targets; got {rank}."
        )
    full = equations.solve([penalty], None if prior is None else (prior, _zeros(equations)))[0][0]
    along = full  # M D_full, up to a factor; M is a multiple of the identity if nothing varies
    if equations.scale > 0:
        along = torch.from_numpy(equations.ht)
        if prior is not None:
            along = along + penalty * equations.scale * prior.detach().cpu().double()
    directions = _leading(full, along, rank)
    fitted = full @ directions
    norm = torch.linalg.vector_norm(fitted, dim=0)
    root = torch.where(norm > 0, norm, 1.0).sqrt()
    out = LowRank((fitted / root).T.contiguous(), directions * root, _zeros(equations))
    if not equations.intercept:
        return out
    mean_h, mean_t = torch.from_numpy(equations.mean_h), torch.from_numpy(equations.mean_t)
    return replace(out, constant=mean_t - mean_h @ out.solution[0])


def _leading(full: Tensor, along: Tensor, rank: int) -> Tensor:
    """(O, R) leading eigenvectors of ``full^T along``, which is symmetric."""
    targets = full.shape[1]
    if rank == 0:
        return full.new_zeros(targets, 0)
    basis = torch.eye(targets, dtype=torch.float64)
    if targets > full.shape[0]:  # all of it happens in the F dimensions that the map can reach
        basis = torch.linalg.qr(full.T)[0]
    inner = ((full @ basis).T @ (along @ basis)).numpy()
    size = len(inner)
    _, vectors = scipy.linalg.eigh((inner + inner.T) / 2, subset_by_index=(size - rank, size - 1))
    return basis @ torch.from_numpy(vectors[:, ::-1].copy())


def _zeros(equations: NormalEquations) -> Tensor:
    return torch.zeros(equations.targets, dtype=torch.float64)


@dataclass(frozen=True)
class HeldOut:
    """Squared errors on the fold that was left out: before (folds,), after (penalties, folds)."""

    before: Tensor
    after: Tensor

    @property
    def best(self) -> int:
        """Index of the penalty with the smallest error over all folds."""
        return int(self.after.sum(1).argmin())

    @property
    def improves(self) -> bool:
        """Whether the best penalty lowers the error in every fold, or by a 95 % bound over folds.

        The bound is one-sided, of Student's t on the relative gains ``1 - after / before``.

        >>> HeldOut(torch.ones(4), torch.tensor([[0.5, 0.6, 0.5, 1.01]])).improves
        True
        >>> HeldOut(torch.ones(4), torch.tensor([[0.9, 1.6, 0.5, 1.01]])).improves
        False

        """
        after = self.after[self.best]
        if not bool(after.sum() < self.before.sum()):
            return False
        if bool((after < self.before).all()):
            return True
        if not bool((self.before > 0).all()):
            return False
        gain = 1 - after / self.before
        return bool(gain.mean() > student_margin(gain))


def held_out(
    folds: Sequence[NormalEquations],
    penalties: Sequence[float],
    rank: int,
    present: Solution,
    prior: Tensor | None = None,
    rounded: Callable[[LowRank], LowRank] = lambda branch: branch,
) -> HeldOut:
    """Cross-validate rank-R solutions against the present map in closed form.

    Args:
        folds: normal equations of disjoint sets of rows, at least two, each with rows.
        penalties: candidates, see :func:`reduced_rank`.
        rank: of every candidate, in every fold.
        present: (F, O) and (O,), the map to beat. It is judged on the same rows.
        prior: see :func:`reduced_rank`.
        rounded: how a solution is stored; it is judged as stored.

    Raises:
        CalibrationError: fewer than two folds, or a fold without rows.

    """

    def solve(rest: NormalEquations, penalties: Sequence[float]) -> Iterable[Solution]:
        return (rounded(reduced_rank(rest, p, rank, prior)).solution for p in penalties)

    return cross_validated(folds, penalties, present, solve)


def cross_validated(
    folds: Sequence[NormalEquations],
    penalties: Sequence[float],
    present: Solution,
    solve: Callable[[NormalEquations, Sequence[float]], Iterable[Solution]],
) -> HeldOut:
    """Cross-validate any solution of normal equations against the present map.

    Args:
        folds: normal equations of disjoint sets of rows, at least two, each with rows.
        penalties: candidates.
        present: (F, O) and (O,), the map to beat. It is judged on the same rows.
        solve: the solutions of some equations, one per penalty; only one is held at a time.

    Raises:
        CalibrationError: fewer than two folds, or a fold without rows.

    """
    if len(folds) < 2 or not all(fold.count for fold in folds):
        raise CalibrationError(
            "cross-validation needs at least two folds, each with rows; got folds of "
            f"{[fold.count for fold in folds]} rows."
        )
    columns = []
    for f, fold in enumerate(folds):
        rest = NormalEquations.merged(other for g, other in enumerate(folds) if g != f)
        found = chain([present], solve(rest, penalties))
        columns.append(torch.cat([fold.squared_error([x]) for x in found]))
    errors = torch.stack(columns, 1)
    return HeldOut(errors[0], errors[1:])
