"""The residual's shape from moments and its robust spread from a histogram, against raw data."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.histogram import Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.residual import (
    RESIDUAL_BINS,
    RESIDUAL_REACH,
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


def binned(e: Tensor, d: Tensor) -> tuple[ResidualHistogram, ResidualShape]:
    e, d = e.reshape(1, 1, 1, -1), d.reshape(1, 1, 1, -1)
    moments = PairedMoments.of(e, d, e).pooled(0)
    second = SecondOrder.of(moments)
    frame = Frame(
        moments.mean_d,
        second.dd.sqrt(),
        moments.mean_e,
        second.ee.sqrt(),
        second.gain,
        second.residual.sqrt(),
    )
    return ResidualHistogram.of(frame, e, d), ResidualShape.of(moments)


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
    assert float(robust_variance(histogram, shape, "iqr").sqrt()) == pytest.approx(
        iqr, abs=WIDTH * spread
    )
    assert float(robust_variance(histogram, shape, "mad").sqrt()) == pytest.approx(
        mad, abs=1.5 * WIDTH * spread
    )
    assert torch.equal(robust_variance(histogram, shape, "std"), shape.variance)


@pytest.mark.parametrize("estimator", ["std", "mad", "iqr", "kurtosis", "kde"])
def test_all_agree_on_a_gaussian(estimator: str) -> None:
    histogram, shape = binned(*pair("gaussian", 0.3)[:2])
    assert float(robust_variance(histogram, shape, estimator)) == pytest.approx(1.0, rel=0.08)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["mad", "iqr", "kurtosis", "kde"])
def test_robust_ones_look_past_heavy_tails(estimator: str) -> None:
    histogram, shape = binned(*pair("laplace", 0.3)[:2])
    assert float(robust_variance(histogram, shape, estimator)) < 0.9 * float(shape.variance)  # type: ignore[arg-type]


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


def test_unknown_estimator_is_named() -> None:
    histogram, shape = binned(*pair("gaussian", 0.3)[:2])
    with pytest.raises(CalibrationError, match="must be one of"):
        robust_variance(histogram, shape, "median")  # type: ignore[arg-type]
