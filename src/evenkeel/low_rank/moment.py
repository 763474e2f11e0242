"""Second moments from a sample of rows: a matrix, or where that would be large the rows themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.exact import working

RIDGE = 1e-3  # of the mean diagonal: directions that the few rows did not show are not free
WIDE = 2048  # features from which no matrix is made


@dataclass(frozen=True)
class RowMoment:
    """``rows^T rows + diag(diagonal)``, never made: ``moment @ x`` is all that is needed of it.

    Attributes:
        rows: (n, F) float32, what one over n and the shrinkage leave of each.
        diagonal: (F,) float32.

    >>> RowMoment(torch.ones(1, 2), torch.ones(2)) @ torch.eye(2)
    tensor([[2., 1.],
            [1., 2.]])

    """

    rows: Tensor
    diagonal: Tensor

    def __len__(self) -> int:
        return len(self.diagonal)

    def __matmul__(self, right: Tensor) -> Tensor:
        return self.rows.T @ (self.rows @ right) + self.diagonal[:, None] * right


Moment = Tensor | RowMoment


def times(moment: Moment, right: Tensor) -> Tensor:
    """``moment @ right`` (F, n), computed in the moment's precision and given in that of ``right``."""
    like = moment if isinstance(moment, Tensor) else moment.diagonal
    return (moment @ right.to(like)).to(right)


def second_moment(rows: Tensor, ridge: float = RIDGE, wide: int = WIDE) -> Moment:
    """(F, F) mean of ``x x^T`` over rows (n, F), drawn to its diagonal where rows are few.

    What stands beside the diagonal is multiplied by one minus the share of it that is chance,
    ``sum Var(s_ij) / sum s_ij^2`` over i != j (Schaefer & Strimmer 2005, target D), with
    ``Var(s_ij) = (mean(x_i^2 x_j^2) - s_ij^2) / n``, whose first sum is ``mean(|x|^4 - sum x_i^4)``. On
    top stands ``ridge`` times the mean diagonal.

    Args:
        rows: (n, F).
        ridge: of the mean diagonal.
        wide: with more features than these the rows are kept in place of a matrix of F x F, in float32;
            a matrix has float64 on the CPU, float32 elsewhere.

    Raises:
        CalibrationError: no rows, or values that are not finite.

    >>> second_moment(torch.ones(1000, 2)).round(decimals=2).tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    """
    n, features = rows.shape
    x = rows.detach().float() if features > wide else working(rows)
    squares = x.square()
    diagonal = squares.sum(0) / max(n, 1)
    if not n or not bool(diagonal.isfinite().all()):
        raise CalibrationError(
            f"expected rows with finite values to estimate a second moment from; got {n} rows"
            f"{' with NaN or infinity' if n else ''}."
        )
    # Of few rows the smaller product has the same norm.
    product = (x @ x.T if n < features and features > wide else x.T @ x) / n
    signal = product.square().sum() - diagonal.square().sum()
    chance = ((squares.sum(1).square() - squares.square().sum(1)).mean() - signal) / n
    share = 1 - (chance / signal).clamp(0, 1) if signal > 0 else torch.ones_like(signal)
    whole = diagonal + ridge * diagonal.mean() + torch.finfo(x.dtype).tiny
    if features > wide:
        return RowMoment(x * (share / n).sqrt(), whole - share * diagonal)
    moment = share * product
    moment.diagonal().copy_(whole)
    return moment


def moment_as_it_is(rows: Tensor) -> Moment:
    """``mean(x x^T)`` over rows (n, F), not shrunk: to check on what was fitted to others, in float32."""
    rows = rows.float() / max(len(rows), 1) ** 0.5
    few = len(rows) < rows.shape[1]
    return RowMoment(rows, rows.new_zeros(rows.shape[1])) if few else rows.T @ rows
