"""Smoothing of outlying input channels."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.rounding.smoothing import (
    channel_span,
    exponents,
    factors,
    factors_as,
    search,
)

law = settings(derandomize=True, max_examples=25, deadline=None)
SEEDS = st.integers(0, 10_000)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_exponents_are_the_published_ones() -> None:
    pairs = exponents()
    assert len(pairs) == 39
    assert pairs[0] == (0.0, 0.0)
    steps = [i / 20 for i in range(1, 20)]
    assert set(pairs[1:]) == {(a, 0.0) for a in steps} | {(a, 1 - a) for a in steps}


@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
@law
def test_smoothing_leaves_the_product_alone(seed: int, alpha: float, beta: float) -> None:
    x, w = gaussian(7, 12, seed=seed) * gaussian(12, seed=seed + 1).exp(), gaussian(5, 12)
    x[:, 4], w[:, 6] = 0.0, 0.0
    s = factors(channel_span(x), channel_span(w), alpha, beta)
    assert bool((s > 0).all() and torch.isfinite(s).all())
    assert torch.allclose((x / s) @ (w * s).T, x @ w.T, rtol=1e-12, atol=1e-12)


def test_factors_are_the_quotient_of_powers_and_one_for_dead_channels() -> None:
    s = factors(torch.tensor([4.0, 0.0, 9.0]), torch.tensor([16.0, 2.0, 0.0]), 0.5, 0.25)
    assert s.tolist() == [1.0, 1.0, 1.0]
    s = factors(torch.tensor([4.0, 9.0]), torch.tensor([16.0, 1.0]), 0.5, 0.5)
    assert s.tolist() == [0.5, 3.0]
    assert factors_as(torch.float16, torch.tensor([1e-9, 1e9, 0.1])).tolist() == [
        1.0,
        1.0,
        float(torch.tensor(0.1).half()),
    ]


def test_the_search_finds_what_trying_all_finds() -> None:
    x, w = channel_span(gaussian(9, 6)), channel_span(gaussian(4, 6, seed=1))

    def objective(s: Tensor) -> float:
        return float((s - 1.3).square().sum())

    best = search(x, w, objective)
    every = {pair: objective(factors(x, w, *pair)) for pair in exponents()}
    assert best.error == min(every.values()) == every[best.alpha, best.beta]
    assert torch.equal(best.factors, factors(x, w, best.alpha, best.beta))
    assert search(x, w, lambda _: 1.0).alpha == 0.0  # of equal ones the first


def test_bad_searches_are_refused() -> None:
    spans = torch.ones(3), torch.ones(3)
    with pytest.raises(QuantizationError, match="overflows"):
        search(*spans, lambda _: float("nan"))
    with pytest.raises(QuantizationError, match="at least one pair"):
        search(*spans, lambda _: 0.0, [])
    with pytest.raises(QuantizationError, match="from 0 to 1"):
        factors(*spans, 1.5, 0.0)
    with pytest.raises(QuantizationError, match="at least 2"):
        exponents(1)
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        channel_span(torch.tensor([[1.0, float("nan")]]))
