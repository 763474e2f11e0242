"""A low-rank branch and the rounded residual beside it, refined against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.statistics.exact import at_home

Decomposition = Literal["exact", "randomized"]

_SEED = 0
_OVERSAMPLING, _POWER_ITERATIONS = 8, 4


@dataclass(frozen=True)
class Branch:
    """up (out, rank) and down (rank, in) in the dtype they are stored in."""

    down: Tensor
    up: Tensor

    def product(self, dtype: torch.dtype) -> Tensor:
        """(out, in): what the branch carries, exactly as the stored factors say."""
        return self.up.to(dtype) @ self.down.to(dtype)


@dataclass(frozen=True)
class Refined:
    """The best branch, the rounded residual (out, in) that goes with it, and every error seen."""

    branch: Branch
    rounded: Tensor
    errors: tuple[float, ...]


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
    _check(weight, rank)
    u, s, vh = torch.linalg.svd(at_home(weight).double(), full_matrices=False)
    root = s[:rank].sqrt()
    # LAPACK returns columns; another memory layout would round a product differently.
    left, right = u[:, :rank] * root, root[:, None] * vh[:rank]
    return left.float().contiguous().to(weight.device), right.float().contiguous().to(weight.device)


def branch_of(
    weight: Tensor, rank: int, dtype: torch.dtype, decomposition: Decomposition = "exact"
) -> Branch:
    """The part of a matrix that ``rank`` directions carry, with both factors of one norm.

    Args:
        weight: (out, in), floating point.
        rank: 1 to min(out, in).
        dtype: of the factors.
        decomposition: ``exact`` is LAPACK's SVD in float64. ``randomized`` is Halko, Martinsson and
            Tropp (arXiv:0909.4061, algorithm 5.1) with four power iterations and a seed of its own:
            some ten times faster on wide layers, and within a percent of the best.

    Raises:
        QuantizationError: not a finite matrix, or a rank out of range.

    >>> branch_of(torch.outer(torch.ones(3), torch.arange(4.0)), 1, torch.float32).up.shape
    torch.Size([3, 1])

    """
    if decomposition == "exact":
        left, right = best_low_rank(weight, rank)
    else:
        left, right = _randomized(weight, rank)
    return Branch(right.to(dtype).contiguous(), left.to(dtype).contiguous())


def refined(
    weight: Tensor,
    rank: int,
    dtype: torch.dtype,
    rounded: Callable[[Tensor], Tensor],
    error: Callable[[Branch, Tensor], float],
    *,
    iterations: int = 100,
    decomposition: Decomposition = "exact",
) -> Refined:
    """Alternate between the branch of what rounding loses and the rounding of what it leaves.

    L_0 = SVD_r(W);  R_k = Q(W - L_k);  L_{k+1} = SVD_r(W - R_k)
    (SVDQuant, arXiv:2411.05007, section 4.2, "iterative"). The first pair that is no better
    than the one before ends it, and the best is kept.

    Args:
        weight: (out, in), smoothed, float32 or float64.
        rank: of the branch.
        dtype: of its factors as stored; the residual also absorbs their rounding.
        rounded: Q, (out, in) to (out, in).
        error: of a branch and its rounded residual, in any unit.
        iterations: at most so many pairs are tried, at least 1.
        decomposition: see :func:`branch_of`.

    Raises:
        QuantizationError: fewer than one iteration, or an error that is not a number.

    >>> w = torch.tensor([[4.0, 1.2], [2.0, -0.7]])
    >>> off = lambda b, r: float((w - b.product(w.dtype) - r).norm())
    >>> one = refined(w, 1, w.dtype, torch.round, off, iterations=1)
    >>> refined(w, 1, w.dtype, torch.round, off).errors[0] == one.errors[0]
    True

    """
    if iterations < 1:
        raise QuantizationError(f"iterations must be at least 1, got {iterations}.")
    best: Refined | None = None
    errors: list[float] = []
    left = weight
    for _ in range(iterations):
        branch = branch_of(left, rank, dtype, decomposition)
        residual = rounded(weight - branch.product(weight.dtype))
        errors.append(error(branch, residual))
        if not math.isfinite(errors[-1]):
            raise QuantizationError(
                f"the error of iteration {len(errors)} is {errors[-1]}: the layer overflows. Run "
                "the pipeline in a wider dtype (bfloat16 or float32)."
            )
        if errors[-1] >= min(errors[:-1], default=math.inf):
            break
        best = Refined(branch, residual, ())
        left = weight - residual
    assert best is not None
    return Refined(best.branch, best.rounded, tuple(errors))


def output_error(
    x: Tensor, rounded: Tensor, weight: Tensor, branch: Branch | None, residual: Tensor
) -> float:
    """Squared error of a layer's output, ||x W^T - (Q_a(x) R^T + x (U D)^T)||^2.

    Args:
        x: (rows, in), as the branch sees it.
        rounded: (rows, in), as the rounded weight sees it.
        weight: (out, in), W.
        branch: U D, or None.
        residual: (out, in), R.

    >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5]])
    >>> output_error(x, x, w, None, torch.tensor([[3.0, 1.0]]))
    1.0

    """
    left = weight if branch is None else weight - branch.product(weight.dtype)
    off = x @ left.T - rounded @ residual.T
    return float(at_home(off.square()).sum(dtype=torch.float64))


def _randomized(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    _check(weight, rank)
    width = min(rank + _OVERSAMPLING, *weight.shape)
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices):  # torch.svd_lowrank draws from the global generator
        torch.manual_seed(_SEED)
        u, s, v = torch.svd_lowrank(weight.float(), q=width, niter=_POWER_ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:, :rank].T


def _check(weight: Tensor, rank: int) -> None:
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
