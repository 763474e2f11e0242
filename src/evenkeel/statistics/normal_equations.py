"""Normal equations of a linear regression, streamed row by row, and ridge solutions of them.

Rows on the CPU are summed in float64. Those on another device are summed there (``RowSums``) until
somebody asks for a solution; ``settle`` brings the sums of several equations in one transfer.

The centred scatter matrix of the features is kept in LAPACK's rectangular full packed format: half
the memory of a square matrix at the speed of one. At FLUX's width (3,072 features) a fold of the
cross-validation costs 38 MB, so that two folds, their sum and its factor fit in 200 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from evenkeel.errors import OVERFLOW, CalibrationError
from evenkeel.statistics.exact import Pending, settled, working_dtype
from evenkeel.statistics.row_sums import RowSums

Array = NDArray[np.float64]
Solution = tuple[Tensor, Tensor]  # (F, O) weights and (O,) constant
CHUNK = 512  # rows turned to float64 at a time
SMALLEST_PENALTY = 1e-12  # where a singular system starts, in units of its scale
ROUNDING = 3e-13  # an eigenvalue of a correlation matrix below this is rounding
ROUNDING_OF_FLOAT32 = 1e-6  # the same of sums that were taken on a device
NOT_FINITE = f"a feature or target is not finite (NaN or infinity); {OVERFLOW}"


@dataclass
class NormalEquations:
    """Sums over rows (h, t) of features h in R^F and targets t in R^O, centred, in float64.

    Rows stream in with ``add``; ``merged`` joins disjoint sets of rows exactly. Without
    ``intercept`` the sums are taken about zero and a solution has no constant term.

    Attributes:
        features, targets: F and O.
        intercept: whether a constant is fitted beside the features.
        count: rows seen.
        mean_h, mean_t: (F,) and (O,); zero without an intercept.
        hh: scatter of the features, packed, F (F + 1) / 2.
        ht: (F, O) scatter of features with targets.
        tt: (O,) scatter of each target.
        rounding: an eigenvalue of the features' correlation matrix below this is rounding.

    >>> h, t = torch.randn(50, 3), torch.randn(50, 2)
    >>> equations = NormalEquations(3, 2)
    >>> equations.add(h[:20], t[:20]); equations.add(h[20:], t[20:])
    >>> weight, constant = equations.solve([0.0])[0]
    >>> torch.allclose(weight, torch.linalg.lstsq(h - h.mean(0), t - t.mean(0)).solution.double(),
    ...                atol=1e-5)
    True

    """

    features: int
    targets: int
    intercept: bool = True
    count: int = 0
    mean_h: Array = field(init=False)
    mean_t: Array = field(init=False)
    hh: Array = field(init=False)
    ht: Array = field(init=False)
    tt: Array = field(init=False)
    rounding: float = field(default=ROUNDING, init=False)
    _waiting: RowSums | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.mean_h, self.mean_t = np.zeros(self.features), np.zeros(self.targets)
        self.hh = np.zeros(self.features * (self.features + 1) // 2)
        self.ht, self.tt = np.zeros((self.features, self.targets)), np.zeros(self.targets)

    def add(self, h: Tensor, t: Tensor) -> None:
        """Take in rows h (..., F) and t (..., O) of any float dtype and device.

        Raises:
            CalibrationError: shapes that do not belong together, or a value that is not finite;
                the sums are then as they were before. Of rows on a device it is found, and all that
                waited there is dropped, when they are settled.

        """
        widths = (h.shape[-1:], t.shape[-1:])
        if h.shape[:-1] != t.shape[:-1] or widths != ((self.features,), (self.targets,)):
            raise CalibrationError(
                f"expected rows of {self.features} features and {self.targets} targets; got "
                f"{tuple(h.shape)} and {tuple(t.shape)}."
            )
        h, t = h.reshape(-1, self.features), t.reshape(-1, self.targets)
        if working_dtype(h.device) != torch.float64:
            if self._waiting is None:
                self._waiting = RowSums(self.features, self.targets, self.intercept)
            self._waiting.add(h, t)
            return
        starts = range(0, len(h), CHUNK)
        for x in (h, t):
            # Before anything is added, so that a refusal leaves no half of the rows behind.
            if not all(bool(x[s : s + CHUNK].isfinite().all()) for s in starts):
                raise CalibrationError(NOT_FINITE)
        for s in starts:
            self._add(_float64(h[s : s + CHUNK]), _float64(t[s : s + CHUNK]))

    @property
    def pending(self) -> list[Pending[None]]:
        """What still lies on a device; once settled it is among the sums. Empty on the CPU."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or not waiting.count:
            return []

        def finish(
            pilot: Tensor, rows: Tensor, hh: Tensor, ht: Tensor, tt: Tensor, ok: Tensor
        ) -> None:
            if not ok:
                raise CalibrationError(NOT_FINITE)
            n, f = waiting.count, self.features
            about = (rows.sum(0) / n).numpy() if self.intercept else np.zeros(len(pilot))
            mean = pilot.numpy() + about
            part = NormalEquations(self.features, self.targets, self.intercept, count=n)
            square = hh.sum(0).numpy() - n * np.outer(about[:f], about[:f])
            part.hh = lapack.dtrttf(square)[0]
            part.ht = ht.sum(0).numpy() - n * np.outer(about[:f], about[f:])
            part.tt = tt.sum(0).numpy() - n * about[f:] ** 2
            part.mean_h, part.mean_t = mean[:f], mean[f:]
            self.rounding = ROUNDING_OF_FLOAT32
            self.merge(part)

        return [Pending(waiting.tensors, finish)]

    def merge(self, part: NormalEquations) -> None:
        """Take in the rows of another set of equations, of the same features, targets and intercept."""
        if self.intercept:
            self._shift(part.count, part.mean_h, part.mean_t)
        self.hh += part.hh
        self.ht += part.ht
        self.tt += part.tt
        self.count += part.count
        self.rounding = max(self.rounding, part.rounding)

    def _add(self, h: Array, t: Array) -> None:
        n = len(h)
        if self.intercept:
            mean_h, mean_t = h.mean(0), t.mean(0)
            h, t = h - mean_h, t - mean_t
            self._shift(n, mean_h, mean_t)
        # scipy sees the C-ordered rows as a Fortran-ordered (F, n) matrix: no copy.
        self.hh = _rank_k(self.hh, h.T)
        self.ht += h.T @ t
        self.tt += (t**2).sum(0)
        self.count += n

    def _shift(self, n: int, mean_h: Array, mean_t: Array) -> None:
        """Chan's update: what ``n`` rows about another mean add to sums about the common mean."""
        total = self.count + n
        if self.count:
            weight = self.count * n / total
            dh, dt = mean_h - self.mean_h, mean_t - self.mean_t
            self.hh = _rank_k(self.hh, np.asfortranarray(dh[:, None] * np.sqrt(weight)))
            self.ht += weight * np.outer(dh, dt)
            self.tt += weight * dt**2
        self.mean_h += (mean_h - self.mean_h) * (n / total)
        self.mean_t += (mean_t - self.mean_t) * (n / total)

    def move_to(self, mean_h: Array, mean_t: Array) -> None:
        """Take the sums about another mean, (F,) and (O,): those of disjoint rows about one mean add."""
        dh, dt = self.mean_h - mean_h, self.mean_t - mean_t
        self.hh = _rank_k(self.hh, np.asfortranarray(dh[:, None] * np.sqrt(self.count)))
        self.ht += self.count * np.outer(dh, dt)
        self.tt += self.count * dt**2
        self.mean_h, self.mean_t = mean_h, mean_t

    @classmethod
    def merged(cls, parts: Iterable[NormalEquations]) -> NormalEquations:
        """The equations of all rows of ``parts`` together; a single part is returned as it is.

        Raises:
            CalibrationError: no part has rows, or they differ in features, targets or intercept.

        """
        parts = list(parts)
        settle(parts)
        parts = [p for p in parts if p.count]
        kinds = {(p.features, p.targets, p.intercept) for p in parts}
        if len(kinds) != 1:
            raise CalibrationError(
                "expected parts with rows, of the same features, targets and intercept; got "
                f"{sorted(kinds) or 'no rows'}."
            )
        if len(parts) == 1:
            return parts[0]
        out = cls(*kinds.pop())
        for part in parts:
            out.merge(part)
        return out

    @property
    def scale(self) -> float:
        """Mean diagonal of the scatter: the unit in which ridge penalties are given."""
        return float(self.hh[_diagonal_index(self.features)].mean())

    def solve(self, penalties: Sequence[float], prior: Solution | None = None) -> list[Solution]:
        """Ridge: minimize ``sum |t - D^T h - b|^2 + p scale |D - D_prior|^2``, one pair (D, b) per p.

        The constant b is not penalized. A system that is singular to rounding gets the smallest
        penalty that cures it (1e-12, then a hundredfold): few rows cannot determine many features.
        Features that never vary, or no rows at all, leave D at its prior.

        Args:
            penalties: in units of ``scale``; finite, not negative.
            prior: what D is drawn to (its constant is not used); zero without.

        Returns:
            (F, O) and (O,) float64 tensors for every penalty.

        Raises:
            CalibrationError: a penalty that is negative or not finite, features too large to square
                in float64, or a prior that is not finite or of another shape.

        """
        settle([self])
        start = np.zeros_like(self.ht) if prior is None else self._checked(prior)[0]
        return [self._solve(p, start) for p in penalties]

    def _solve(self, penalty: float, start: Array) -> Solution:
        found = start
        if self.scale != 0:
            factor, used = self._factor(penalty)
            found, _ = lapack.dpftrs(self.features, factor, self.ht + used * start)
        constant = self.mean_t - self.mean_h @ found
        return torch.from_numpy(found.copy(order="C")), torch.from_numpy(constant)

    def _factor(self, penalty: float) -> tuple[Array, float]:
        """Cholesky factor of the penalized scatter, and what was added to the diagonal."""
        scale = self.scale
        while True:
            added = penalty * scale
            if not (penalty >= 0 and np.isfinite(added)):
                raise CalibrationError(
                    f"expected a finite penalty of at least 0, and finite sums; got {penalty} times "
                    f"the mean scatter {scale}."
                )
            packed = self.hh.copy()
            packed[_diagonal_index(self.features)] += added
            root = np.sqrt(packed[_diagonal_index(self.features)])
            factor, info = lapack.dpftrf(self.features, packed, overwrite_a=1)
            # LAPACK accepts a pivot of pure rounding, as often positive as not; a penalty excludes it.
            safe = added > 100 * self.rounding * root.max() ** 2
            if not info and (safe or _smallest_correlation(factor, root) > self.rounding):
                return factor, added
            del packed, factor  # a matrix less while the next one is made
            penalty = max(penalty * 100, SMALLEST_PENALTY)

    def _checked(self, solution: Solution) -> tuple[Array, Array]:
        """A pair (D, b) as float64 arrays; numpy would broadcast one of another shape."""
        weight, constant = _float64(solution[0]), _float64(solution[1])
        if (weight.shape, constant.shape) != (self.ht.shape, self.tt.shape):
            raise CalibrationError(
                f"expected a solution of shapes {self.ht.shape} and {self.tt.shape}; got "
                f"{weight.shape} and {constant.shape}."
            )
        if not (np.isfinite(weight).all() and np.isfinite(constant).all()):
            raise CalibrationError("a prior or solution is not finite (NaN or infinity).")
        return weight, constant

    def squared_error(self, solutions: Sequence[Solution]) -> Tensor:
        """Sum over rows and targets of ``|t - D^T h - b|^2`` for every pair (D, b): (solutions,).

        It is a difference of sums, so an error below about 1e-14 of the targets' own scatter is lost.

        Raises:
            CalibrationError: a solution that is not finite or of another shape, or, without
                ``intercept``, one with a constant.

        """
        settle([self])
        diagonal, outer, errors = _diagonal_index(self.features), np.zeros_like(self.hh), []
        for d, constant in map(self._checked, solutions):
            # tr D^T H D = <H, D D^T>: both packed, so that no square matrix is needed.
            outer = _rank_k(outer, np.asfortranarray(d), keep=0.0)
            explained = 2 * (self.hh @ outer) - self.hh[diagonal] @ outer[diagonal]
            spread = self.tt.sum() - 2 * (d * self.ht).sum() + explained
            offset = self.mean_t - self.mean_h @ d - constant
            if not self.intercept and offset.any():
                raise CalibrationError("sums about zero cannot judge a solution with a constant.")
            errors.append(max(spread, 0.0) + self.count * (offset**2).sum())
        return torch.tensor(errors, dtype=torch.float64)


def settle(equations: Iterable[NormalEquations]) -> None:
    """Bring what lies on a device into the sums, in one transfer.

    Raises:
        CalibrationError: a row was not finite.

    """
    settled(p for e in equations for p in e.pending)


def held_out_errors(
    folds: Sequence[NormalEquations],
    penalties: Sequence[float],
    priors: Sequence[Solution] | None = None,
) -> tuple[Tensor, list[list[Solution]]]:
    """Cross-validate the ridge penalty in closed form: no row is looked at again.

    Args:
        folds: normal equations of disjoint sets of rows, at least two with rows.
        penalties: candidates, in units of each system's ``scale``.
        priors: per fold, what the solution of the *other* folds is drawn to.

    Returns:
        (penalties,) sum over folds of the squared error on the fold of the solution without it, and
        these solutions: [fold][penalty].

    Raises:
        CalibrationError: fewer than two folds with rows, or not one prior per fold.

    """
    settle(folds)
    if sum(fold.count > 0 for fold in folds) < 2:
        raise CalibrationError(
            "cross-validation needs at least two folds with rows; got folds of "
            f"{[fold.count for fold in folds]} rows."
        )
    if priors is not None and len(priors) != len(folds):
        raise CalibrationError(f"expected {len(folds)} priors, one per fold; got {len(priors)}.")
    errors, solutions = torch.zeros(len(penalties), dtype=torch.float64), []
    for f, fold in enumerate(folds):
        rest = NormalEquations.merged(other for g, other in enumerate(folds) if g != f)
        found = rest.solve(penalties, None if priors is None else priors[f])
        errors += fold.squared_error(found)
        solutions.append(found)
    return errors, solutions


def _float64(x: Tensor) -> Array:
    """To numpy, off the device first: not every device knows float64."""
    return x.detach().cpu().double().numpy()


def _rank_k(packed: Array, columns: Array, keep: float = 1.0) -> Array:
    """``keep packed + columns columns^T`` for a Fortran-ordered (F, k) matrix, in place."""
    out: Array = lapack.dsfrk(*columns.shape, 1.0, columns, keep, packed, overwrite_c=1)
    return out


def _smallest_correlation(factor: Array, root: Array) -> float:
    """Smallest eigenvalue of a factorized matrix in units of its diagonal, by inverse iteration."""
    x = np.random.default_rng(0).standard_normal((len(root), 1))
    for _ in range(3):
        x = root[:, None] * (x / np.linalg.norm(x))
        x = root[:, None] * lapack.dpftrs(len(root), factor, x)[0]
    return float(1 / np.linalg.norm(x))


@cache
def _diagonal_index(n: int) -> NDArray[np.int64]:
    """Where the diagonal of an n x n matrix lies in the packed array (LAPACK's RFP, N, U)."""
    j, k = np.arange(n), n // 2
    # Columns k..n-1 of the upper triangle are stored as they are; the leading k x k triangle
    # lies transposed below them. One column holds n + 1 entries if n is even, n if it is odd.
    height = n + 1 if n % 2 == 0 else n
    return np.where(j >= k, (j - k) * height + j, j * height + j + k + 1).astype(np.int64)
