"""The residual's shape from moments and its robust spread from a histogram, against raw data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.histogram import Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.residual import (
    ESTIMATORS,
    RESIDUAL_BINS,
    RESIDUAL_REACH,
    Estimator,
    ResidualHistogram,
    ResidualShape,
    robust_variance,
)
from evenkeel.statistics.second_order import SecondOrder

N = 200_000
WIDTH = 2 * RESIDUAL_REACH / RESIDUAL_BINS
DRAWN = {
    "gaussian": (lambda g: torch.randn(N, generator=g, dtype=torch.float64), 1.0, 0.0, 0.0),
    "uniform": (lambda g: torch.rand(N, generator=g, dtype=torch.float64) - 0.5, 1 / 12, 0.0, -1.2),
    "laplace": (
        lambda g: torch.from_numpy(scipy.stats.laplace.rvs(size=N, random_state=7)),
        2.0,
        0.0,
        3.0,
    ),
    "exponential": (
        lambda g: torch.from_numpy(scipy.stats.expon.rvs(size=N, random_state=7)),
        1.0,
        2.0,
        6.0,
    ),
}


def pair(name: str, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    """(e, D, r) with D = gain e + 0.3 + r."""
    generator = torch.Generator().manual_seed(11)
    r = DRAWN[name][0](generator)
    e = 2 + torch.randn(N, generator=generator, dtype=torch.float64)
    return e, gain * e + 0.3 + r, r


def frame_of(moments: PairedMoments) -> Frame:
    second = SecondOrder.of(moments)
    return Frame(
        moments.mean_d,
        second.dd.sqrt(),
        moments.mean_e,
        second.ee.sqrt(),
        second.gain,
        second.residual.sqrt(),
    )


def binned(
    e: Tensor, d: Tensor, frame: Frame | None = None
) -> tuple[ResidualHistogram, ResidualShape]:
    e, d = e.reshape(1, 1, 1, -1), d.reshape(1, 1, 1, -1)
    moments = PairedMoments.of(e, d, e).pooled(0)
    frame = frame_of(moments) if frame is None else frame
    return ResidualHistogram.of(frame, e, d), ResidualShape.of(moments)


def one(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def counted(law: scipy.stats.rv_continuous, n: float, pilot: float) -> ResidualHistogram:
    """N elements spread exactly as the law says: no sampling error, however many."""
    edges = pilot * np.linspace(-RESIDUAL_REACH, RESIDUAL_REACH, RESIDUAL_BINS + 1)
    inner = np.diff(law.cdf(edges))
    shares = np.concatenate([inner, [law.sf(edges[-1]), law.cdf(edges[0])]])
    frame = Frame(*(one(v) for v in (0.0, pilot, 0.0, 1.0, 0.0, pilot)))
    return ResidualHistogram(frame, torch.from_numpy((n * shares).round()).long()[None, None])


@pytest.mark.parametrize("gain", [-0.2, 0.0, 0.4])
@pytest.mark.parametrize("name", DRAWN)
def test_shape_is_that_of_the_residual(name: str, gain: float) -> None:
    e, d, r = pair(name, gain)
    shape = ResidualShape.of(PairedMoments.of(e, d, e), torch.tensor(gain, dtype=torch.float64))
    assert float(shape.variance) == pytest.approx(float(r.var(correction=0)), rel=1e-9)
    assert float(shape.skewness) == pytest.approx(scipy.stats.skew(r.numpy()), abs=1e-9)
    assert float(shape.excess_kurtosis) == pytest.approx(scipy.stats.kurtosis(r.numpy()), abs=1e-8)
    fitted = ResidualShape.of(PairedMoments.of(e, d, e))
    _, variance, skewness, kurtosis = DRAWN[name]
    assert float(fitted.variance) == pytest.approx(variance, rel=0.03)
    assert float(fitted.skewness) == pytest.approx(skewness, abs=0.1)
    assert float(fitted.excess_kurtosis) == pytest.approx(kurtosis, abs=0.4)


def test_shape_merges() -> None:
    e, d, _ = pair("exponential", 0.4)
    halves = PairedMoments.of(e[:1000], d[:1000], e[:1000]) + PairedMoments.of(
        e[1000:], d[1000:], e[1000:]
    )
    merged, whole = ResidualShape.of(halves), ResidualShape.of(PairedMoments.of(e, d, e))
    assert float(merged.excess_kurtosis) == pytest.approx(float(whole.excess_kurtosis), rel=1e-9)
    assert float(merged.skewness) == pytest.approx(float(whole.skewness), rel=1e-9)


def test_an_exactly_linear_error_has_no_residual() -> None:
    e, _, _ = pair("gaussian", 0.0)
    shape = ResidualShape.of(PairedMoments.of(e, 0.25 * e, e))
    assert float(shape.excess_kurtosis) == float(shape.skewness) == 0.0
    assert float(shape.variance) < 1e-15


@pytest.mark.parametrize("name", DRAWN)
def test_quantiles_are_those_of_the_data(name: str) -> None:
    e, d, r = pair(name, 0.3)
    histogram, shape = binned(e, d)
    scale = float(shape.variance.sqrt())
    centred = (r - r.mean()).numpy()
    for p in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert float(histogram.quantile(p)) == pytest.approx(
            np.quantile(centred, p), abs=WIDTH * scale
        )


@pytest.mark.parametrize("name", DRAWN)
def test_robust_variances_are_those_of_scipy(name: str) -> None:
    e, d, r = pair(name, 0.3)
    histogram, shape = binned(e, d)
    spread = float(shape.variance.sqrt())
    iqr = scipy.stats.iqr(r.numpy()) / 1.349
    mad = 1.4826 * scipy.stats.median_abs_deviation(r.numpy())
    # Linear in a bin: a quantile is off by width^2 |f'| / (8 f), and |f'| / f <= sqrt(2) / std here.
    off = 0.05 * WIDTH * spread
    assert float(robust_variance(histogram, shape, "iqr").sqrt()) == pytest.approx(iqr, abs=off)
    assert float(robust_variance(histogram, shape, "mad").sqrt()) == pytest.approx(mad, abs=off)
    assert torch.equal(robust_variance(histogram, shape, "std"), shape.variance)


# Relative standard errors of a variance from N Gaussian elements: sqrt(2 / N) for the second moment,
# 2 sqrt(1.36 / N) for quartiles and MAD (37 % efficient), sqrt((2 + 24 / 4) / N) with the kurtosis,
# and twice that of a density at its mode, sqrt(0.282 / (N h f)), for the kernels (h = 0.9 N^-0.2).
STANDARD_ERRORS = {
    "std": (2 / N) ** 0.5,
    "mad": 2 * (1.36 / N) ** 0.5,
    "iqr": 2 * (1.36 / N) ** 0.5,
    "kurtosis": (8 / N) ** 0.5,
    "kde": 2 * (0.282 / (N * 0.9 * N**-0.2 * 0.399)) ** 0.5,
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_agree_on_a_gaussian(estimator: Estimator) -> None:
    histogram, shape = binned(*pair("gaussian", 0.3)[:2])
    off = 4 * STANDARD_ERRORS[estimator]
    assert float(robust_variance(histogram, shape, estimator)) == pytest.approx(1.0, rel=off)


@pytest.mark.parametrize("estimator", ["mad", "iqr", "kurtosis", "kde"])
def test_robust_ones_look_past_heavy_tails(estimator: Estimator) -> None:
    histogram, shape = binned(*pair("laplace", 0.3)[:2])
    assert float(robust_variance(histogram, shape, estimator)) < 0.9 * float(shape.variance)
    light, flat = binned(*pair("uniform", 0.3)[:2])  # and no bound holds without them
    assert float(robust_variance(light, flat, estimator)) >= float(flat.variance)


@pytest.mark.parametrize("pilot", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("shift", [0.0, 0.047, -1.7])
@pytest.mark.parametrize("n", [1e4, 1.6e7, 1e9])
@pytest.mark.parametrize("estimator", ["mad", "iqr", "kde"])
def test_neither_bins_nor_their_number_of_elements_bias_an_estimate(
    estimator: Estimator, n: float, shift: float, pilot: float
) -> None:
    """A kernel narrower than a bin once made a thousand prompts look 28 % quieter than they are."""
    histogram = counted(scipy.stats.norm(loc=shift), n, pilot)
    shape = ResidualShape(one(1.0), one(0.0), one(0.0))
    assert float(robust_variance(histogram, shape, estimator)) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("n", [1e6, 1e9])
def test_kernels_find_the_peak_of_the_density(n: float) -> None:
    law = scipy.stats.t(3)
    shape = ResidualShape(one(3.0), one(0.0), one(10.0))
    found = float(robust_variance(counted(law, n, 3**0.5), shape, "kde"))
    assert found == pytest.approx(1 / (2 * np.pi * law.pdf(0) ** 2), rel=0.03)


@pytest.mark.parametrize("off", [0.02, 0.1])
def test_a_pilot_gain_that_is_off_costs_its_square(off: float) -> None:
    e, d, _ = pair("gaussian", 0.3)
    own, shape = binned(e, d)
    other = Frame(*(getattr(own.frame, n) for n in ("mean_d", "std_d", "mean_e", "std_e")),
                  gain=own.frame.gain + off, std_r=own.frame.std_r)  # fmt: skip
    moved, _ = binned(e, d, other)
    for estimator in ("iqr", "mad"):
        before = float(robust_variance(own, shape, estimator))  # type: ignore[arg-type]
        after = float(robust_variance(moved, shape, estimator))  # type: ignore[arg-type]
        assert after - before == pytest.approx(off**2 * float(e.var()), abs=0.003)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(cuts=st.sets(st.integers(1, 1999), max_size=5), seed=st.integers(0, 2**31))
def test_any_split_in_any_order_counts_the_same(cuts: set[int], seed: int) -> None:
    e, d, _ = (t[:2000] for t in pair("laplace", 0.3))
    whole, shape = binned(e, d)
    rows = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))
    parts = [rows[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), 2000])]
    histograms = [binned(e[i], d[i], whole.frame)[0] for i in parts]
    total = histograms[0]
    for histogram in histograms[1:]:
        total = histogram + total
    assert torch.equal(total.counts, whole.counts)
    moments = [PairedMoments.of(e[i], d[i], e[i]) for i in parts]
    union = moments[0]
    for more in moments[1:]:
        union = more + union
    merged = ResidualShape.of(union)
    for name in ("variance", "skewness", "excess_kurtosis"):
        found, wanted = float(getattr(merged, name)), float(getattr(shape, name))
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_histograms_add_and_refuse_other_frames() -> None:
    e, d, _ = pair("laplace", 0.3)
    whole, _ = binned(e, d)
    parts = [
        ResidualHistogram.of(whole.frame, e[s].reshape(1, 1, 1, -1), d[s].reshape(1, 1, 1, -1))
        for s in (slice(0, 777), slice(777, None))
    ]
    assert torch.equal((parts[0] + parts[1]).counts, whole.counts)
    assert int(whole.counts.sum()) == N
    other, _ = binned(e, 2 * d)
    with pytest.raises(CalibrationError, match="different pilot frames"):
        whole + other


def test_a_quantile_beyond_the_reach_is_refused() -> None:
    e, d, _ = pair("gaussian", 0.3)
    histogram, _ = binned(e, d)
    far = ResidualHistogram.of(
        histogram.frame, e.reshape(1, 1, 1, -1), 100 + d.reshape(1, 1, 1, -1)
    )
    with pytest.raises(CalibrationError, match="pilot"):
        far.quantile(0.5)


def test_a_median_distance_beyond_the_reach_is_refused() -> None:
    """Most elements in the overflows on both sides, the median well inside."""
    r = torch.cat([torch.full((300,), -50.0), torch.linspace(-1, 1, 301), torch.full((300,), 50.0)])
    frame = Frame(*(one(v) for v in (0.0, 1.0, 0.0, 1.0, 0.0, 1.0)))
    histogram, _ = binned(torch.zeros(901), r, frame)
    middle = histogram.quantile(0.5)
    assert float(middle) == pytest.approx(0, abs=WIDTH)
    assert float(histogram.spread_around(middle, 0.2)) == pytest.approx(0.6, abs=WIDTH)
    with pytest.raises(CalibrationError, match="pilot"):
        histogram.spread_around(middle, 0.5)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_no_share_is_refused(p: float) -> None:
    histogram, _ = binned(*pair("gaussian", 0.3)[:2])
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        histogram.quantile(p)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_are_refused_and_not_counted(which: int, bad: float) -> None:
    e, d, _ = (t[:50].clone() for t in pair("gaussian", 0.3))
    frame = binned(e, d)[0].frame
    (e, d)[which][7] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        ResidualHistogram.of(frame, e.reshape(1, 1, 1, -1), d.reshape(1, 1, 1, -1))


def test_a_channel_without_residual_in_the_pilot_is_zero_or_refused() -> None:
    """It has no scale: that its variance is 0 must not be concluded for later prompts."""
    e, d, _ = (t[:500] for t in pair("gaussian", 0.3))
    silent = frame_of(PairedMoments.of(e, 0 * d, e).map(lambda t: t[None, None]))
    histogram, shape = binned(e, 0 * d, silent)
    assert [float(robust_variance(histogram, shape, n)) for n in ESTIMATORS] == [0.0] * 5  # type: ignore[arg-type]
    later, shape = binned(e, d, silent)
    for estimator in ("mad", "iqr", "kde"):
        with pytest.raises(CalibrationError, match="pilot"):
            robust_variance(later, shape, estimator)  # type: ignore[arg-type]


def test_unknown_estimator_is_named() -> None:
    histogram, shape = binned(*pair("gaussian", 0.3)[:2])
    with pytest.raises(CalibrationError, match="must be one of"):
        robust_variance(histogram, shape, "median")  # type: ignore[arg-type]
