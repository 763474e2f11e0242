"""Streamed normal equations against dense solvers, brute-force refits and laws of ridge."""

from __future__ import annotations

import copy
import doctest
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics import normal_equations
from evenkeel.statistics.normal_equations import NormalEquations, held_out_errors

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = [1, 2, 3, 4, 7, 8, 33, 64]
PENALTIES = [1e-4, 0.1, 3.0]
Solution = tuple[Tensor, Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression(seed: int, rows: int, features: int, targets: int) -> tuple[Tensor, Tensor]:
    """Correlated features with means, and targets that they explain in part."""
    mix = draw(seed, features, features) / features**0.5 + torch.eye(features)
    h = draw(seed + 1, rows, features) @ mix + 0.5
    return h, h @ draw(seed + 2, features, targets) + draw(seed + 3, rows, targets) - 1.5


def equations(h: Tensor, t: Tensor, intercept: bool = True) -> NormalEquations:
    out = NormalEquations(h.shape[-1], t.shape[-1], intercept)
    out.add(h, t)
    return out


def scatter_scale(h: Tensor, intercept: bool) -> float:
    """The unit of the penalties, in two passes."""
    mean = h.mean(0) if intercept else torch.zeros(h.shape[1])
    return float(((h - mean) ** 2).sum() / h.shape[1])


def sklearn_ridge(h: Tensor, t: Tensor, penalty: float, intercept: bool) -> Ridge:
    alpha = penalty * scatter_scale(h, intercept)
    return Ridge(alpha=alpha, fit_intercept=intercept, solver="svd").fit(h.numpy(), t.numpy())


def direct_error(h: Tensor, t: Tensor, solution: Solution) -> float:
    return float(((t - h @ solution[0] - solution[1]) ** 2).sum())


def assert_same(found: Solution, expected: Solution, tolerance: float = 1e-9) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- against dense solvers -------------------------------------------------------------------


@pytest.mark.parametrize("features", WIDTHS)
def test_without_penalty_it_is_least_squares(features: int) -> None:
    h, t = regression(features, 200, features, 3)
    ones = torch.cat([h, torch.ones(len(h), 1)], 1)
    dense = torch.linalg.lstsq(ones, t).solution
    assert_same(equations(h, t).solve([0.0])[0], (dense[:-1], dense[-1]))


@pytest.mark.parametrize("features", WIDTHS)
def test_without_intercept_it_is_least_squares_through_the_origin(features: int) -> None:
    h, t = regression(features, 200, features, 3)
    found = equations(h, t, intercept=False).solve([0.0])[0]
    assert_same(found, (torch.linalg.lstsq(h, t).solution, torch.zeros(3).double()))
    # The data have a constant, so that the two kinds of fit are not the same thing.
    assert not torch.allclose(found[0], equations(h, t).solve([0.0])[0][0], atol=1e-3)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("features", WIDTHS)
def test_ridge_is_sklearns_with_a_free_intercept(features: int, intercept: bool) -> None:
    h, t = regression(features, 90, features, 2)
    streamed = equations(h, t, intercept)
    assert streamed.scale == pytest.approx(scatter_scale(h, intercept), rel=1e-12)
    for penalty, found in zip(PENALTIES, streamed.solve(PENALTIES), strict=True):
        dense = sklearn_ridge(h, t, penalty, intercept)
        constant = torch.as_tensor(dense.intercept_).expand(2).double()
        assert_same(found, (torch.as_tensor(dense.coef_.reshape(2, features).T), constant))


@given(
    seed=SEEDS,
    features=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    order=st.permutations(range(7)),
    intercept=st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_chunking_and_merging_order_gives_the_same_solutions(
    seed: int, features: int, cuts: list[int], order: list[int], intercept: bool
) -> None:
    h, t = regression(seed % 1000, 60, features, 2)
    whole = equations(h, t, intercept)
    edges = [0, *sorted(cuts), 60]
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]

    streamed = NormalEquations(features, 2, intercept)
    for rows in pieces:
        streamed.add(h[rows], t[rows])
    parts = [equations(h[rows], t[rows], intercept) for rows in pieces]
    shuffled = [parts[k] for k in order if k < len(parts)]
    nested = [NormalEquations.merged([shuffled[0], whole]), *shuffled[1:]]

    expected = whole.solve([0.0, 0.3])
    for other in (streamed, NormalEquations.merged(shuffled)):
        assert other.count == 60
        np.testing.assert_allclose(other.tt, whole.tt, rtol=1e-10)
        for a, b in zip(other.solve([0.0, 0.3]), expected, strict=True):
            assert_same(a, b, 1e-7)
    # Companion: rows taken in twice do show.
    assert NormalEquations.merged(nested).scale > whole.scale * 1.5


def test_more_rows_than_a_chunk_with_leading_dimensions() -> None:
    h, t = regression(5, 2 * normal_equations.CHUNK + 100, 5, 2)
    found = equations(h.view(4, -1, 5), t.view(4, -1, 2)).solve([0.0])[0]
    dense = torch.linalg.lstsq(torch.cat([h, torch.ones(len(h), 1)], 1), t).solution
    assert_same(found, (dense[:-1], dense[-1]))


def test_merging_leaves_its_parts_alone() -> None:
    parts = [equations(*regression(s, 30, 4, 2)) for s in (1, 2)]
    before = copy.deepcopy(parts)
    NormalEquations.merged(parts).add(*regression(3, 30, 4, 2))
    for part, old in zip(parts, before, strict=True):
        for name in ("mean_h", "mean_t", "hh", "ht", "tt"):
            np.testing.assert_array_equal(getattr(part, name), getattr(old, name))
    assert NormalEquations.merged([NormalEquations(4, 2), parts[0]]) is parts[0]


# --- exactness and precision -----------------------------------------------------------------


@given(seed=SEEDS, features=st.integers(1, 12), targets=st.integers(1, 4))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_an_affine_target_is_recovered(seed: int, features: int, targets: int) -> None:
    h = draw(seed, 40 + features, features) + 0.5
    truth = draw(seed + 1, features, targets), draw(seed + 2, targets)
    fit = equations(h, h @ truth[0] + truth[1])
    assert_same(fit.solve([0.0])[0], truth, 1e-8)
    assert float(fit.squared_error([truth])) <= 1e-12 * fit.tt.sum()


def test_a_large_common_offset_costs_no_precision() -> None:
    """1e6 on every feature; companion: sums about zero lose at least a thousand times more."""
    h, t = regression(11, 4000, 6, 2)
    h = (h * 2**20).round() / 2**20  # so that adding and removing the offset is exact
    plain, moved = NormalEquations(6, 2), NormalEquations(6, 2)
    about_zero = NormalEquations(7, 2, intercept=False)
    for s in range(0, 4000, 300):
        a, b = h[s : s + 300], t[s : s + 300]
        plain.add(a, b)
        moved.add(a + 1e6, b)
        about_zero.add(torch.cat([a + 1e6, torch.ones(len(a), 1)], 1), b)
    expected = plain.solve([0.0])[0][0]
    lost = (moved.solve([0.0])[0][0] - expected).abs().max()
    assert lost < 1e-8
    assert (about_zero.solve([0.0])[0][0][:6] - expected).abs().max() > 1000 * lost


@pytest.mark.parametrize("powers", [(0, 0, 0, 0), (-14, 0, 3, 6)])
def test_least_squares_does_not_depend_on_the_units_of_the_features(powers: tuple[int]) -> None:
    """A weak feature is not a singular one: no penalty may slip in."""
    h, t = regression(12, 80, 4, 2)
    units = 10.0 ** torch.tensor(powers, dtype=torch.float64)
    weight = equations(h * units, t).solve([0.0])[0][0] * units[:, None]
    torch.testing.assert_close(weight, equations(h, t).solve([0.0])[0][0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("intercept", [True, False])
def test_low_precision_rows_are_summed_in_float64(dtype: torch.dtype, intercept: bool) -> None:
    h, t = (x.to(dtype) for x in regression(13, 3000, 5, 2))
    found, expected = equations(h, t, intercept), equations(h.double(), t.double(), intercept)
    np.testing.assert_array_equal(found.hh, expected.hh)
    np.testing.assert_array_equal(found.ht, expected.ht)
    # Companion: sums in the dtype itself, or rows that were not rounded, are something else.
    assert not np.allclose(float((h * h).sum()), float((h.double() ** 2).sum()), rtol=1e-12)


@pytest.mark.parametrize("intercept", [True, False])
def test_strided_rows_that_require_gradients_are_read_and_not_changed(intercept: bool) -> None:
    h, t = regression(14, 50, 6, 4)
    h_strided, t_strided = h.T.contiguous().T.requires_grad_(), t.repeat(1, 2)[:, :4]
    found = equations(h_strided, t_strided, intercept).solve([0.1])[0]
    assert_same(found, equations(h, t, intercept).solve([0.1])[0])
    assert torch.equal(h_strided.detach(), h)
    assert torch.equal(t_strided, t)


# --- penalty and prior -----------------------------------------------------------------------


@given(seed=SEEDS, features=st.integers(1, 8), intercept=st.booleans(), power=st.floats(-4, 2))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_ridge_towards_a_prior_is_ridge_of_the_rest(
    seed: int, features: int, intercept: bool, power: float
) -> None:
    h, t = regression(seed % 1000, 30, features, 2)
    prior = draw(seed, features, 2), torch.zeros(2)
    found = equations(h, t, intercept).solve([10**power], prior)[0]
    shifted = equations(h, t - h @ prior[0], intercept).solve([10**power])[0]
    assert_same(found, (prior[0] + shifted[0], shifted[1]), 1e-8)


@pytest.mark.parametrize("intercept", [True, False])
def test_an_overwhelming_penalty_gives_the_prior(intercept: bool) -> None:
    h, t = regression(15, 60, 5, 3)
    fit = equations(h, t, intercept)
    prior = draw(16, 5, 3), torch.zeros(3)
    for given_prior, weight in ((None, torch.zeros(5, 3)), (prior, prior[0])):
        constant = (t - h @ weight.double()).mean(0) * float(intercept)
        found = fit.solve([1e12], given_prior)[0]
        assert_same(found, (weight.double(), constant), 1e-9)


def test_more_penalty_shrinks_more_and_fits_less() -> None:
    h, t = regression(17, 60, 7, 3)
    fit, prior = equations(h, t), (draw(18, 7, 3), torch.zeros(3))
    found = fit.solve([0.0, 0.01, 0.1, 1.0, 10.0], prior)
    distance = torch.stack([(weight - prior[0]).norm() for weight, _ in found])
    assert (distance.diff() < 0).all()
    assert (fit.squared_error(found).diff() > 0).all()


def test_a_prior_of_low_precision_counts_at_its_value() -> None:
    fit, prior = equations(*regression(19, 40, 4, 2)), (draw(20, 4, 2).bfloat16(), torch.zeros(2))
    low, high = (fit.solve([0.5], (p, prior[1]))[0] for p in (prior[0], prior[0].double()))
    assert_same(low, high, 0.0)


# --- singular systems ------------------------------------------------------------------------


def redundant(kind: str, seed: int) -> Tensor:
    """Rows whose centred features do not have full rank."""
    rows = {"few rows": 6, "one row": 1, "as many rows as features": 12}.get(kind, 60)
    h = draw(seed, rows, 12)
    if kind == "a feature twice":
        h[:, 11] = h[:, 3]
    if kind == "a constant feature":
        h[:, 5] = 1 / 3
    if kind == "shares of a whole":
        h = torch.nn.functional.one_hot(h.argmax(1), 12).double()
    return h


@pytest.mark.parametrize(
    "kind",
    [
        "few rows",
        "as many rows as features",
        "a feature twice",
        "a constant feature",
        "shares of a whole",
    ],
)
@pytest.mark.parametrize("seed", range(8))
def test_a_singular_system_gives_about_the_shortest_solution(kind: str, seed: int) -> None:
    """Cholesky alone may divide by a pivot that is pure rounding and return weights like 1e2."""
    h, t = redundant(kind, 100 * seed), draw(100 * seed + 1, 60, 2)
    t = t[: len(h)]
    fit = NormalEquations(12, 2)
    for k in range(0, len(h), 7):
        fit.add(h[k : k + 7], t[k : k + 7])
    found = fit.solve([0.0])[0]
    shortest = torch.linalg.pinv(h - h.mean(0), rtol=1e-9) @ (t - t.mean(0))
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], shortest, rtol=1e-2, atol=1e-2)
    best = direct_error(h, t, (shortest, (t - h @ shortest).mean(0)))
    assert direct_error(h, t, found) == pytest.approx(best, abs=1e-4)


def test_the_penalty_of_a_singular_system_is_the_smallest_that_factorizes() -> None:
    fit = equations(redundant("few rows", 3), draw(4, 6, 2))
    used, smallest, larger = fit.solve([0.0, 1e-12, 1e-10])
    assert_same(used, smallest, 0.0)
    assert not torch.equal(used[0], larger[0])
    # A regular system is solved with the penalty that was asked for.
    regular = equations(*regression(21, 60, 12, 2)).solve([0.0, 1e-12])
    assert not torch.equal(regular[0][0], regular[1][0])


def test_features_that_never_vary_leave_the_prior_and_the_mean() -> None:
    h, t = torch.ones(9, 3), draw(22, 9, 2)
    prior = draw(23, 3, 2), torch.zeros(2)
    for fit in (equations(h, t), equations(redundant("one row", 1)[:, :3], t[:1])):
        assert fit.scale == 0
        assert_same(fit.solve([0.1])[0], (torch.zeros(3, 2).double(), torch.as_tensor(fit.mean_t)))
        weight, constant = fit.solve([0.1], prior)[0]
        assert torch.equal(weight, prior[0])
        at_mean = torch.as_tensor(fit.mean_h) @ weight + constant
        torch.testing.assert_close(at_mean, torch.as_tensor(fit.mean_t))


# --- errors in closed form -------------------------------------------------------------------


@given(seed=SEEDS, features=st.integers(1, 9), intercept=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_squared_error_is_that_of_the_rows(seed: int, features: int, intercept: bool) -> None:
    h, t = regression(seed % 1000, 50, features, 3)
    solutions = [
        (draw(seed + k, features, 3), draw(seed + k + 9, 3) * float(intercept)) for k in range(3)
    ]
    found = equations(h, t, intercept).squared_error(solutions)
    assert found.tolist() == pytest.approx([direct_error(h, t, s) for s in solutions], rel=1e-10)


def test_no_other_solution_fits_better() -> None:
    fit = equations(*regression(24, 50, 6, 2))
    weight, constant = fit.solve([0.0])[0]
    others = [(weight + 1e-3 * draw(s, 6, 2), constant + 1e-3 * draw(s + 1, 2)) for s in range(20)]
    assert (fit.squared_error(others) > fit.squared_error([(weight, constant)])).all()


def brute_force(
    h: Tensor, t: Tensor, folds: int, intercept: bool, *, optimistic: bool = False
) -> list[float]:
    """Refit by sklearn on the rows of every split and look at every held-out row."""
    errors = [0.0] * len(PENALTIES)
    for train, test in KFold(folds).split(h):
        rows = np.arange(len(h)) if optimistic else train
        for k, penalty in enumerate(PENALTIES):
            model = sklearn_ridge(h[rows], t[rows], penalty, intercept)
            predicted = model.predict(h[test].numpy()).reshape(len(test), -1)
            errors[k] += float(((t[test].numpy() - predicted) ** 2).sum())
    return errors


def folded(h: Tensor, t: Tensor, folds: int, intercept: bool) -> list[NormalEquations]:
    return [equations(h[rows], t[rows], intercept) for _, rows in KFold(folds).split(h)]


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("rows", "folds"), [(40, 2), (41, 3), (43, 5), (24, 24)])
def test_held_out_errors_are_those_of_refits(rows: int, folds: int, intercept: bool) -> None:
    h, t = regression(25, rows, 6, 3)
    errors, solutions = held_out_errors(folded(h, t, folds, intercept), PENALTIES)
    assert errors.tolist() == pytest.approx(brute_force(h, t, folds, intercept), rel=1e-9)
    assert [len(found) for found in solutions] == [len(PENALTIES)] * folds


@pytest.mark.parametrize("intercept", [True, False])
def test_a_fold_in_its_own_fit_looks_better_than_it_is(intercept: bool) -> None:
    """Companion: a split that leaks is seen, as its errors are smaller at every penalty."""
    h, t = regression(26, 40, 12, 2)
    folds = folded(h, t, 4, intercept)
    honest, _ = held_out_errors(folds, PENALTIES)
    everything = NormalEquations.merged(folds).solve(PENALTIES)
    leaking = torch.stack([fold.squared_error(everything) for fold in folds]).sum(0)
    expected = brute_force(h, t, 4, intercept, optimistic=True)
    assert leaking.tolist() == pytest.approx(expected, rel=1e-9)
    assert (leaking < honest).all()
    assert leaking[0] < 0.8 * honest[0]


def test_held_out_solutions_never_saw_their_fold() -> None:
    h, t = regression(27, 40, 5, 2)
    _, before = held_out_errors(folded(h, t, 4, True), PENALTIES)
    t = torch.cat([t[:10] + 100 * draw(28, 10, 2), t[10:]])
    _, after = held_out_errors(folded(h, t, 4, True), PENALTIES)
    for k in range(len(PENALTIES)):
        assert_same(after[0][k], before[0][k], 0.0)
        assert not torch.allclose(after[1][k][0], before[1][k][0], atol=1e-2)


def test_a_fold_without_rows_costs_nothing_and_gets_the_fit_to_all_others() -> None:
    folds = folded(*regression(28, 40, 5, 2), 4, True)
    errors, _ = held_out_errors(folds, PENALTIES)
    with_empty, solutions = held_out_errors([*folds, NormalEquations(5, 2)], PENALTIES)
    torch.testing.assert_close(with_empty, errors)
    everything = NormalEquations.merged(folds).solve(PENALTIES)
    for found, expected in zip(solutions[-1], everything, strict=True):
        assert_same(found, expected)


def test_every_fold_has_its_own_prior() -> None:
    h, t = regression(29, 40, 5, 2)
    priors = [(draw(30 + f, 5, 2), torch.zeros(2)) for f in range(4)]
    errors, solutions = held_out_errors(folded(h, t, 4, True), [0.5], priors)
    expected = 0.0
    for f, (train, test) in enumerate(KFold(4).split(h)):
        refit = equations(h[train], t[train]).solve([0.5], priors[f])[0]
        assert_same(solutions[f][0], refit)
        expected += direct_error(h[test], t[test], refit)
    assert errors.tolist() == pytest.approx([expected], rel=1e-9)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["features", "targets"])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_added(
    value: float, place: str
) -> None:
    h, t = regression(31, normal_equations.CHUNK + 50, 3, 2)
    fit = equations(h, t)
    before = copy.deepcopy(fit)
    {"features": h, "targets": t}[place][-1, 1] = value  # in the second chunk
    with pytest.raises(CalibrationError, match="not finite"):
        fit.add(h, t)
    assert fit.count == before.count
    np.testing.assert_array_equal(fit.hh, before.hh)
    np.testing.assert_array_equal(fit.mean_t, before.mean_t)


@pytest.mark.parametrize(
    ("h_shape", "t_shape"),
    [
        ((5, 4), (5, 2)),
        ((5, 3), (5, 1)),
        ((5, 3), (4, 2)),
        ((3, 5), (5, 2)),
        ((2, 6, 3), (6, 2, 2)),
        ((12, 3), (2, 6, 2)),
        ((), ()),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(
    h_shape: tuple[int, ...], t_shape: tuple[int, ...]
) -> None:
    with pytest.raises(CalibrationError, match="3 features and 2 targets"):
        NormalEquations(3, 2).add(torch.zeros(h_shape), torch.zeros(t_shape))


@pytest.mark.parametrize("penalty", [-1e-3, float("nan"), float("inf"), 1e308])
def test_an_impossible_penalty_is_refused(penalty: float) -> None:
    with pytest.raises(CalibrationError, match="finite penalty"):
        equations(*regression(32, 30, 3, 2)).solve([0.1, penalty])


def test_sums_that_overflow_are_refused() -> None:
    h, t = regression(33, 30, 3, 2)
    with pytest.raises(CalibrationError, match="finite sums"), np.errstate(over="ignore"):
        equations(h * 1e200, t).solve([0.0])


@pytest.mark.parametrize(
    ("weight", "constant"), [((3, 1), (2,)), ((2,), (2,)), ((3, 2), (1,)), ((3, 2), ())]
)
def test_solutions_and_priors_of_another_shape_are_not_broadcast(
    weight: tuple[int, ...], constant: tuple[int, ...]
) -> None:
    fit = equations(*regression(34, 30, 3, 2))
    wrong = torch.zeros(weight), torch.zeros(constant)
    with pytest.raises(CalibrationError, match="expected a solution of shapes"):
        fit.solve([0.1], wrong)
    with pytest.raises(CalibrationError, match="expected a solution of shapes"):
        fit.squared_error([wrong])


def test_solutions_and_priors_that_are_not_finite_are_refused() -> None:
    fit = equations(*regression(35, 30, 3, 2))
    wrong = torch.full((3, 2), torch.nan), torch.zeros(2)
    with pytest.raises(CalibrationError, match="not finite"):
        fit.solve([0.1], wrong)
    with pytest.raises(CalibrationError, match="not finite"):
        fit.squared_error([wrong])


def test_sums_about_zero_do_not_judge_a_constant() -> None:
    with pytest.raises(CalibrationError, match="about zero"):
        equations(*regression(36, 30, 3, 2), intercept=False).squared_error(
            [(torch.zeros(3, 2), torch.ones(2))]
        )


def test_parts_that_cannot_be_merged_are_refused() -> None:
    h, t = regression(37, 30, 3, 2)
    with pytest.raises(CalibrationError, match="no rows"):
        NormalEquations.merged([NormalEquations(3, 2)])
    for other in (equations(h, t, intercept=False), equations(h[:, :2], t), equations(h, t[:, :1])):
        with pytest.raises(CalibrationError, match="same features, targets and intercept"):
            NormalEquations.merged([equations(h, t), other])


def test_folds_that_cannot_be_held_out_are_refused() -> None:
    fold = equations(*regression(38, 30, 3, 2))
    for folds in ([fold], [], [fold, NormalEquations(3, 2)]):
        with pytest.raises(CalibrationError, match="at least two folds with rows"):
            held_out_errors(folds, [0.1])
    prior = torch.zeros(3, 2), torch.zeros(2)
    for count in (1, 3):
        with pytest.raises(CalibrationError, match="one per fold"):
            held_out_errors([fold, fold], [0.1], [prior] * count)


# --- cost and documentation ------------------------------------------------------------------


def test_two_folds_at_the_width_of_flux_fit_in_200_mb() -> None:
    """3,072 features and 64 outputs in bfloat16; memory does not depend on the number of rows."""
    h, t = draw(39, 1024, 3072).bfloat16(), draw(40, 1024, 64).bfloat16()
    tracemalloc.start()
    try:
        folds = [NormalEquations(3072, 64), NormalEquations(3072, 64)]
        for k, fold in enumerate(folds):
            rows = slice(512 * k, 512 * (k + 1))
            fold.add(h[rows], t[rows])
        streamed, peak_of_streaming = tracemalloc.get_traced_memory()
        errors, _ = held_out_errors(folds, [1e-3, 1e-1, 10.0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert errors.isfinite().all()
    assert peak_of_streaming < 200e6
    assert peak < 200e6
    # The arrays are traced at all: the folds, and beside them a factor.
    assert streamed > 2 * 3072 * 3073 // 2 * 8
    assert peak > streamed + 3072 * 3073 // 2 * 8


def test_the_examples_of_the_module_run() -> None:
    result = doctest.testmod(normal_equations)
    assert result.attempted >= 5
    assert result.failed == 0
