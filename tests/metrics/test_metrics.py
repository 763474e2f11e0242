"""Metrics against closed forms, scipy, torchmetrics, and the spread of many independent draws."""

from __future__ import annotations

import functools
import math
import time

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import evenkeel.metrics as metrics
from evenkeel.errors import MetricError
from evenkeel.estimate import Estimate
from evenkeel.metrics import (
    Gaussian,
    alignment,
    frechet_between,
    frechet_difference,
    frechet_distance,
    jackknife,
    jackknife_estimate,
    kernel_difference,
    kernel_distance,
    mean_difference,
    mean_estimate,
    per_image_alignment,
    per_image_psnr,
    per_image_ssim,
    psnr,
    ssim,
)

EPS = torch.finfo(torch.float64).eps
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


def keeping(n: int, groups: int, g: int | None) -> Tensor:
    return torch.arange(n) % groups != (-1 if g is None else g)


def frechet_by_svd(x: Tensor, y: Tensor) -> float:
    """tr sqrt(S1 S2) as the nuclear norm of A B^T, where S1 = A^T A and S2 = B^T B."""
    a = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    nuclear = torch.linalg.svdvals(a @ b.T).sum()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return float(shift + a.square().sum() + b.square().sum() - 2 * nuclear)


def kernel_by_loops(x: Tensor, y: Tensor, *, paired: bool) -> float:
    def k(u: Tensor, v: Tensor) -> float:
        return (float(u @ v) / len(u) + 1) ** 3

    n, m = len(x), len(y)
    xx = [k(x[i], x[j]) for i in range(n) for j in range(n) if i != j]
    yy = [k(y[i], y[j]) for i in range(m) for j in range(m) if i != j]
    xy = [k(x[i], y[j]) for i in range(n) for j in range(m) if not (paired and i == j)]
    return sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)


def kernel_mean(x: Tensor, y: Tensor, kept: Tensor) -> float:
    return float(((x @ y.T / x.shape[1] + 1) ** 3)[kept].mean())


def off_diagonal(x: Tensor) -> Tensor:
    return ~torch.eye(len(x), dtype=torch.bool)


def kernel_independent(x: Tensor, y: Tensor) -> float:
    within = kernel_mean(x, x, off_diagonal(x)) + kernel_mean(y, y, off_diagonal(y))
    return within - 2 * kernel_mean(x, y, torch.ones(len(x), len(y), dtype=torch.bool))


def kernel_paired(x: Tensor, y: Tensor) -> float:
    off = off_diagonal(x)
    return kernel_mean(x, x, off) + kernel_mean(y, y, off) - 2 * kernel_mean(x, y, off)


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


def test_kernel_distance_of_identical_pairs_is_zero() -> None:
    x = correlated(60, 4, seed=7)
    scale = float(((x @ x.T / 4 + 1) ** 3).abs().mean())
    estimate = kernel_distance(x, x.clone(), paired_reference=True)
    assert abs(estimate.value) < 10 * 60 * EPS * scale
    assert estimate.stderr < 10 * 60 * EPS * scale
    # Counting the pairs i = j would not give zero, and would reward copying the reference.
    assert kernel_by_loops(x, x, paired=False) < -1e-3 * scale


# --- the jackknife ---


def test_leaving_out_one_at_a_time_gives_the_textbook_error_of_a_mean() -> None:
    x = normal(30, seed=0)
    value, stderr = jackknife(lambda g: float(x[keeping(30, 30, g)].mean()), n=30)
    assert value == pytest.approx(float(x.mean()))
    assert stderr == pytest.approx(float(x.std()) / math.sqrt(30))


def test_equal_groups_give_the_usual_formula() -> None:
    x = normal(60, seed=0)
    left_out = torch.stack([x[keeping(60, 10, g)].exp().mean().log() for g in range(10)])
    usual = math.sqrt(0.9 * float((left_out - left_out.mean()).square().sum()))
    _, stderr = jackknife(
        lambda g: float(x[keeping(60, 10, g)].exp().mean().log()), n=60, groups=10
    )
    assert stderr == pytest.approx(usual, rel=1e-9)


def test_unequal_groups_give_an_unbiased_variance_of_a_mean() -> None:
    """Groups of 2, 1, 1 units. The formula for equal groups would give 0.2716, not 0.25."""
    x = normal(4000, 4, seed=1)

    def variance(row: Tensor) -> float:
        return jackknife(lambda g: float(row[keeping(4, 3, g)].mean()), n=4, groups=3)[1] ** 2

    draws = torch.tensor([variance(row) for row in x])
    error = float(draws.std()) / math.sqrt(len(draws))
    assert float(draws.mean()) == pytest.approx(1 / 4, abs=4 * error)
    assert 4 * error < 0.2716 - 0.25


def independent_by_hand(direct, x: Tensor, y: Tensor) -> float:
    """The error with groups left out of x, then of y, every time computed afresh."""
    n = len(x)
    of_x = jackknife(lambda g: direct(x[keeping(n, 50, g)], y), n)[1]
    of_y = jackknife(lambda g: direct(x, y[keeping(n, 50, g)]), n)[1]
    return math.hypot(of_x, of_y)


def paired_by_hand(direct, x: Tensor, y: Tensor) -> float:
    """The error with the same groups left out of both, every time computed afresh."""
    n = len(x)
    kept = functools.partial(keeping, n, 50)
    return jackknife(lambda g: direct(x[kept(g)], y[kept(g)]), n)[1]


@pytest.mark.parametrize("n", [150, 173])
@pytest.mark.parametrize(
    ("distance", "independent", "paired"),
    [
        (frechet_distance, frechet_by_svd, frechet_by_svd),
        (kernel_distance, kernel_independent, kernel_paired),
    ],
    ids=["frechet", "kernel"],
)
def test_subtracting_a_group_equals_computing_without_it(
    distance, independent, paired, n: int
) -> None:
    x, y = correlated(n, 3, seed=1), correlated(n, 3, seed=2)
    expected = independent_by_hand(independent, x, y)
    assert distance(x, y).stderr == pytest.approx(expected, rel=1e-6)
    expected = paired_by_hand(paired, x, y)
    assert distance(x, y, paired_reference=True).stderr == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [150, 173])
@pytest.mark.parametrize(
    ("difference", "independent", "paired"),
    [
        (frechet_difference, frechet_by_svd, frechet_by_svd),
        (kernel_difference, kernel_independent, kernel_paired),
    ],
    ids=["frechet", "kernel"],
)
def test_a_difference_leaves_the_same_groups_out_of_both_arms(
    difference, independent, paired, n: int
) -> None:
    a, b, r = (correlated(n, 3, seed=s) for s in (1, 2, 3))
    arms = torch.cat([a, b], dim=1)

    def gap(direct):
        return lambda ab, rest: direct(ab[:, :3], rest) - direct(ab[:, 3:], rest)

    expected = independent_by_hand(gap(independent), arms, r)
    assert difference(a, b, r).stderr == pytest.approx(expected, rel=1e-6)
    expected = paired_by_hand(gap(paired), arms, r)
    assert difference(a, b, r, paired_reference=True).stderr == pytest.approx(expected, rel=1e-6)


@BOTH_DIFFERENCES
@pytest.mark.parametrize("paired", [False, True])
def test_a_difference_is_the_difference_of_the_values(difference, distance, paired: bool) -> None:
    a, b, r = (correlated(120, 4, seed=s) for s in (1, 2, 3))
    expected = (
        distance(a, r, paired_reference=paired).value
        - distance(b, r, paired_reference=paired).value
    )
    estimate = difference(a, b, r, paired_reference=paired)
    assert estimate.value == pytest.approx(expected, rel=1e-10)
    swapped = difference(b, a, r, paired_reference=paired)
    assert swapped.value == pytest.approx(-estimate.value, rel=1e-10)
    assert swapped.stderr == pytest.approx(estimate.stderr, rel=1e-10)
    assert estimate.low < estimate.value < estimate.high


@BOTH_DIFFERENCES
@pytest.mark.parametrize("paired", [False, True])
def test_sharing_images_shrinks_the_error_of_a_difference(
    difference, distance, paired: bool
) -> None:
    shared, reference = normal(500, 5, seed=0) + 0.7, normal(500, 5, seed=1)
    a = shared + 0.05 * normal(500, 5, seed=2)
    b = shared + 0.05 * normal(500, 5, seed=3)
    alone = [distance(x, reference, paired_reference=paired).stderr for x in (a, b)]
    together = difference(a, b, reference, paired_reference=paired)
    assert together.stderr < 0.2 * math.hypot(*alone)
    # Not by construction: without the pairing the error stays.
    shuffled = difference(a, b.flip(0), reference, paired_reference=paired)
    assert shuffled.value == pytest.approx(together.value, rel=0.2, abs=together.stderr)
    assert shuffled.stderr > 3 * together.stderr


DRAWS = 140


def spread_and_errors(estimates: list[Estimate]) -> tuple[float, float]:
    values = torch.tensor([e.value for e in estimates])
    variances = torch.tensor([e.stderr for e in estimates]).square()
    return float(values.var()), float(variances.mean())


def independent_sets(seed: int) -> tuple[Tensor, Tensor]:
    x, y = normal(2, 150, 1, seed=seed)
    return 0.8 * x + 1, y


@functools.cache
def kernel_estimate(seed: int) -> Estimate:
    return kernel_distance(*independent_sets(seed))


def shared_arms(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    r, e, f = normal(3, 150, 2, seed=seed)
    return r + 0.5 + 0.3 * e, r + 0.4 + 0.2 * f, r


@pytest.mark.parametrize(
    "measure",
    [
        lambda s: frechet_distance(*independent_sets(s)),
        kernel_estimate,
        lambda s: frechet_difference(*shared_arms(s), paired_reference=True),
        lambda s: kernel_difference(*shared_arms(s), paired_reference=True),
    ],
    ids=["frechet", "kernel", "frechet difference", "kernel difference"],
)
def test_the_jackknife_error_is_the_spread_over_independent_draws(measure) -> None:
    spread, claimed = spread_and_errors([measure(seed) for seed in range(DRAWS)])
    # The variance of DRAWS normal values is known to sqrt(2 / (DRAWS - 1)) of itself, 12 %;
    # forgetting one of two equal samples would give a ratio of 0.5 and is seen.
    assert claimed / spread == pytest.approx(1, abs=4 * math.sqrt(2 / (DRAWS - 1)))
    assert 4 * math.sqrt(2 / (DRAWS - 1)) < 0.5


def moments_of_normal(mean: float, std: float) -> tuple[float, float, float]:
    return mean, mean**2 + std**2, mean**3 + 3 * mean * std**2


def expected_kernel(p: tuple[float, float], q: tuple[float, float]) -> float:
    """E (x y + 1)^3 for independent normal x and y in one dimension."""
    (a1, a2, a3), (b1, b2, b3) = moments_of_normal(*p), moments_of_normal(*q)
    return a3 * b3 + 3 * a2 * b2 + 3 * a1 * b1 + 1


def test_the_kernel_distance_is_unbiased_and_its_interval_covers_the_truth() -> None:
    p, q = (1.0, 0.8), (0.0, 1.0)
    truth = expected_kernel(p, p) + expected_kernel(q, q) - 2 * expected_kernel(p, q)
    estimates = [kernel_estimate(seed) for seed in range(DRAWS)]
    values = torch.tensor([e.value for e in estimates])
    error = float(values.std()) / math.sqrt(DRAWS)
    assert float(values.mean()) == pytest.approx(truth, abs=4 * error)
    covered = sum(e.low < truth < e.high for e in estimates) / DRAWS
    # 150 skewed values are not yet normal: 3 % is left for that, beyond 4 binomial deviations.
    assert covered == pytest.approx(0.95, abs=0.03 + 4 * math.sqrt(0.95 * 0.05 / DRAWS))


def test_the_interval_of_a_mean_covers_the_truth() -> None:
    draws = normal(1000, 6, seed=9)
    estimates = [mean_estimate(row) for row in draws]
    tolerance = 4 * math.sqrt(0.95 * 0.05 / 1000)
    covered = sum(e.low < 0 < e.high for e in estimates) / 1000
    assert covered == pytest.approx(0.95, abs=tolerance)
    # The normal quantile in place of Student's t would cover 89 %.
    too_few = sum(abs(e.value) < 1.96 * e.stderr for e in estimates) / 1000
    assert too_few != pytest.approx(0.95, abs=tolerance)


def test_independent_samples_add_their_variances() -> None:
    x, y = normal(50, seed=1), normal(50, seed=2)

    def drop_x(g: int | None) -> float:
        return float(x[keeping(50, 50, g)].mean() - y.mean())

    def drop_y(g: int | None) -> float:
        return float(x.mean() - y[keeping(50, 50, g)].mean())

    estimate = jackknife_estimate((drop_x, 50), (drop_y, 50))
    assert estimate.stderr == pytest.approx(math.sqrt(float(x.var() + y.var()) / 50))
    assert estimate.n == 50
    assert estimate.high - estimate.value == pytest.approx(2.0095752 * estimate.stderr)


@pytest.mark.parametrize(("n", "groups"), [(1, 50), (0, 50), (10, 1)])
def test_a_jackknife_needs_two_of_everything(n: int, groups: int) -> None:
    with pytest.raises(MetricError, match="at least 2 units in at least 2 groups"):
        jackknife(lambda g: 1.0, n, groups)


@pytest.mark.parametrize("bad", [None, 3])
def test_a_statistic_that_is_not_finite_is_refused(bad: int | None) -> None:
    with pytest.raises(MetricError, match="finite statistic"):
        jackknife(lambda g: {bad: NAN}.get(g, 1.0), 10)


@BOTH_DISTANCES
@given(st.permutations(range(13)))
@settings(derandomize=True, deadline=None, max_examples=10)
def test_the_order_of_the_rows_does_not_matter(distance, order: list[int]) -> None:
    x, y = correlated(13, 3, seed=1), correlated(13, 3, seed=2)
    alone, together = x[order], (x[order], y[order])
    assert distance(alone, y).value == pytest.approx(distance(x, y).value, rel=1e-9)
    assert distance(*together, paired_reference=True).value == pytest.approx(
        distance(x, y, paired_reference=True).value, rel=1e-9
    )


@BOTH_DISTANCES
def test_the_pairing_matters_to_the_error(distance) -> None:
    y = normal(300, 4, seed=1)
    x = y + 0.5 + 0.01 * normal(300, 4, seed=2)
    paired = distance(x, y, paired_reference=True).stderr
    assert paired < 0.5 * distance(x, y, paired_reference=False).stderr


def test_two_thousand_images_take_under_two_seconds() -> None:
    a, b, r = (normal(2000, 64, seed=s) for s in range(3))
    start = time.process_time()
    frechet_distance(a, r)
    kernel_distance(a, r)
    frechet_difference(a, b, r)
    assert time.process_time() - start < 2


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
