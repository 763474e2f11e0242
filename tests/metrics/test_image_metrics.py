"""PSNR, SSIM, means and alignment."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_inputs import (
    NAN,
    normal,
    uniform,
)
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from evenkeel.errors import MetricError
from evenkeel.metrics import (
    alignment,
    mean_difference,
    mean_estimate,
    per_image_alignment,
    per_image_psnr,
    per_image_ssim,
    psnr,
    ssim,
)

# --- images ---


def test_psnr_equals_torchmetrics_image_by_image() -> None:
    x, y = uniform(5, 3, 12, 16, seed=1), uniform(5, 3, 12, 16, seed=2)
    theirs = [float(peak_signal_noise_ratio(x[i], y[i], data_range=1.0)) for i in range(5)]
    assert per_image_psnr(x, y).tolist() == pytest.approx(theirs, rel=1e-6)
    assert psnr(x, y).value == pytest.approx(sum(theirs) / 5, rel=1e-6)
    # The logarithm of the mean error is another number.
    assert psnr(x, y).value != pytest.approx(-10 * math.log10(float((x - y).square().mean())))


@pytest.mark.parametrize(("step", "decibel"), [(1.0, 0.0), (0.1, 20.0), (0.001, 60.0)])
def test_psnr_of_a_constant_offset(step: float, decibel: float) -> None:
    dark = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
    estimate = psnr(dark + step, dark)
    assert estimate.value == pytest.approx(decibel, abs=1e-9)
    assert estimate.stderr == pytest.approx(0, abs=1e-9)


def test_one_identical_image_makes_the_mean_psnr_infinite() -> None:
    x, y = uniform(3, 3, 4, 4, seed=1), uniform(3, 3, 4, 4, seed=2)
    y[1] = x[1]
    assert torch.isinf(per_image_psnr(x, y)).tolist() == [False, True, False]
    estimate = psnr(x, y)
    assert estimate.value == math.inf
    assert all(math.isnan(e) for e in (estimate.stderr, estimate.low, estimate.high))
    with pytest.raises(MetricError, match="row 1"):
        mean_difference(per_image_psnr(x, y), per_image_psnr(y, x))


@pytest.mark.parametrize("size", [(11, 11), (16, 24), (32, 32)])
def test_ssim_equals_torchmetrics_image_by_image(size: tuple[int, int]) -> None:
    x = uniform(5, 3, *size, seed=1)
    y = (x + 0.2 * normal(5, 3, *size, seed=2)).clamp(0, 1)
    theirs = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    assert per_image_ssim(x, y).tolist() == pytest.approx(theirs.tolist(), rel=1e-10)
    assert ssim(x, y).value == pytest.approx(float(theirs.mean()), rel=1e-10)


def test_ssim_is_one_for_equal_images_and_symmetric() -> None:
    x, y = uniform(70, 3, 16, 16, seed=1), uniform(70, 3, 16, 16, seed=2)
    assert per_image_ssim(x, x).tolist() == pytest.approx([1.0] * 70, abs=1e-10)
    assert per_image_ssim(x, y).tolist() == pytest.approx(per_image_ssim(y, x).tolist())
    assert float(per_image_ssim(x, y).max()) < 0.5
    # More images than fit in one batch: none may be lost or mixed up.
    assert float(per_image_ssim(x[69:], y[69:])) == pytest.approx(float(per_image_ssim(x, y)[69]))


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(MetricError, match="11 x 11"):
        ssim(torch.zeros(2, 3, 10, 32), torch.zeros(2, 3, 10, 32))


@pytest.mark.parametrize("metric", [psnr, ssim, per_image_psnr, per_image_ssim])
@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.full((2, 3, 16, 16), 1.001), r"\[0, 1\].*1\.001"),
        (torch.full((2, 3, 16, 16), -0.5), r"\[0, 1\].*-0\.5"),
        (torch.full((2, 3, 16, 16), NAN), "first is row 0"),
        (torch.full((2, 3, 16, 16), math.inf), "must be finite"),
        (torch.zeros(3, 16, 16), "4 dimensions"),
        (torch.zeros(2, 16, 16, 3), "3 channels"),
        (torch.zeros(0, 3, 16, 16), "at least one image"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "floating point"),
        (torch.zeros(3, 3, 16, 16), "same shape"),
    ],
)
def test_image_metrics_refuse(metric, images: Tensor, match: str) -> None:
    good = torch.zeros(2, 3, 16, 16)
    with pytest.raises(MetricError, match=match):
        metric(images, good)
    with pytest.raises(MetricError, match=match):
        metric(good, images)


# --- means and captions ---


def test_a_paired_difference_forgets_what_both_share() -> None:
    shared = 10 * normal(40, seed=1)
    a, b = shared + normal(40, seed=2), shared + normal(40, seed=3)
    estimate = mean_difference(a, b)
    assert estimate.value == pytest.approx(mean_estimate(a).value - mean_estimate(b).value)
    assert estimate.stderr == pytest.approx(float((a - b).std()) / math.sqrt(40))
    assert estimate.stderr < 0.2 * math.hypot(mean_estimate(a).stderr, mean_estimate(b).stderr)
    assert estimate.n == 40


def test_one_value_has_a_mean_and_no_error() -> None:
    estimate = mean_estimate(torch.tensor([3.0]))
    assert estimate.value == 3.0
    assert all(math.isnan(e) for e in (estimate.stderr, estimate.low, estimate.high))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (torch.tensor([1.0, NAN]), "first is row 1"),
        (torch.tensor([math.inf, 1.0]), "first is row 0"),
        (torch.zeros(0), "empty"),
        (torch.zeros(2, 2), "1 dimensions"),
        (torch.tensor([1, 2]), "floating point"),
    ],
)
def test_means_refuse(values: Tensor, match: str) -> None:
    with pytest.raises(MetricError, match=match):
        mean_estimate(values)
    with pytest.raises(MetricError, match=match):
        mean_difference(values, values)


def test_differences_of_different_lengths_are_refused() -> None:
    with pytest.raises(MetricError, match="row by row"):
        mean_difference(torch.zeros(3), torch.zeros(1))


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=3, max_size=3).filter(
            lambda row: any(v == v for v in row)
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_alignment_is_the_mean_over_images_of_what_is_mentioned(rows: list[list[float]]) -> None:
    shown = [[v for v in row if v == v] for row in rows]
    expected = [sum(row) / len(row) for row in shown]
    assert per_image_alignment(torch.tensor(rows)).tolist() == pytest.approx(expected)
    assert alignment(torch.tensor(rows)).value == pytest.approx(sum(expected) / len(expected))


def test_alignment_counts_images_and_not_attributes() -> None:
    matches = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, NAN, NAN, NAN]])
    assert alignment(matches).value == 0.5
    assert alignment(matches).value != pytest.approx(float(matches.nanmean()))


@pytest.mark.parametrize(
    ("matches", "match"),
    [
        (torch.tensor([[1.0, 0.5]]), "0.5"),
        (torch.tensor([[1.0, math.inf]]), "inf"),
        (torch.tensor([[1.0, NAN], [NAN, NAN]]), "first is row 1"),
        (torch.ones(3), r"\(n, attributes\)"),
        (torch.ones(3, 2, dtype=torch.int64), "floating point"),
        (torch.ones(0, 2), "at least one value"),
    ],
)
def test_alignment_refuses(matches: Tensor, match: str) -> None:
    with pytest.raises(MetricError, match=match):
        alignment(matches)
