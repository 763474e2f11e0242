"""Weights as trained layers have them, drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def decaying(out: int, width: int, seed: int = 0) -> Tensor:
    """A weight with a few strong directions and an input channel of outliers."""
    weight = 0.05 * gaussian(out, width, seed=seed)
    for k in range(4):
        left, right = gaussian(out, 1, seed=seed + 10 + k), gaussian(1, width, seed=seed + 20 + k)
        weight = weight + left @ right * 0.5**k
    weight[:, 3] *= 6
    return weight
