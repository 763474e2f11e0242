"""The standard error of any smooth statistic, by leaving out one group of images at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.estimate import Estimate
from evenkeel.metrics.interval import student_interval

GROUPS = 50

Statistic = Callable[[int | None], float]
"""The statistic without group g; of all units for None. A difference of two arms is one statistic:
leaving out the same images in both is what makes what they share cancel."""


def group_count(n: int, groups: int = GROUPS) -> int:
    """How many groups n units are dealt into: `groups`, or one unit each where n is smaller.

    >>> group_count(2000), group_count(7)
    (50, 7)
    """
    if n < 2 or groups < 2:
        raise MetricError(
            f"A jackknife needs at least 2 units in at least 2 groups; n is {n} and groups is "
            f"{groups}. Pass more images, or more groups."
        )
    return min(groups, n)


def group_sizes(n: int, groups: int = GROUPS) -> Tensor:
    """Units per group, shape (groups,), when unit i belongs to group i % groups.

    >>> group_sizes(7, groups=3).tolist()
    [3, 2, 2]
    """
    groups = group_count(n, groups)
    return torch.bincount(torch.arange(n) % groups, minlength=groups)


def jackknife(statistic: Statistic, n: int, groups: int = GROUPS) -> tuple[float, float]:
    """A statistic of n independent units, and its standard error.

    Unit i belongs to group i % groups. With m_g units in group g and h_g = n / m_g,

        P_g = h_g * T(all) - (h_g - 1) * T(all but g)
        centre = sum_g P_g / h_g
        stderr^2 = 1/G * sum_g (P_g - centre)^2 / (h_g - 1)

    which for a mean is unbiased whatever the sizes of the groups, and for equal sizes is the usual
    (G-1)/G * sum_g (T_g - mean T)^2. The value is T(all): it is not corrected for bias. True for
    smooth statistics of independent units; several images of one prompt are not independent, so
    pass them as one unit. Not for medians.

    Source: Busing, Meijer and van der Leeden, "Delete-m jackknife for unequal m", Statistics and
    Computing 9, 1999.

    Raises MetricError where n or groups is under 2, or a value of the statistic is not finite.

    >>> x = torch.arange(6.0)
    >>> def mean(g):
    ...     return float(x.mean() if g is None else x[torch.arange(6) != g].mean())
    >>> value, stderr = jackknife(mean, n=6)
    >>> abs(stderr - float(x.std()) / 6**0.5) < 1e-6
    True
    """
    sizes = group_sizes(n, groups).to(torch.float64)
    value = statistic(None)
    left_out = torch.tensor([statistic(g) for g in range(len(sizes))], dtype=torch.float64)
    if not (math.isfinite(value) and bool(torch.isfinite(left_out).all())):
        raise MetricError(
            f"A jackknife needs a finite statistic, with every group left out in turn; the value "
            f"is {value} and {int((~torch.isfinite(left_out)).sum())} of {len(sizes)} others are "
            "not finite. Check the scale of the features."
        )
    return value, math.sqrt(_variance(value, left_out, n / sizes))


def jackknife_estimate(*samples: tuple[Statistic, int]) -> Estimate:
    """One value with a 95 % interval, from its (statistic, n) for each independent sample in it.

    Each statistic is the same number, with groups left out of one of the samples; the variances add
    because the samples are independent. The interval uses Student's t with one degree of freedom
    less than the smallest number of groups, a little too wide where two samples contribute. The
    `n` of the result is that of the first sample.

    >>> jackknife_estimate((lambda g: 1.0, 100)).as_dict()["stderr"]
    0.0
    """
    results = [jackknife(statistic, n) for statistic, n in samples]
    n = samples[0][1]
    stderr = math.hypot(*(stderr for _, stderr in results))
    return student_interval(results[0][0], stderr, n, dof=_dof([n for _, n in samples]))


def _dof(ns: Sequence[int]) -> int:
    return min(group_count(n) for n in ns) - 1


def _variance(value: float, left_out: Tensor, h: Tensor) -> float:
    pseudo = h * value - (h - 1) * left_out
    # Weighted by size (1/h sums to one), so that for a mean the centre is the mean itself.
    centre = (pseudo / h).sum()
    return float(((pseudo - centre).square() / (h - 1)).mean())
