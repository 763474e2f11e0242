"""The part of a weight that a few directions carry."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError


def best_low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of two thin matrices that is nearest to ``weight`` in the Frobenius norm.

    W = U diag(s) V^T;  L = U_r diag(s_r)^(1/2),  R = diag(s_r)^(1/2) V_r^T;  L R is the best
    matrix of rank r (Eckart and Young 1936), with error (sum of s_k^2 over k > r)^(1/2).
    The square roots give both factors the same norm, which suits 16-bit storage.
    SVDQuant (arXiv:2411.05007) quantizes W - L R instead of W; it smooths outliers first, which
    is not done here.

    Args:
        weight: (out, in), floating point. The SVD runs in float64.
        rank: 1 to min(out, in).

    Returns:
        L (out, rank) and R (rank, in), float32, on the weight's device.

    Raises:
        QuantizationError: not a finite matrix, or rank out of range.

    >>> left, right = best_low_rank(torch.outer(torch.arange(3.0), torch.arange(4.0)), 1)
    >>> (left @ right)[2, 3].round(decimals=4)
    tensor(6.)

    """
    if weight.ndim != 2 or not bool(torch.isfinite(weight).all()):
        raise QuantizationError(
            "A low-rank factorization needs a finite matrix (out, in), got shape "
            f"{tuple(weight.shape)}{'' if weight.ndim != 2 else ' with NaN or infinity in it'}."
        )
    if not 1 <= rank <= min(weight.shape):
        raise QuantizationError(
            f"rank must be from 1 to {min(weight.shape)} for a weight of shape "
            f"{tuple(weight.shape)}, got {rank}."
        )
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    # LAPACK returns columns; another memory layout would round a product differently.
    left, right = u[:, :rank] * root, root[:, None] * vh[:rank]
    return left.float().contiguous(), right.float().contiguous()
