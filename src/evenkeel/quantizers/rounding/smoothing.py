"""Smoothing: outlying input channels are divided down, and the weight multiplied up in return."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError

Exponents = tuple[float, float]


@dataclass(frozen=True)
class Smoothing:
    """The best of a search: factors (in,), the exponents they came from, and their error."""

    factors: Tensor
    alpha: float
    beta: float
    error: float


def channel_span(x: Tensor) -> Tensor:
    """The largest magnitude of every input channel.

    Args:
        x: (..., in), inputs of a layer, or its weight (out, in).

    Returns:
        (in,), same dtype.

    Raises:
        QuantizationError: empty, or NaN or infinity.

    >>> channel_span(torch.tensor([[1.0, -2.0], [-3.0, 0.0]]))
    tensor([3., 2.])

    """
    span = x.detach().abs().reshape(-1, x.shape[-1]).amax(0)
    if not bool(torch.isfinite(span).all()):
        raise QuantizationError(
            f"{int((~torch.isfinite(span)).sum())} of {span.numel()} channels hold NaN or infinity. "
            "Run the pipeline in a wider dtype (bfloat16 or float32) and calibrate again."
        )
    return span


def factors(inputs: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """What every input channel is divided by, and its column of the weight multiplied with.

    s = max|x|^alpha / max|w|^beta;  (x / s) (W diag(s))^T = x W^T  (SmoothQuant, arXiv:2211.10438,
    equation 4, with beta = 1 - alpha; SVDQuant, arXiv:2411.05007, section 4.2). A channel that is
    zero on either side keeps s = 1. SVDQuant's released code sets all channels to 1 as soon as one
    factor is infinite; a dead weight column says nothing about the others, so this does not.

    Args:
        inputs: (in,), spans of the inputs.
        weight: (in,), spans of the weight's columns.
        alpha: exponent of the inputs, 0 to 1.
        beta: exponent of the weight, 0 to 1.

    Returns:
        (in,), positive, finite, same dtype.

    Raises:
        QuantizationError: an exponent outside 0..1, or shapes that differ.

    >>> factors(torch.tensor([4.0, 0.0]), torch.tensor([16.0, 1.0]), 0.5, 0.5)
    tensor([0.5000, 1.0000])

    """
    if not (0 <= alpha <= 1 and 0 <= beta <= 1) or inputs.shape != weight.shape:
        raise QuantizationError(
            f"exponents are from 0 to 1 and spans have one shape, got alpha={alpha}, beta={beta}, "
            f"{tuple(inputs.shape)} and {tuple(weight.shape)}."
        )
    found = inputs.pow(alpha) / weight.pow(beta)
    good = torch.isfinite(found) & (found >= torch.finfo(found.dtype).tiny)
    return torch.where(good, found, torch.ones_like(found))


def factors_as(dtype: torch.dtype, found: Tensor) -> Tensor:
    """Factors rounded to the dtype they are stored in; 1 where that has no positive value for one.

    >>> factors_as(torch.float16, torch.tensor([3.0, 1e-30]))
    tensor([3., 1.])
    """
    kept = found.to(dtype).to(found.dtype)
    return torch.where(torch.isfinite(kept) & (kept > 0), kept, torch.ones_like(kept))


def exponents(grids: int = 20) -> tuple[Exponents, ...]:
    """The pairs (alpha, beta) that SVDQuant tries, no smoothing first.

    (0, 0), then (alpha, 0) and (alpha, 1 - alpha) for alpha = 1/n .. (n - 1)/n.

    Args:
        grids: n, at least 2; SVDQuant's is 20, which makes 39 pairs.

    Raises:
        QuantizationError: fewer than 2.

    >>> exponents(2), len(exponents())
    (((0.0, 0.0), (0.5, 0.0), (0.5, 0.5)), 39)

    """
    if type(grids) is not int or grids < 2:
        raise QuantizationError(f"grids must be an integer of at least 2, got {grids!r}.")
    steps = [i / grids for i in range(1, grids)]
    return ((0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps))


def search(
    inputs: Tensor,
    weight: Tensor,
    objective: Callable[[Tensor], float],
    pairs: Sequence[Exponents] | None = None,
) -> Smoothing:
    """The factors with the least error; of equal ones those tried first.

    Args:
        inputs: (in,), spans of the inputs.
        weight: (in,), spans of the weight's columns.
        objective: the layer's error with these factors (in,), in any unit.
        pairs: what to try; None is :func:`exponents`.

    Raises:
        QuantizationError: nothing to try, or an error that is not a number.

    >>> spans = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0])
    >>> search(*spans, lambda s: float((s[0] - 2).abs())).alpha
    0.5

    """
    best: Smoothing | None = None
    for alpha, beta in exponents() if pairs is None else pairs:
        tried = factors(inputs, weight, alpha, beta)
        error = objective(tried)
        if not math.isfinite(error):
            raise QuantizationError(
                f"the error with alpha={alpha}, beta={beta} is {error}: the layer overflows. "
                "Run the pipeline in a wider dtype (bfloat16 or float32)."
            )
        if best is None or error < best.error:
            best = Smoothing(tried, alpha, beta, error)
    if best is None:
        raise QuantizationError("a smoothing search needs at least one pair of exponents.")
    return best
