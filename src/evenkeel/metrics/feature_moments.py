"""Mean and covariance of features, of all rows and with one group of rows left out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from evenkeel.errors import MetricError

ROUNDING = 1e-11
"""How far below zero an eigenvalue may fall, as a part of the trace, and still be called rounding:
45 000 times the spacing of float64, for eigen-solvers and for the subtraction of one group."""


@dataclass(frozen=True)
class Gaussian:
    """A mean (d,) and a covariance (d, d), float64.

    >>> Gaussian(torch.zeros(2).double(), 4 * torch.eye(2).double()).root.tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        d = self.mean.shape[-1] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (d, d):
            raise MetricError(
                "A Gaussian needs a mean (d,) and a covariance (d, d); the shapes are "
                f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}."
            )
        if {self.mean.dtype, self.covariance.dtype} != {torch.float64}:
            raise MetricError(
                "A Gaussian needs a float64 mean and covariance; they are "
                f"{self.mean.dtype} and {self.covariance.dtype}. Convert them with .double()."
            )
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise MetricError(
                "A Gaussian needs a finite mean and covariance; NaN or infinity was found. "
                "Features above 1e150 overflow when squared: check their scale."
            )
        # The eigen-solver reads one triangle only and would never notice.
        asymmetry = float((self.covariance - self.covariance.T).abs().max())
        if asymmetry > ROUNDING * float(self.covariance.abs().max()):
            raise MetricError(
                f"A covariance must be symmetric; entries differ from their mirror image by up to "
                f"{asymmetry:g}. Pass x.T @ x / (n - 1) of centred rows x."
            )

    @cached_property
    def trace(self) -> float:
        """The total variance."""
        return float(self.covariance.trace())

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, (d, d), which may be rank-deficient."""
        eigenvalues, vectors = torch.linalg.eigh(self.covariance)
        roots = root_of_eigenvalues(eigenvalues, self.trace, "A covariance")
        root: Tensor = (vectors * roots) @ vectors.T
        return root


def root_of_eigenvalues(eigenvalues: Tensor, scale: float, name: str) -> Tensor:
    """Square roots of eigenvalues that are negative by rounding at most.

    Raises MetricError where one is below -ROUNDING * scale: then the matrix is no covariance, and
    taking the real part of its complex root would hide that.
    """
    lowest = float(eigenvalues.min())
    if lowest < -ROUNDING * abs(scale):
        raise MetricError(
            f"{name} must have no negative eigenvalues; the lowest is {lowest:g}, where the trace "
            f"is {scale:g}. Check the features for rows many orders of magnitude above the rest."
        )
    return eigenvalues.clamp_min(0).sqrt()


class GroupMoments:
    """Mean and unbiased covariance of features (n, d), with any group i % groups left out.

    The n rows are summed once; leaving a group out subtracts the sums over its rows only. Rows are
    centred first, so that a large common mean costs no digits.

    >>> x = torch.tensor([[0.0], [2.0], [100.0]], dtype=torch.float64)
    >>> rest = GroupMoments(x, groups=3).without(2)
    >>> round(float(rest.mean), 6), round(float(rest.covariance), 6)
    (1.0, 2.0)
    """

    def __init__(self, features: Tensor, groups: int) -> None:
        self._groups = groups
        self._centre = features.mean(0)
        self._rows = features - self._centre
        self._sum = self._rows.sum(0)
        self._products = self._rows.T @ self._rows

    @cached_property
    def all(self) -> Gaussian:
        """Of all rows."""
        return self._gaussian(len(self._rows), self._sum, self._products)

    def without(self, group: int | None) -> Gaussian:
        """Of all rows outside the group; of all rows for None."""
        if group is None:
            return self.all
        rows = self._rows[group :: self._groups]
        n = len(self._rows) - len(rows)
        return self._gaussian(n, self._sum - rows.sum(0), self._products - rows.T @ rows)

    def _gaussian(self, n: int, total: Tensor, products: Tensor) -> Gaussian:
        mean = total / n
        covariance = (products - n * torch.outer(mean, mean)) / (n - 1)
        return Gaussian(mean + self._centre, covariance)
