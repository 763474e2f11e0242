"""Heads of a readout"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from readout_rigs import (
    Rig,
    fitted,
    lower_bound,
    prompts_of,
    sampled,
    shared_rig,
    squared,
)
from tiny_pipelines import ALL
from torch import Tensor

import evenkeel
from evenkeel.corrections import Readout
from evenkeel.corrections.head_table import HeadTable
from evenkeel.errors import OutOfRange
from evenkeel.fitting.readout.solve import FOLDS, CallFit, Judge, Unit, units_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.statistics.normal_equations import NormalEquations

pytestmark = pytest.mark.usefixtures("no_thread_survives")


# ---- cross-validation


def rows(seed: int, count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(count, 6, generator=generator)
    noise = torch.randn(count, 2, generator=generator)
    return h, h[:, :2] + noise


def folds_of(*parts: tuple[Tensor, Tensor]) -> list[NormalEquations]:
    found = [NormalEquations(6, 2) for _ in parts]
    for equations, (h, t) in zip(found, parts, strict=True):
        equations.add(h, t)
    return found


def test_a_fold_advances_with_a_solution_that_does_not_know_it() -> None:
    parts = [rows(k) for k in range(4)]
    fit = CallFit.of(folds_of(*parts))
    # Small enough that the penalty stays: it is the one thing that all folds choose together.
    changed = CallFit.of(folds_of(*parts[:3], (parts[3][0], parts[3][1] + 0.01)))
    assert fit.penalty == changed.penalty
    for f, (a, b) in enumerate(zip(fit.without, changed.without, strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) == (f == 3)
    assert not torch.equal(fit.whole[1], changed.whole[1])


def test_a_prior_is_that_of_the_same_fold() -> None:
    parts = [rows(k) for k in range(4)]
    prior = CallFit.of(folds_of(*[rows(k + 10) for k in range(4)]))
    fit = CallFit.of(folds_of(*parts), prior)
    other = replace(prior, without=[*prior.without[:3], prior.whole])
    changed = CallFit.of(folds_of(*parts), other)
    same = [torch.equal(a[0], b[0]) for a, b in zip(fit.without, changed.without, strict=True)]
    assert fit.penalty == changed.penalty and same == [True, True, True, False]


def test_solutions_are_ridge_regressions_on_the_other_folds() -> None:
    parts = [rows(k) for k in range(4)]
    fit = CallFit.of(folds_of(*parts))
    for f in range(4):
        h = torch.cat([p[0] for k, p in enumerate(parts) if k != f]).double()
        t = torch.cat([p[1] for k, p in enumerate(parts) if k != f]).double()
        hc, tc = h - h.mean(0), t - t.mean(0)
        gram = hc.T @ hc
        penalty = fit.penalty * gram.diagonal().mean()
        weight = torch.linalg.solve(gram + penalty * torch.eye(6), hc.T @ tc)
        torch.testing.assert_close(fit.without[f][0], weight, rtol=1e-7, atol=1e-7)
        constant = t.mean(0) - h.mean(0) @ weight
        torch.testing.assert_close(fit.without[f][1], constant, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("prompts", [1, 2, 3, 4, 5, 9, 32])
@pytest.mark.parametrize("features", [32, 3072])
def test_units_cover_all_rows_once_and_folds_never_share_a_prompt(
    prompts: int, features: int
) -> None:
    units = units_of(prompts, 64, features)
    for prompt in range(prompts):
        spans = [u.rows(64) for u in units if u.prompt == prompt]
        assert list(itertools.chain(*(range(64)[s] for s in spans))) == list(range(64))
    folds = {u.fold for u in units}
    assert folds == set(range(len(folds))) and 2 <= len(folds) <= FOLDS
    shared = [p for p in range(prompts) if len({u.fold for u in units if u.prompt == p}) > 1]
    assert shared == ([0] if prompts == 1 else [])
    assert len(folds) == 2 or features == 32
    assert len(units) >= 4


def test_the_bound_is_students() -> None:
    units = [Unit(p, 0, 1, p) for p in range(5)]
    before = np.array([1.0, 2.0, 1.5, 1.2, 0.9])
    after = np.array([0.5, 1.7, 0.9, 1.3, 0.6])
    judge = Judge(units)
    for unit, b, a in zip(units, before, after, strict=True):
        for _ in range(2):  # rows arrive in pieces
            judge.see(unit, torch.tensor([b / 2]).sqrt(), torch.tensor([a / 2]).sqrt())
    judge.pending.now()
    verdict = judge.verdict(3, 1, 0.1)
    interval = scipy.stats.ttest_1samp(after - before, 0).confidence_interval(0.90)
    assert (verdict.step, verdict.branch, verdict.penalty) == (3, 1, 0.1)
    assert verdict.held_out == pytest.approx(after.mean() / before.mean(), rel=1e-6)
    assert verdict.bound == pytest.approx(1 + interval.high / before.mean(), rel=1e-6)
    assert verdict.explanation == ""


def test_an_improvement_that_is_not_certain_is_not_kept() -> None:
    units = [Unit(p, 0, 1, p) for p in range(4)]
    judge = Judge(units)
    for unit, a in zip(units, (0.1, 1.2, 0.2, 1.3), strict=True):
        judge.see(unit, torch.tensor([1.0]), torch.tensor([a]).sqrt())
    judge.pending.now()
    verdict = judge.verdict(0, 0, 1.0)
    assert verdict.held_out < 1 < verdict.bound
    assert verdict.explanation == "no certain improvement on held-out prompts"
    assert Judge(units).verdict(0, 0, 1.0).explanation == "there is no error to correct"


# ---- heads over noise levels


def table_of(sigma: Sequence[float], branches: int = 1) -> HeadTable:
    generator = torch.Generator().manual_seed(0)
    t = len(sigma)
    weight = torch.randn(t, branches, 5, 3, generator=generator)
    constant = torch.randn(t, branches, 3, generator=generator)
    active = torch.ones(t, branches, dtype=torch.bool)
    return HeadTable.of(np.ones(t), np.array(sigma), weight, constant, active)


def heads(table: HeadTable, sigma: Sequence[float], **options: Any) -> list[Any]:
    return table.at(np.ones(len(sigma)), np.array(sigma), **options)


def test_a_calibrated_level_is_met_exactly() -> None:
    table = table_of((8.0, 4.0, 1.0))
    for step, found in enumerate(heads(table, (8.0, 4.0, 1.0))):
        wanted = table.entry(step)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_between_levels_heads_are_linear_in_log_snr() -> None:
    table = table_of((8.0, 4.0, 1.0))
    for share in (0.25, 0.5, 0.9):
        level = float(np.exp((1 - share) * np.log(4.0) + share * np.log(1.0)))
        (found,) = heads(table, (level,))
        for a, b, c in zip(table.entry(1), table.entry(2), found, strict=True):
            torch.testing.assert_close(c, (1 - share) * a + share * b, rtol=1e-5, atol=1e-6)


def test_levels_beyond_the_outermost_neighbours_are_refused() -> None:
    table = table_of((8.0, 4.0, 1.0))  # one ratio of 2 above, one of 4 below
    inside = heads(table, (15.9, 0.26))
    assert torch.equal(inside[0][0], table.entry(0)[0])  # the outermost head, not extrapolated
    assert torch.equal(inside[1][0], table.entry(2)[0])
    for level in (16.1, 0.24):
        with pytest.raises(OutOfRange, match="1 of 2 steps are outside"):
            heads(table, (4.0, level))
    kept = heads(table, (16.1, 4.0, 0.24), allow_range=True)
    assert [k is None for k in kept] == [True, False, True]


def test_two_stages_at_one_level_take_the_entries_of_their_rank() -> None:
    table = table_of((8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0))
    assert table.places(table.alpha, table.sigma) == [(k, k, 0.0) for k in range(7)]
    # Other numbers of steps reach a level at another position in the run.
    assert table.places(np.ones(3), np.array([8.0, 1.0, 1.0]))[1:] == [(5, 5, 0.0), (6, 6, 0.0)]
    between = table.places(np.ones(2), np.array([2.8, 2.8]))
    assert [place[:2] for place in between if place] == [(1, 3), (2, 4)]


def test_inactive_entries_hold_nothing_and_fade_in() -> None:
    active = torch.tensor([[True], [False], [False]])
    ones = torch.ones(3, 1, 5, 3)
    table = HeadTable.of(np.ones(3), np.array([8.0, 4.0, 2.0]), ones, ones[:, :, 0], active)
    assert (table.weight[1:] == 0).all() and not table.is_identity
    found = heads(table, (8.0, 4.0, 3.0, float(np.sqrt(32.0))))
    assert [f is None for f in found] == [False, True, True, False]
    torch.testing.assert_close(found[3][0], 0.5 * table.entry(0)[0])
    nothing = HeadTable.of(table.alpha, table.sigma, ones, ones[:, :, 0], active & False)
    assert nothing.is_identity and heads(nothing, (8.0, 2.0)) == [None, None]


def test_pure_noise_has_a_place() -> None:
    alpha = np.array([0.0, 0.5])
    ones = torch.ones(2, 1, 5, 3)
    active = torch.ones(2, 1, dtype=torch.bool)
    table = HeadTable.of(alpha, np.array([1.0, 0.8]), ones, ones[:, :, 0], active)
    found = table.at(np.array([0.0, 0.1]), np.array([1.0, 0.9]))
    assert all(f is not None and torch.isfinite(f[0]).all() for f in found)


def test_three_digits_of_the_largest_weight_survive() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (
        torch.randn(2, 1, 50, 4, generator=generator)
        * torch.tensor([1e-6, 1e6])[:, None, None, None]
    )
    active = torch.ones(2, 1, dtype=torch.bool)
    table = HeadTable.of(np.ones(2), np.array([2.0, 1.0]), weight, weight[:, :, 0], active)
    for step in range(2):
        error = (table.entry(step)[0] - weight[step]).abs().max()
        assert error < 5e-4 * weight[step].abs().max()


@pytest.mark.parametrize("steps", [2, 5, 8])
def test_a_fit_at_eight_steps_runs_at_other_numbers_of_steps(flux: Rig, steps: int) -> None:
    eight = fit_at_eight()
    with evenkeel.applied(flux.pipe, eight):
        found = sampled(flux.tiny, steps)
    flux.put(flux.reference)
    wanted = sampled(flux.tiny, steps)
    flux.put(flux.quantized)
    plain = sampled(flux.tiny, steps)
    assert lower_bound(squared(plain, wanted) - squared(found, wanted)) > 0


@functools.cache
def fit_at_eight() -> Readout:
    rig = shared_rig("flux")
    return rig.refit(num_inference_steps=8, prompts=prompts_of(rig.tiny, range(4)))


def test_a_schedule_outside_the_levels_is_refused_or_keeps_its_own_head(flux: Rig) -> None:
    last = replace(fit_at_eight().table, alpha=np.full(8, 0.9), sigma=np.linspace(0.11, 0.10, 8))
    narrow = replace(fit_at_eight(), table=last)
    evenkeel.apply(flux.pipe, narrow)
    with pytest.raises(OutOfRange, match="outside the noise levels"):
        sampled(flux.tiny)
    evenkeel.apply(flux.pipe, narrow, allow=("range",))
    assert torch.equal(sampled(flux.tiny), flux.plain)


def test_a_two_stage_solver_has_a_head_per_call() -> None:
    tiny = ALL["sdxl"]()
    tiny.pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(tiny.pipe.scheduler.config)
    reference = tiny.model
    quantized = quantize_module(reference, QuantizerSpec.parse("w3a4-g16"))[0]
    readout = fitted(tiny, reference, quantized, num_inference_steps=3)
    assert readout.table.steps == 5  # the last step has one stage
    levels = list(zip(readout.table.alpha, readout.table.sigma, strict=True))
    assert len(set(levels)) == 3
    wanted = sampled(tiny, 3)
    setattr(tiny.pipe, tiny.denoiser, quantized)
    plain = sampled(tiny, 3)
    with evenkeel.applied(tiny.pipe, readout):
        found = sampled(tiny, 3)
    assert lower_bound(squared(plain, wanted) - squared(found, wanted)) > 0
