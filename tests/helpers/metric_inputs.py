"""What the tests of metrics share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evenkeel.metrics import (
    frechet_difference,
    frechet_distance,
    kernel_difference,
    kernel_distance,
)

NAN = math.nan
BOTH_DISTANCES = pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
BOTH_DIFFERENCES = pytest.mark.parametrize(
    ("difference", "distance"),
    [(frechet_difference, frechet_distance), (kernel_difference, kernel_distance)],
)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, d: int, seed: int) -> Tensor:
    return normal(n, d, seed=seed) @ normal(d, d, seed=seed + 1000) + normal(d, seed=seed + 2000)


def frechet_by_svd(x: Tensor, y: Tensor) -> float:
    """tr sqrt(S1 S2) as the nuclear norm of A B^T, where S1 = A^T A and S2 = B^T B."""
    a = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    nuclear = torch.linalg.svdvals(a @ b.T).sum()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return float(shift + a.square().sum() + b.square().sum() - 2 * nuclear)
