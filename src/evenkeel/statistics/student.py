"""How sure a mean is: Student's t, one-sided."""

from __future__ import annotations

import math

import scipy.stats
from torch import Tensor

CONFIDENCE = 0.95


def student_margin(values: Tensor, confidence: float = CONFIDENCE) -> float:
    """How far the mean of (n,) values may be off to one side, with 95 % confidence or another.

    ``t s / sqrt(n)`` with s the standard deviation and t that quantile of Student's t with n - 1
    degrees of freedom; infinity for fewer than two values.

    >>> import torch
    >>> round(student_margin(torch.tensor([1.0, 2.0, 3.0, 4.0])), 3)
    1.519

    """
    n = len(values)
    if n < 2:
        return float("inf")
    quantile = float(scipy.stats.t.ppf(confidence, n - 1))
    return quantile * float(values.double().std()) / math.sqrt(n)


def mean_and_bound(values: Tensor, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The mean of (n,) values, and its lower bound with 95 % confidence or another.

    >>> import torch
    >>> [round(v, 3) for v in mean_and_bound(torch.tensor([1.0, 2.0, 3.0, 4.0]))]
    [2.5, 0.981]

    """
    mean = float(values.mean())
    return mean, mean - student_margin(values, confidence)
