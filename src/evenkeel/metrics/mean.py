"""The mean of one number per image, and the mean of a paired difference."""

from __future__ import annotations

import math

from torch import Tensor

from evenkeel.estimate import Estimate
from evenkeel.metrics.inputs import check_paired, checked_values
from evenkeel.metrics.interval import student_interval


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of one value per independent image, with its standard error and t interval.

    mean +- t * s / sqrt(n), s the unbiased standard deviation, t with n - 1 degrees of freedom.
    For n = 1 there is a mean but no standard error: stderr, low and high are NaN.

    values: (n,), any floating dtype, computed in float64. Raises MetricError for NaN, infinity (the
    PSNR of identical images: see `psnr`), another number of dimensions, or no values.

    >>> import torch
    >>> estimate = mean_estimate(torch.tensor([1.0, 2.0, 3.0]))
    >>> estimate.value, round(estimate.stderr, 4)
    (2.0, 0.5774)
    """
    values = checked_values(values, "values")
    n = len(values)
    stderr = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return student_interval(float(values.mean()), stderr, n, dof=n - 1)


def mean_difference(a: Tensor, b: Tensor) -> Estimate:
    """By how much the mean of a exceeds that of b, when value i of both is of the same image.

    `mean_estimate` of a - b: what prompts and noise contribute to both arms cancels.

    a, b: (n,). Raises MetricError for unequal shapes, NaN, infinity, or no values.

    >>> import torch
    >>> mean_difference(torch.tensor([1.0, 20.0, 300.0]), torch.tensor([0.0, 19.0, 299.0])).stderr
    0.0
    """
    check_paired(a, b, ("a", "b"))
    return mean_estimate(checked_values(a, "a") - checked_values(b, "b"))
