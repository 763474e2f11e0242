"""Sums in float32, as other devices than the CPU take them, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics import exact
from evenkeel.statistics.error_structure import radial_spectrum, step_gram
from evenkeel.statistics.exact import (
    BLOCK,
    Pending,
    add_pairs,
    check,
    fetched,
    pair_sum,
    product_pair,
    settled,
    sum_pair,
    two_sum,
)
from evenkeel.statistics.histogram import ErrorHistogram, Frame
from evenkeel.statistics.moments import ORDERS, PairedMoments
from evenkeel.statistics.normal_equations import NormalEquations, held_out_errors, settle
from evenkeel.statistics.residual import ResidualHistogram
from evenkeel.statistics.row_sums import ROWS
from evenkeel.statistics.second_order import SecondOrder

U = 2.0**-24


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device that does not compute in float64."""
    monkeypatch.setattr(exact, "WIDE", frozenset())


KINDS = ("plain", "far", "cancelling", "wide", "rare")


def hard(kind: str, seed: int, *shape: int) -> Tensor:
    """Float32 values that are hard to sum."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "far":  # a large mean over a small spread
        x = 3e3 + 0.5 * x
    if kind == "cancelling":  # every value beside its negative
        x = np.where(np.arange(shape[-1]) % 2, 1.0, -1.0) * (1e3 + 1e-2 * np.abs(x))
    if kind == "wide":
        x = x * 10.0 ** rng.uniform(-6, 4, shape)
    if kind == "rare":
        x = x * np.where(rng.random(shape) < 1e-3, 1e4, 1e-2)
    return torch.from_numpy(x).float()


def absolute(e: Tensor, d: Tensor, i: int, j: int) -> Tensor:
    """Sum of absolute products of centred values, in float64."""
    e, d = (t.double() - t.double().mean(-1, keepdim=True) for t in (e, d))
    return (e.abs() ** i * d.abs() ** j).sum(-1)


# ---- sums


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(1, 400))
@settings(deadline=None, max_examples=25)
def test_a_sum_of_pairs_loses_nothing(seed: int, kind: str, n: int) -> None:
    x = hard(kind, seed, n, 2)
    total = pair_sum(x)
    wanted, size = x.double().sum(0), x.double().abs().sum(0)
    # Pairs hold twice the digits: what is left is the rounding of the low parts.
    assert ((total.double().sum(0) - wanted).abs() <= n * (2 * U) ** 2 * size).all()


def test_two_sum_is_exact() -> None:
    a, b = hard("wide", 0, 1000), hard("wide", 1, 1000)
    total, lost = two_sum(a, b)
    assert torch.equal(total.double() + lost.double(), a.double() + b.double())
    assert bool((lost != 0).any())
    pair = add_pairs(torch.stack([a, 0 * a]), torch.stack([b, 0 * b]))
    assert torch.equal(pair[0], total) and torch.equal(pair[1], lost)


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(1, 3000))
@settings(deadline=None, max_examples=25)
def test_products_in_blocks_keep_their_bound(seed: int, kind: str, n: int) -> None:
    a, b = hard(kind, seed, 3, n), hard(kind, seed + 1, 2, n)
    found = product_pair(a, b).double().sum(0)
    a, b = a.double(), b.double()
    assert ((found - a @ b.T).abs() <= BLOCK * U * (a.abs() @ b.abs().T)).all()


def test_a_plain_sum_would_not_keep_it() -> None:
    """The companion: one long float32 sum loses what blocks in pairs keep."""
    x = torch.full((1, 2_000_000), 0.1)
    wanted = x.double().sum()
    running = float(np.add.accumulate(x[0].numpy())[-1])
    assert abs(running - wanted) > 100 * BLOCK * U * wanted
    assert abs(sum_pair(x).double().sum() - wanted) <= BLOCK * U * wanted


# ---- moments


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(1, 1500))
@settings(deadline=None, max_examples=25)
def test_moments_keep_their_bound(seed: int, kind: str, n: int) -> None:
    e, d, x = (hard(kind, seed + i, 2, n) for i in range(3))
    d = 1e-2 * d
    wanted = PairedMoments.of(e.double(), d.double(), x.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "WIDE", frozenset())
        found = PairedMoments.of(e, d, x)
    assert found.central.dtype == torch.float64
    for i, j in ORDERS:
        limit = 76 * U * absolute(e, d, i, j)
        assert ((found.s(i, j) - wanted.s(i, j)).abs() <= limit).all(), (i, j)
    for name, value in (("mean_e", e), ("mean_d", d), ("mean_x", x)):
        spread = (value.double() - value.double().mean(-1, keepdim=True)).abs().mean(-1)
        off = (getattr(found, name) - getattr(wanted, name)).abs()
        assert (off <= 70 * U * spread + 1e-300).all(), name
    for name, (a, b) in {"s_xx": (x, x), "s_xe": (x, e), "s_xd": (x, d)}.items():
        off = (getattr(found, name) - getattr(wanted, name)).abs()
        assert (off <= 76 * U * absolute(a, b, 1, 1)).all(), name


def test_what_comes_of_moments_differs_in_the_seventh_digit() -> None:
    e, d, x = (hard("plain", i, 4, 3, 4096) for i in range(3))
    d = 0.05 * d + 0.02 * e
    wanted, found = (SecondOrder.of(m) for m in both(lambda: PairedMoments.of(e, d, x)))
    for kind in ("gain", "slope", "explained", "residual"):
        assert torch.allclose(getattr(found, kind), getattr(wanted, kind), rtol=1e-6, atol=0), kind


@pytest.mark.usefixtures("in_float32")
def test_values_that_are_not_finite_are_refused_when_they_arrive() -> None:
    e, d, x = (hard("plain", i, 2, 100) for i in range(3))
    e[1, 5] = torch.nan
    waiting = PairedMoments.pending(e, d, x)
    with pytest.raises(CalibrationError, match="not finite"):
        settled([waiting])


# ---- spectra, Gram matrices, histograms


def frame_of(e: Tensor, d: Tensor) -> Frame:
    moments = PairedMoments.of(e, d, e).pooled(0)
    second = SecondOrder.of(moments)
    spread = second.dd.sqrt(), second.ee.sqrt()
    return Frame(
        moments.mean_d, spread[0], moments.mean_e, spread[1], second.gain, second.residual.sqrt()
    )


def both(make: Any) -> tuple[Any, Any]:
    """In float64, and in float32."""
    wide = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "WIDE", frozenset())
        return wide, make()


@pytest.mark.parametrize("kind", KINDS)
def test_gram_matrix_and_spectrum(kind: str) -> None:
    d = hard(kind, 3, 2, 3, 4, 16, 24)
    wanted, found = both(lambda: step_gram(d.flatten(3)))
    size = step_gram(d.abs().flatten(3))
    assert ((found - wanted).abs() <= (BLOCK + 4) * U * size).all()
    wanted, found = both(lambda: radial_spectrum(d))
    # The transform spreads the rounding of the largest frequency over all of them.
    mean = d.double().square().mean((2, 3, 4))[..., None]
    assert ((found - wanted).abs() <= 1e-6 * (wanted + (wanted * mean).sqrt() + 1e-6 * mean)).all()


@pytest.mark.parametrize("kind", ["plain", "far", "rare"])
def test_histograms(kind: str) -> None:
    e, d = hard(kind, 4, 3, 2, 4, 500), 0.1 * hard("plain", 5, 3, 2, 4, 500)
    frame = frame_of(e, d)
    wanted, found = both(lambda: ErrorHistogram.of(frame, e, d))
    counts = (found.sums[..., 0] - wanted.sums[..., 0]).abs() >> 20
    assert counts.max() <= 1  # a value on an edge may fall to the other side
    for a, b in zip(
        found.trimmed_covariances(100.0), wanted.trimmed_covariances(100.0), strict=True
    ):
        assert torch.allclose(a, b, rtol=2e-5, atol=1e-9)
    wanted, found = both(lambda: ResidualHistogram.of(frame, e, d))
    assert (found.counts - wanted.counts).abs().max() <= 1
    assert torch.equal(found.counts.sum(-1), wanted.counts.sum(-1))


# ---- normal equations


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.booleans(), st.integers(20, 1300))
@settings(deadline=None, max_examples=20)
def test_normal_equations_keep_their_bound(seed: int, kind: str, constant: bool, n: int) -> None:
    h, t = hard(kind, seed, 5, n).T, hard("plain", seed + 1, 2, n).T
    wide, narrow = NormalEquations(5, 2, constant), NormalEquations(5, 2, constant)
    wide.add(h, t)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "WIDE", frozenset())
        patch.setattr("evenkeel.statistics.normal_equations.working_dtype", exact.working_dtype)
        for a, b in ((0, n // 3), (n // 3, n)):
            narrow.add(h[a:b], t[a:b])
        assert narrow.count == 0  # nothing has left the device
        settle([narrow])
    assert narrow.count == n
    pilot = h[: min(ROWS, max(n // 3, 1))].double().mean(0) if constant else torch.zeros(5)
    about = (h.double() - pilot).abs()
    # About the pilot first, then about the mean: what the two sums of rows may be off comes on top.
    size = (about.T @ about + 2 * torch.outer(about.sum(0), about.sum(0)) / n).numpy()
    limit = (ROWS + 16) * U * size
    square = [_square(x) for x in (narrow, wide)]
    assert (np.abs(square[0] - square[1]) <= limit).all()
    assert np.allclose(
        narrow.mean_h, wide.mean_h, rtol=0, atol=(ROWS + 8) * U * about.mean(0).max()
    )
    assert narrow.rounding > wide.rounding


def _square(equations: NormalEquations) -> Any:
    from scipy.linalg import lapack

    upper = np.triu(lapack.dtfttr(equations.features, equations.hh)[0])
    return upper + np.triu(upper, 1).T


@pytest.mark.usefixtures("in_float32")
def test_parts_on_a_device_merge_into_the_whole() -> None:
    h, t = hard("plain", 1, 2000, 6), hard("plain", 2, 2000, 3)
    t = t + h[:, :3]
    whole = NormalEquations(6, 3)
    whole.add(h, t)
    parts = [NormalEquations(6, 3) for _ in range(3)]
    for part, rows in zip(parts, ((0, 100), (100, 1400), (1400, 2000)), strict=True):
        part.add(h[slice(*rows)], t[slice(*rows)])
    merged = NormalEquations.merged(parts)
    for (a, b), (c, d) in zip(merged.solve([0.0, 1.0]), whole.solve([0.0, 1.0]), strict=True):
        assert torch.allclose(a, c, atol=1e-6) and torch.allclose(b, d, atol=1e-6)
    lstsq = torch.linalg.lstsq(h.double() - h.double().mean(0), t.double() - t.double().mean(0))
    assert torch.allclose(whole.solve([0.0])[0][0], lstsq.solution, atol=1e-5)


@pytest.mark.usefixtures("in_float32")
def test_singular_features_are_seen_through_the_rounding_of_float32() -> None:
    """Two equal features: the solution must not be the noise between them."""
    h = hard("plain", 3, 3000, 3)
    h = torch.cat([h, h[:, :1]], 1)
    t = h[:, :1] + 0.1 * hard("plain", 4, 3000, 1)
    equations = NormalEquations(4, 1)
    equations.add(h, t)
    weight, _ = equations.solve([0.0])[0]
    assert weight.abs().max() < 1.1
    errors, _ = held_out_errors([equations, _filled(h, t)], [0.0, 1e-8, 1.0])
    assert bool(errors.isfinite().all())


def _filled(h: Tensor, t: Tensor) -> NormalEquations:
    equations = NormalEquations(h.shape[1], t.shape[1])
    equations.add(h.flip(0)[:500], t.flip(0)[:500])
    return equations


@pytest.mark.usefixtures("in_float32")
def test_rows_that_are_not_finite_are_refused_when_they_arrive() -> None:
    equations = NormalEquations(2, 1)
    equations.add(torch.tensor([[1.0, torch.inf]]), torch.ones(1, 1))
    with pytest.raises(CalibrationError, match="not finite"):
        settle([equations])
    assert equations.count == 0


# ---- leaving the device


@pytest.mark.usefixtures("in_float32")
def test_tensors_of_every_kind_travel_together_bit_for_bit() -> None:
    sent = [
        torch.tensor([1.5, torch.nan, -torch.inf, 1e-40]),
        torch.tensor([[2**62 + 1, -3]]),
        torch.tensor(True),
        torch.tensor([0.1], dtype=torch.bfloat16),
        torch.zeros(0),
        torch.randn(3, 4).T,
    ]
    arrived = fetched(sent)
    for a, b in zip(arrived, sent, strict=True):
        wide = torch.float64 if b.is_floating_point() else torch.int64
        assert a.dtype == wide and torch.equal(a.nan_to_num(7.0), b.to(wide).nan_to_num(7.0))


def test_results_are_finished_in_order_and_checks_raise() -> None:
    one, two = Pending((torch.ones(1),), float), Pending((torch.ones(2), torch.ones(1)), torch.dot)
    assert settled([Pending((), lambda: "nothing"), one])[0] == "nothing"
    with pytest.raises(RuntimeError, match="expected"):
        settled([two])
    with pytest.raises(KeyError, match="no"):
        settled([one, check(torch.tensor(False), lambda: KeyError("no"))])
    assert settled([check(torch.tensor(True), lambda: KeyError("no"))]) == [None]
