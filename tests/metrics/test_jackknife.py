"""Standard errors and intervals"""

from __future__ import annotations

import functools
import math
import time

import pytest
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
)
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.estimate import Estimate
from evenkeel.metrics import (
    frechet_difference,
    frechet_distance,
    jackknife,
    jackknife_estimate,
    kernel_difference,
    kernel_distance,
    mean_estimate,
)


def keeping(n: int, groups: int, g: int | None) -> Tensor:
    return torch.arange(n) % groups != (-1 if g is None else g)


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
