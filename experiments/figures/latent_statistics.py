"""Covariances between single latent elements over prompts: Q-Drift, Appendix B.4."""

from __future__ import annotations

import torch
from torch import Tensor


def distinct_pairs(elements: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, 2) pairs i != j, drawn at random."""
    i = torch.randint(elements, (count,), generator=generator)
    j = torch.randint(elements - 1, (count,), generator=generator)
    return torch.stack([i, j + (j >= i)], 1)


def absolute_correlations(a: Tensor, b: Tensor, pairs: Tensor) -> Tensor:
    """|corr| over samples of ``a[:, i]`` and ``b[:, j]`` for every pair (i, j); a and b (samples, elements).

    >>> x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 0.0]])
    >>> absolute_correlations(x, x, torch.tensor([[0, 1]]))
    tensor([1.], dtype=torch.float64)

    """
    a, b = standardized(a), standardized(b)
    return torch.cat([(a[:, i] * b[:, j]).mean(0).abs() for i, j in _columns(pairs)])


def shuffled_correlations(
    a: Tensor, b: Tensor, pairs: Tensor, generator: torch.Generator
) -> Tensor:
    """The same after the samples of every pair's second element were permuted."""
    a, b = standardized(a), standardized(b)
    found = []
    for i, j in _columns(pairs):
        order = torch.rand(len(b), len(j), generator=generator).argsort(0)
        found.append((a[:, i] * b[:, j].gather(0, order)).mean(0).abs())
    return torch.cat(found)


def standardized(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 over samples, float64."""
    centred = values.double() - values.double().mean(0)
    return centred / centred.square().mean(0).sqrt()


def _columns(pairs: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part[:, 0], part[:, 1]) for part in pairs.split(1000)]


def diagonals(a: Tensor, b: Tensor) -> Tensor:
    """Covariance over samples of every element of ``a`` with the same of ``b``; (samples, ...) to (...)."""
    a, b = a.double(), b.double()
    return ((a - a.mean(0)) * (b - b.mean(0))).sum(0) / (len(a) - 1)


def spread(diagonal: Tensor, noise: Tensor) -> dict[str, list[float] | float]:
    """Of diagonal entries (channels, positions): the paper's marker and error bar, and their ratio.

    Args:
        diagonal: entries.
        noise: sampling variance of each entry; what is left of the spread without it is also given.

    """
    mean, within = diagonal.mean(1), diagonal.std(1)
    left = (within.square() - noise.mean(1)).clamp_min(0).sqrt()
    between = mean.std()
    return {
        "mean": mean.tolist(),
        "within": within.tolist(),
        "within without sampling noise": left.tolist(),
        "ratio": float(within.mean() / between),
        "ratio without sampling noise": float(left.mean() / between),
    }


def diagonal_noise(a: Tensor, b: Tensor) -> Tensor:
    """Sampling variance of ``diagonals(a, b)``: variance over samples of the products, over their number."""
    a, b = a.double(), b.double()
    return ((a - a.mean(0)) * (b - b.mean(0))).var(0) / len(a)


def inside_ellipse(x: Tensor, y: Tensor, radius: float) -> float:
    """Share of points within ``radius`` standard deviations of their mean, by their own covariance.

    A Gaussian pair has 1 - exp(-radius^2 / 2) of them there.
    """
    points = torch.stack([x, y], 1).double()
    centred = points - points.mean(0)
    inverse = torch.linalg.inv(centred.T @ centred / len(centred))
    squared = ((centred @ inverse) * centred).sum(1)
    return float((squared <= radius**2).double().mean())
