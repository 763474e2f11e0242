"""Distances between sets of features against scipy, torchmetrics and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_inputs import (
    BOTH_DIFFERENCES,
    BOTH_DISTANCES,
    NAN,
    correlated,
    frechet_by_svd,
    normal,
    uniform,
)
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import evenkeel.metrics as metrics
from evenkeel.errors import MetricError
from evenkeel.metrics import (
    Gaussian,
    cmmd,
    cmmd_difference,
    frechet_between,
    frechet_difference,
    frechet_distance,
    kernel_distance,
)

EPS = torch.finfo(torch.float64).eps


def kernel_by_loops(x: Tensor, y: Tensor, *, paired: bool) -> float:
    def k(u: Tensor, v: Tensor) -> float:
        return (float(u @ v) / len(u) + 1) ** 3

    n, m = len(x), len(y)
    xx = [k(x[i], x[j]) for i in range(n) for j in range(n) if i != j]
    yy = [k(y[i], y[j]) for i in range(m) for j in range(m) if i != j]
    xy = [k(x[i], y[j]) for i in range(n) for j in range(m) if not (paired and i == j)]
    return sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)


# --- Fréchet distance ---


@pytest.mark.parametrize(("n", "d"), [(40, 1), (60, 5), (200, 24)])
def test_frechet_equals_the_matrix_root_of_scipy(n: int, d: int) -> None:
    x, y = correlated(n, d, seed=n), correlated(n, d, seed=n + 1)
    s1, s2 = np.atleast_2d(np.cov(x.numpy().T)), np.atleast_2d(np.cov(y.numpy().T))
    shift = float((x.mean(0) - y.mean(0)).square().sum())
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = shift + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
    assert frechet_distance(x, y).value == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.tuples(*[st.floats(0, 5)] * 4), min_size=1, max_size=6))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_frechet_of_diagonal_gaussians_is_the_sum_over_axes(
    axes: list[tuple[float, float, float, float]],
) -> None:
    m1, s1, m2, s2 = torch.tensor(axes, dtype=torch.float64).T
    value = frechet_between(Gaussian(m1, s1.square().diag()), Gaussian(m2, s2.square().diag()))
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    # A root of an eigenvalue that rounding made non-zero: sqrt(eps) of the largest, each.
    assert value == pytest.approx(expected, abs=4 * len(axes) * 25 * math.sqrt(EPS))


def test_frechet_sees_a_missing_direction_exactly() -> None:
    """n < d: covariances without full rank, where sqrtm is unreliable."""
    x, y = correlated(12, 30, seed=1), correlated(12, 30, seed=2)
    assert np.linalg.matrix_rank(np.cov(x.numpy().T)) == 11
    assert frechet_distance(x, y).value == pytest.approx(frechet_by_svd(x, y), rel=1e-6)


@pytest.mark.parametrize("n", [20, 200])
def test_frechet_of_identical_sets_is_zero_without_error(n: int) -> None:
    x = correlated(n, 40, seed=3)
    scale = float(torch.cov(x.T).trace())
    estimate = frechet_distance(x, x.clone(), paired_reference=True)
    assert abs(estimate.value) < 40 * math.sqrt(EPS) * scale
    assert estimate.stderr < 40 * math.sqrt(EPS) * scale
    assert abs(frechet_distance(x * 1.01, x).value) > 40 * math.sqrt(EPS) * scale


def test_frechet_is_symmetric_rotation_invariant_and_quadratic_in_scale() -> None:
    x, y = correlated(80, 6, seed=4), correlated(80, 6, seed=5)
    rotation = torch.linalg.qr(normal(6, 6, seed=6)).Q
    value = frechet_distance(x, y).value
    assert frechet_distance(y, x).value == pytest.approx(value, rel=1e-10)
    assert frechet_distance(x @ rotation, y @ rotation).value == pytest.approx(value, rel=1e-10)
    assert frechet_distance(3 * x, 3 * y).value == pytest.approx(9 * value, rel=1e-10)


def test_frechet_survives_a_large_common_mean() -> None:
    x, y = correlated(80, 6, seed=4), correlated(80, 6, seed=5)
    # Adding 1e6 rounds each feature by 1e-10; uncentred sums of squares would lose 1e-4.
    assert frechet_distance(x + 1e6, y + 1e6).value == pytest.approx(
        frechet_distance(x, y).value, rel=1e-8
    )


def test_frechet_of_half_precision_features_is_computed_in_float64() -> None:
    x, y = correlated(80, 6, seed=4).half(), correlated(80, 6, seed=5).half()
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())


class FirstPixels(nn.Module):
    """A feature network whose features are the first pixels of the image."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6].double()


def byte_images(n: int, seed: int) -> Tensor:
    return (uniform(n, 3, 8, 8, seed=seed) ** (1 + seed) * 255).to(torch.uint8)


def test_frechet_equals_torchmetrics() -> None:
    real, fake = byte_images(100, 0), byte_images(100, 1)
    theirs = FrechetInceptionDistance(feature=FirstPixels(), input_img_size=(3, 8, 8))
    theirs.set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(FirstPixels()(fake), FirstPixels()(real)).value
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_a_covariance_with_a_negative_eigenvalue_is_refused_and_rounding_is_not() -> None:
    unit = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    rounded = Gaussian(unit.mean, torch.diag(torch.tensor([1.0, -1e-13]).double()))
    assert frechet_between(rounded, unit) == pytest.approx(1.0, abs=1e-6)
    broken = Gaussian(unit.mean, torch.diag(torch.tensor([1.0, -1e-6]).double()))
    with pytest.raises(MetricError, match="no negative eigenvalues"):
        frechet_between(broken, unit)
    with pytest.raises(MetricError, match="no negative eigenvalues"):
        frechet_between(unit, broken)


@pytest.mark.parametrize(
    ("mean", "covariance", "match"),
    [
        (torch.zeros(2).double(), torch.eye(3).double(), "the shapes are"),
        (torch.zeros(2), torch.eye(2), "float64"),
        (torch.zeros(2).double(), torch.eye(2).double() * NAN, "finite"),
        (torch.zeros(2).double(), torch.ones(2, 2).triu().double(), "symmetric"),
    ],
)
def test_what_is_no_gaussian_is_refused(mean: Tensor, covariance: Tensor, match: str) -> None:
    with pytest.raises(MetricError, match=match):
        Gaussian(mean, covariance)


def test_gaussians_of_different_dimension_have_no_distance() -> None:
    one, two = (Gaussian(torch.zeros(d).double(), torch.eye(d).double()) for d in (1, 2))
    with pytest.raises(MetricError, match="same dimension"):
        frechet_between(one, two)


def test_frechet_refuses_unequal_n_and_says_why() -> None:
    with pytest.raises(MetricError, match=r"order 1/n.*first 20 rows"):
        frechet_distance(normal(20, 3, seed=0), normal(30, 3, seed=1))
    with pytest.raises(MetricError, match=r"order 1/n"):
        frechet_difference(normal(20, 3, seed=0), normal(20, 3, seed=1), normal(30, 3, seed=2))


def test_the_bias_behind_the_equal_n_rule_is_there() -> None:
    """Same distribution on both sides: the value falls as 1/n, and is above zero at any n."""
    few = np.mean([frechet_distance(*normal(2, 25, 4, seed=s)).value for s in range(20)])
    many = np.mean([frechet_distance(*normal(2, 100, 4, seed=s)).value for s in range(20)])
    assert 3 < few / many < 5.3


# --- kernel distance ---


@pytest.mark.parametrize("paired", [False, True])
def test_kernel_distance_equals_a_double_loop(paired: bool) -> None:
    x, y = correlated(23, 4, seed=1), correlated(23, 4, seed=2)
    value = kernel_distance(x, y, paired_reference=paired).value
    assert value == pytest.approx(kernel_by_loops(x, y, paired=paired), rel=1e-11)
    assert value != pytest.approx(kernel_by_loops(x, y, paired=not paired), rel=1e-3)


def test_kernel_distance_takes_unequal_numbers_of_images() -> None:
    x, y = correlated(17, 3, seed=1), correlated(61, 3, seed=2)
    expected = kernel_by_loops(x, y, paired=False)
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-11)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kernel_distance_equals_torchmetrics() -> None:
    real, fake = byte_images(40, 0), byte_images(40, 1)
    theirs = KernelInceptionDistance(feature=FirstPixels(), subsets=1, subset_size=40)
    theirs.set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = kernel_distance(FirstPixels()(fake), FirstPixels()(real)).value
    assert ours == pytest.approx(float(theirs.compute()[0]), rel=1e-9)


def cmmd_as_published(x: Tensor, y: Tensor) -> float:
    """Of the paper's code, equal indices too: 1000 (mean k_xx + mean k_yy - 2 mean k_xy)."""
    kernels = [
        torch.exp(-torch.cdist(a, b).square() / 200).mean() for a, b in ((x, x), (y, y), (x, y))
    ]
    return 1000 * float(kernels[0] + kernels[1] - 2 * kernels[2])


def test_cmmd_is_the_published_one_but_for_equal_indices() -> None:
    x, y = (torch.nn.functional.normalize(correlated(n, 5, seed=n)) for n in (40, 30))
    within = [torch.exp(-torch.cdist(a, a).square() / 200) for a in (x, y)]
    extra = sum(
        1000 * (1 - float((k.sum() - n) / (n * (n - 1)))) / n
        for k, n in zip(within, (40, 30), strict=True)
    )
    assert cmmd(x, y).value == pytest.approx(cmmd_as_published(x, y) - extra, abs=1e-9)
    change = cmmd_difference(x[:30], x[10:], y)
    assert change.value == pytest.approx(cmmd(x[:30], y).value - cmmd(x[10:], y).value, abs=1e-9)
    same = cmmd(x, x.clone(), paired_reference=True)
    assert abs(same.value) < 1e-9


def test_kernel_distance_of_identical_pairs_is_zero() -> None:
    x = correlated(60, 4, seed=7)
    scale = float(((x @ x.T / 4 + 1) ** 3).abs().mean())
    estimate = kernel_distance(x, x.clone(), paired_reference=True)
    assert abs(estimate.value) < 10 * 60 * EPS * scale
    assert estimate.stderr < 10 * 60 * EPS * scale
    # Counting the pairs i = j would not give zero, and would reward copying the reference.
    assert kernel_by_loops(x, x, paired=False) < -1e-3 * scale


# --- refusals common to feature metrics ---

GOOD = normal(20, 3, seed=0)
WITH_NAN = GOOD.clone().index_fill(0, torch.tensor(4), NAN)
BAD_FEATURES = pytest.mark.parametrize(
    ("bad", "match"),
    [
        (WITH_NAN, "1 of 20 rows.*first is row 4"),
        (GOOD * math.inf, "must be finite"),
        (GOOD[:2], "at least 3 rows"),
        (GOOD[:, :0], "at least 1 feature"),
        (GOOD[0], "2 dimensions"),
        (GOOD.long(), "floating point"),
        (GOOD[:, :2], "number of features"),
    ],
)


@BOTH_DISTANCES
@BAD_FEATURES
@pytest.mark.parametrize("paired", [False, True])
def test_distances_refuse(distance, bad: Tensor, match: str, paired: bool) -> None:
    with pytest.raises(MetricError, match=match):
        distance(bad, GOOD, paired_reference=paired)
    with pytest.raises(MetricError, match=match):
        distance(GOOD, bad, paired_reference=paired)


@BOTH_DIFFERENCES
@BAD_FEATURES
def test_differences_refuse(difference, distance, bad: Tensor, match: str) -> None:
    with pytest.raises(MetricError, match=match):
        difference(bad, bad, GOOD)
    with pytest.raises(MetricError, match=match):
        difference(GOOD, GOOD, bad)


@BOTH_DIFFERENCES
def test_arms_of_different_length_are_refused(difference, distance) -> None:
    with pytest.raises(MetricError, match="same prompts and seeds"):
        difference(GOOD, GOOD[:10], GOOD)


def test_a_paired_reference_of_another_length_is_refused() -> None:
    with pytest.raises(MetricError, match="row by row"):
        kernel_distance(GOOD, GOOD[:10], paired_reference=True)


def test_features_too_large_to_square_are_refused() -> None:
    with pytest.raises(MetricError, match="overflow"):
        frechet_distance(GOOD * 1e200, GOOD)
    with pytest.raises(MetricError, match="finite statistic"):
        kernel_distance(GOOD * 1e200, GOOD)


def test_every_public_name_exists_and_is_listed() -> None:
    public = {n for n, v in vars(metrics).items() if not n.startswith("_") and callable(v)}
    assert set(metrics.__all__) >= public
    assert all(callable(getattr(metrics, name)) for name in metrics.__all__)
