"""A low-rank branch: the best one, and one refined against the rounding of what it leaves."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from drawn_weights import decaying, gaussian
from hypothesis import given, settings
from small_denoisers import gaussian as small
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers import best_low_rank
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.rounding.low_rank_refinement import (
    Branch,
    branch_of,
    output_error,
    refined,
)

law = settings(derandomize=True, max_examples=25, deadline=None)
SEEDS = st.integers(0, 10_000)
INT4 = Grid.parse("int4-g8")


def nearest(x: Tensor) -> Tensor:
    return snap_weight(x, INT4)[0]


law = settings(derandomize=True, max_examples=60, deadline=None)


@law
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99), st.data())
def test_low_rank_error_is_the_tail_of_the_spectrum(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = small(rows, columns, seed=seed)
    left, right = best_low_rank(weight, rank)
    assert (left.shape, right.shape) == ((rows, rank), (rank, columns))
    assert left.is_contiguous()
    assert right.is_contiguous()
    tail = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt().item()
    error = torch.linalg.norm(weight.double() - left.double() @ right.double()).item()
    assert error == pytest.approx(tail, rel=1e-5, abs=3e-6)


def test_another_matrix_of_that_rank_is_worse() -> None:
    weight = small(8, 6)
    left, right = best_low_rank(weight, 2)
    best = torch.linalg.norm(weight - left @ right)
    moved = [
        torch.linalg.norm(weight - (left + 0.05 * small(8, 2, seed=s)) @ right) for s in (1, 2)
    ]
    assert min(moved) > best * (1 + 1e-4)


@pytest.mark.parametrize("rank", [0, 4, -1])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(QuantizationError, match="from 1 to 3"):
        best_low_rank(torch.ones(3, 5), rank)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.full((3, 3), float("nan"))])
def test_low_rank_needs_a_finite_matrix(weight: Tensor) -> None:
    with pytest.raises(QuantizationError, match="finite matrix"):
        best_low_rank(weight, 1)


@given(SEEDS, st.integers(1, 6))
@law
def test_the_branch_alone_is_the_best_approximation_of_its_rank(seed: int, rank: int) -> None:
    w = gaussian(9, 7, seed=seed)
    off = w.numpy() - branch_of(w, rank, torch.float64).product(torch.float64).numpy()
    tail = np.linalg.svd(w.numpy(), compute_uv=False)[rank:]  # Eckart and Young
    assert np.linalg.norm(off) == pytest.approx(np.linalg.norm(tail), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_with_the_rank(seed: int) -> None:
    w, x = decaying(24, 32, seed), gaussian(64, 32, seed=seed + 5)
    errors = [output_error(x, x, w, None, nearest(w))]
    for rank in (1, 2, 4, 8, 16):
        found = refined(
            w, rank, w.dtype, nearest, lambda b, r: output_error(x, x, w, b, r), iterations=1
        )
        errors.append(found.errors[0])
    assert all(a > b for a, b in itertools.pairwise(errors))


@given(SEEDS)
@law
def test_refinement_is_never_worse_than_its_first_iterate(seed: int) -> None:
    w, x = decaying(12, 16, seed), gaussian(40, 16, seed=seed + 1)

    def error(branch: Branch, residual: Tensor) -> float:
        return output_error(x, x, w, branch, residual)

    found = refined(w, 2, w.dtype, nearest, error)
    assert error(found.branch, found.rounded) == min(found.errors) <= found.errors[0]
    # It falls until the last iterate, which is the first that does not (or the hundredth).
    falling = [a > b for a, b in itertools.pairwise(found.errors)]
    assert all(falling[:-1])
    assert len(found.errors) == 100 or not falling[-1]


def test_refinement_helps() -> None:
    w, x = decaying(24, 32), gaussian(64, 32, seed=3)
    found = refined(w, 4, w.dtype, nearest, lambda b, r: output_error(x, x, w, b, r))
    assert min(found.errors) < 0.95 * found.errors[0]


def test_the_residual_absorbs_the_rounding_of_the_stored_factors() -> None:
    w = decaying(12, 16).float()
    found = refined(w, 3, torch.bfloat16, lambda r: r, lambda b, r: 0.0)
    assert found.branch.down.dtype == found.branch.up.dtype == torch.bfloat16
    assert torch.allclose(found.branch.product(w.dtype) + found.rounded, w, atol=1e-6)


def test_the_randomized_branch_is_nearly_the_best_and_repeatable() -> None:
    w = decaying(60, 48).float()
    state = torch.get_rng_state()
    one, two = (branch_of(w, 4, w.dtype, "randomized") for _ in range(2))
    assert torch.equal(one.up, two.up)
    assert torch.equal(torch.get_rng_state(), state)
    best = branch_of(w, 4, w.dtype)
    off = [float((w - b.product(w.dtype)).norm()) for b in (one, best)]
    assert off[1] <= off[0] * (1 + 1e-6) < off[1] * 1.01
    with pytest.raises(QuantizationError, match="rank must be"):
        branch_of(w, 49, w.dtype, "randomized")
    with pytest.raises(QuantizationError, match="finite matrix"):
        branch_of(w * float("nan"), 2, w.dtype, "randomized")
