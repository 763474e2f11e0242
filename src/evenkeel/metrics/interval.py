"""From a standard error to an interval: Student's t, in one place."""

from __future__ import annotations

import math

import scipy.stats

from evenkeel.estimate import Estimate

CONFIDENCE = 0.95


def student_interval(value: float, stderr: float, n: int, dof: int) -> Estimate:
    """The two-sided 95 % interval of a value whose standard error was itself estimated.

    value -+ t * stderr, with t the 97.5 % quantile of Student's t with `dof` degrees of freedom.
    The value is taken to be close to normally distributed: true of means over many images, less so
    of a distance that is almost zero.

    >>> round(student_interval(0.0, 1.0, n=50, dof=49).high, 3)
    2.01
    """
    # Below one degree of freedom the quantile is undefined, and so is the interval.
    quantile = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, dof)) if dof >= 1 else math.nan
    reach = quantile * stderr
    return Estimate(value, stderr, value - reach, value + reach, n)
