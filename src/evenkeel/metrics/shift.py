"""How far the mean of one number per picture has moved, whichever way."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.estimate import Estimate
from evenkeel.metrics.inputs import check_paired, checked_values
from evenkeel.metrics.jackknife import group_count, group_sizes, jackknife_estimate


def shift(values: Tensor, reference: Tensor) -> Estimate:
    """The absolute difference of the means, |mean(values) - mean(reference)|, with a jackknife interval.

    What is common to all pictures: that some became brighter and others darker cancels. Like every absolute
    value it is biased upwards where nothing has moved, by at most its standard error.

    Args:
        values: (n,), n >= 2.
        reference: (n,), entry i from the same prompt and noise.

    Raises:
        MetricError: unequal shapes, NaN, infinity, fewer than two values.

    >>> x = torch.linspace(0, 1, 50, dtype=torch.float64)
    >>> round(shift(x - 0.2, x).value, 6)
    0.2

    """
    check_paired(values, reference, ("values", "reference"))
    moved = _Means(values, reference)
    return jackknife_estimate((lambda g: abs(moved.without(g)), len(values)))


def shift_difference(a: Tensor, b: Tensor, reference: Tensor) -> Estimate:
    """By how much the shift of a exceeds that of b, the same pictures left out of both: below 0, a is better.

    Shapes and errors as for :func:`shift`.

    >>> x = torch.linspace(0, 1, 50, dtype=torch.float64)
    >>> round(shift_difference(x - 0.2, x + 0.3, x).value, 6)
    -0.1

    """
    check_paired(a, b, ("a", "b"))
    check_paired(a, reference, ("a", "reference"))
    first, second = _Means(a, reference), _Means(b, reference)
    return jackknife_estimate((lambda g: abs(first.without(g)) - abs(second.without(g)), len(a)))


class _Means:
    """The mean of what was moved, and without a group."""

    def __init__(self, values: Tensor, reference: Tensor) -> None:
        moved = checked_values(values, "values") - checked_values(reference, "reference")
        groups = group_count(len(moved))
        self._sums = torch.stack([moved[g::groups].sum() for g in range(groups)])
        self._sizes = group_sizes(len(moved)).to(moved)

    def without(self, group: int | None) -> float:
        kept = torch.ones_like(self._sizes)
        if group is not None:
            kept[group] = 0
        return float(kept @ self._sums / (kept @ self._sizes))
