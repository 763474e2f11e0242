"""What of a layer's input rounding is a linear map of the input."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from evenkeel.low_rank.moment import WIDE, Moment, times
from evenkeel.statistics.exact import working

PENALTIES = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # of the mean diagonal of S


def rounding_slope(
    inputs: Tensor, noise: Tensor, folds: Tensor, outputs: Moment | None = None
) -> Tensor:
    """The map K (O, F) that predicts the rounding noise of a layer from its input, or zero.

    ``K = N (S + penalty mean(diag S))^-1`` with N = E[noise x^T] and S = E[x x^T]. Coarse rounding is not
    independent of what it rounds: values below half a step become zero. The penalty is the one with the
    smallest error in the fold that was not used, each fold once, measured by ``tr(G E[e e^T])``; without an
    improvement there K is zero. So the map that an adapter should be is W - W_q + K, drawn to W - W_q.

    Args:
        inputs: x, (n, F) rows that entered the layer.
        noise: ``W_q x + b`` minus what the layer gave, (n, O).
        folds: (n,) bool, rows of one fold.
        outputs: G (O, O), how the output feels the layer's; None is the identity.

    >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    >>> slope = rounding_slope(x, 0.5 * x[:, :1], torch.arange(400) % 2 == 0)
    >>> bool((slope - torch.tensor([[0.5, 0.0, 0.0]])).abs().max() < 0.01)
    True

    """
    x = inputs.float() if inputs.shape[1] > WIDE else working(inputs)
    noise = noise.to(x)

    def size(rows: Tensor) -> float:
        felt = rows.T if outputs is None else times(outputs, rows.T)
        return float((felt * rows.T).sum())

    before = size(noise)
    after = dict.fromkeys(PENALTIES, 0.0)
    for fold, penalty in product((folds, ~folds), PENALTIES):
        slope = _ridge(x[~fold], noise[~fold], penalty)
        after[penalty] += size(noise[fold] - x[fold] @ slope.T)
    best = min(PENALTIES, key=lambda p: after[p])
    if not after[best] < before:
        return torch.zeros(noise.shape[1], x.shape[1]).to(x)
    return _ridge(x, noise, best)


def _ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """(O, F); of fewer rows than features by the matrix of rows, which gives the same."""
    n, features = x.shape
    ridge = penalty * x.square().sum() / features + torch.finfo(x.dtype).tiny
    gram = x @ x.T if n < features else x.T @ x
    gram.diagonal().add_(ridge)
    few = n < features
    solved: Tensor = torch.linalg.solve(gram, y if few else x.T @ y).T
    return solved @ x if few else solved
