"""Options, limits and refusals of Q-Drift and exact drift; the plan says why it leaves a step alone."""

from __future__ import annotations

from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_evidence import COUNT, evidence_for, moments_of, white_error

from evenkeel.corrections import Correction, ExactDrift, Identity, QDrift
from evenkeel.corrections.catalogue import ALL, EVIDENCE, available
from evenkeel.corrections.confident import resampled_factors
from evenkeel.errors import CalibrationError, OutOfRange
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence, log_snr
from evenkeel.statistics.histogram import ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.testing.scheduler_cases import BY_NAME, SD_BETAS

KINDS = [QDrift, ExactDrift]
LEVELS = [8.0, 4.0, 2.0, 1.0, 0.5]


def law_of(name: str, **step: Any) -> StepLaw:
    case = BY_NAME[name]
    return probe_scheduler(case.ready(), step_kwargs=step or case.step)


def euler_at(*levels: float) -> StepLaw:
    scheduler = d.EulerDiscreteScheduler(**SD_BETAS)
    scheduler.set_timesteps(sigmas=[*levels, 0.0])
    return probe_scheduler(scheduler)


def evidence_of(law: StepLaw, moments: PairedMoments) -> Evidence:
    return Evidence(law.prediction, law.alpha[:-1], law.sigma[:-1], moments)


def left_point(law: StepLaw, k: int, v: float) -> float:
    """Q-Drift Eq. 22."""
    return float(v * (law.sigma[k] - law.sigma[k + 1]) / (2 * law.sigma[k]))


def factors(correction: Correction, law: StepLaw, **options: Any) -> np.ndarray:
    return correction.plan(law, **options).factor.numpy() - 1


# --- steps that are left alone, and why ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("heun-epsilon", slice(0, 18, 2)),
        ("heun-v_prediction", slice(0, 18, 2)),
        ("kdpm2-epsilon", slice(0, 18, 2)),
        ("kdpm2-v_prediction", slice(0, 18, 2)),
        ("single-dpmsolver++-2", slice(0, 8, 2)),
        ("flow-heun", slice(0, 18, 2)),
    ],
)
def test_intermediate_stages_are_left_alone(name: str, stages: slice, kind: Any) -> None:
    law = law_of(name)
    plan = kind(evidence_for(law, 0.02)).plan(law)
    assert not bool(plan.active[stages].any())
    assert all("intermediate stage" in note for note in plan.explanations[stages])
    between = slice(3, stages.stop - 1, 2)
    assert bool(plan.active[between].all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sde-dpmsolver++-2-midpoint", "sde-dpmsolver++-3-midpoint"])
def test_stochastic_multistep_is_left_alone(name: str, kind: Any) -> None:
    law = law_of(name)
    plan = kind(evidence_for(law, 0.02)).plan(law)
    assert plan.is_identity
    assert all("stochastic multistep" in note for note in plan.explanations[:-1])
    assert (
        not kind(evidence_for(law_of("sde-dpmsolver++-1-midpoint"), 0.02))
        .plan(law_of("sde-dpmsolver++-1-midpoint"))
        .is_identity
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pure_noise_has_no_consistent_factor(kind: Any) -> None:
    """At alpha = 0 the state says nothing of the noise's direction in y = x / alpha."""
    law = law_of("flow-euler-shift3")
    assert law.alpha[0] == 0.0
    plan = kind(evidence_for(law, 0.02), along="epsilon").plan(law)
    assert plan.explanations[0].startswith("pure noise") and not bool(plan.active[0])
    assert bool(plan.active[1:-1].any())
    along_v = QDrift(evidence_for(law, 0.02), along="output").plan(law)
    assert bool(along_v.active[0])


@pytest.mark.parametrize("kind", KINDS)
def test_meaningless_statistics_are_not_used(kind: Any) -> None:
    """R^2 = S_qe^2 / (S_ee S_qq) = E / (E + V) for an independent error."""
    law = euler_at(*LEVELS)
    share = np.array([0.05, 0.09, 0.11, 0.5, 0.9])
    v = 0.02
    moments = moments_of((v * share / (1 - share))[None, :, None], 0.0, v)
    plan = kind(evidence_of(law, moments)).plan(law)
    assert plan.active.tolist() == [False, False, True, True, False]  # the last ends at zero noise
    assert all("R^2" in note for note in plan.explanations[:2])
    eager = kind(evidence_of(law, moments), min_explained=0.0).plan(law)
    assert eager.active.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["euler-epsilon", "dpmsolver++-2-midpoint", "ddim-eta1", "heun-epsilon"]
)
def test_zero_error_is_the_identity(name: str, kind: Any) -> None:
    law = law_of(name)
    plan = kind(evidence_for(law, 0.0)).plan(law)
    assert plan.is_identity
    assert torch.equal(plan.base, torch.ones_like(plan.base))
    assert not bool(plan.samples.any()) and not bool(plan.outputs.any())
    assert not kind(evidence_for(law, 1e-6)).plan(law).is_identity


def test_identity_changes_nothing_and_says_so() -> None:
    plan = Identity().plan(law_of("euler-epsilon"))
    assert plan.is_identity and set(plan.explanations) == {"identity"}


def test_a_step_that_passes_zero_noise_is_not_stretched() -> None:
    law = law_of("pndm-plms-v_prediction")
    k = int(np.flatnonzero(law.sigma_down < 0)[0])
    plan = ExactDrift(evidence_for(law, 0.02)).plan(law)
    assert plan.explanations[k] == "the step passes zero noise before it adds its own"
    assert plan.factor[k, 0] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_first_signal_poisons_nothing(kind: Any) -> None:
    """IPNDM has two states without signal, where y = x / alpha does not exist."""
    law = law_of("ipndm")
    plan = kind(evidence_for(law, 0.01)).plan(law)
    assert bool(torch.isfinite(plan.factor).all())
    assert not bool(plan.active[0])


# --- the range of calibrated levels ---


@pytest.mark.parametrize("kind", KINDS)
def test_uncalibrated_levels_raise_or_are_left_alone_by_name(kind: Any) -> None:
    calibrated, wider = euler_at(4.0, 2.0, 1.0), euler_at(*LEVELS)
    correction = kind(evidence_for(calibrated, 0.05))
    with pytest.raises(OutOfRange, match=r"2 of 5 steps .*sigma/alpha = 8, 0.5, calibrated 1 to 4"):
        correction.plan(wider)
    plan = correction.plan(wider, allow_range=True)
    assert plan.active.tolist() == [False, True, True, True, False]
    assert plan.explanations[0] == plan.explanations[4] == "outside the calibrated noise levels"
    inside = kind(evidence_for(wider, 0.05)).plan(wider)
    torch.testing.assert_close(plan.factor[1:4], inside.factor[1:4])


def test_a_remembered_output_out_of_range_counts_too() -> None:
    """The second step of a 2M run uses the first output as well."""
    law = law_of("dpmsolver++-2-midpoint")
    evidence = evidence_for(law, 0.01)
    late = Evidence(
        law.prediction, law.alpha[1:-1], law.sigma[1:-1], evidence.moments.map(lambda t: t[:, 1:])
    )
    plan = QDrift(late).plan(law, allow_range=True)
    assert plan.active.tolist()[:4] == [False, False, True, True]
    assert plan.explanations[1] == "outside the calibrated noise levels"


def test_interpolation_is_exact_at_levels_and_linear_in_log_variance_between() -> None:
    v = np.array([0.01, 0.09, 0.03])
    evidence = evidence_for(euler_at(8.0, 2.0, 0.5), v)
    exact = euler_at(8.0, 2.0, 0.5)
    for k in range(2):
        assert factors(QDrift(evidence), exact)[k, 0] == pytest.approx(left_point(exact, k, v[k]))
    between = euler_at(4.0, 1.0)  # halfway in log-SNR: the geometric mean
    found = factors(QDrift(evidence), between)
    assert found[0, 0] == pytest.approx(left_point(between, 0, 0.03), rel=1e-5)
    quarter = euler_at(8.0**0.75 * 2.0**0.25, 0.6)
    expected = left_point(quarter, 0, 0.01**0.75 * 0.09**0.25)
    assert factors(QDrift(evidence), quarter)[0, 0] == pytest.approx(expected, rel=1e-5)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-6, 10.0), min_size=5, max_size=5), st.floats(0.55, 7.9))
def test_interpolated_variance_stays_between_its_neighbours(v: list[float], level: float) -> None:
    calibrated = euler_at(*LEVELS)
    evidence = evidence_for(calibrated, np.array(v))
    run = euler_at(level)
    values = torch.tensor(v, dtype=torch.float64)[:, None]
    found, outside = evidence.at(run, values, log=True)
    index = int(np.searchsorted(-np.array(LEVELS), -level))
    low, high = sorted([v[index - 1], v[index]])
    assert low * (1 - 1e-6) <= float(found[0, 0]) <= high * (1 + 1e-6)
    assert not outside.any()


@pytest.mark.parametrize("name", ["euler-epsilon", "dpmsolver++-2-midpoint", "flow-euler-shift3"])
def test_another_number_of_steps_recomputes_the_stretch(name: str) -> None:
    """V belongs to the noise level, c to the step: half the step, half the stretch."""
    case = BY_NAME[name]
    scheduler = case.make()
    laws = {}
    for steps in (40, 20):
        scheduler.set_timesteps(steps)
        laws[steps] = probe_scheduler(scheduler)
    evidence = evidence_for(laws[40], 0.01)
    correction = QDrift(evidence, along="epsilon", denominator="left")
    here = correction.plan(laws[20], allow_range=True)
    own = QDrift(evidence_for(laws[20], 0.01), along="epsilon", denominator="left").plan(laws[20])
    torch.testing.assert_close(here.factor[2:], own.factor[2:], rtol=1e-6, atol=1e-9)
    fine = correction.plan(laws[40])
    ratio = (here.factor[5:12, 0] - 1) / (fine.factor[10:24:2, 0] - 1)
    assert bool(((ratio > 1.5) & (ratio < 2.7)).all())


def test_evidence_is_keyed_by_level_and_not_by_name_or_index() -> None:
    """A variance-preserving run meets a variance-exploding calibration at equal sigma / alpha."""
    ddim = law_of("ddim-epsilon")
    euler = euler_at(*ddim.noise_to_signal[:-1].tolist())
    np.testing.assert_allclose(
        log_snr(euler.alpha[:-1], euler.sigma[:-1]),
        log_snr(ddim.alpha[:-1], ddim.sigma[:-1]),
        atol=1e-4,
    )
    v = np.linspace(0.01, 0.1, 10)
    transferred = factors(QDrift(evidence_for(euler, v)), ddim)
    np.testing.assert_allclose(transferred, factors(QDrift(evidence_for(ddim, v)), ddim), rtol=1e-3)


# --- which variance ---


def test_conditional_variance_leaves_out_what_the_output_explains() -> None:
    law = euler_at(*LEVELS)
    ee, ed, dd = 1.0, -0.1, 0.06
    evidence = evidence_of(law, moments_of(ee, ed, np.full((1, 5, 1), dd)))
    conditional = dd - (ed + dd) ** 2 / (ee + 2 * ed + dd)
    assert factors(QDrift(evidence), law)[0, 0] == pytest.approx(left_point(law, 0, conditional))
    whole = factors(QDrift(evidence, conditional=False), law)[0, 0]
    assert whole == pytest.approx(left_point(law, 0, dd))
    assert conditional < dd


@settings(derandomize=True, max_examples=60, deadline=None)
@given(gain=st.floats(-0.5, 0.5), residual=st.floats(1e-4, 0.5), size=st.floats(0.1, 4.0))
def test_conditional_variance_is_blind_to_gain(gain: float, residual: float, size: float) -> None:
    """D = k e + r: Var(D | q) = Var(e | q) = Var(e) (1 - R^2), however large k is."""
    law = euler_at(2.0, 1.0)
    ed, dd = gain * size, gain**2 * size + residual
    evidence = evidence_of(law, moments_of(size, ed, np.full((1, 2, 1), dd)))
    explained = (1 + gain) ** 2 * size / ((1 + gain) ** 2 * size + residual)
    expected = left_point(law, 0, size * (1 - explained))
    options: dict[str, Any] = {"min_explained": 0.0, "cap": False}
    assert factors(QDrift(evidence, **options), law)[0, 0] == pytest.approx(expected, rel=1e-9)


def test_condition_on_the_noise_form_is_not_that_on_the_raw_output() -> None:
    """p = to_eps q + from_sample x: the sample adds its own variance (flow matching, alpha = 0.4)."""
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.6, 0.3])
    law = probe_scheduler(scheduler)
    ee, ed, dd, xx, xe = 1.0, 0.05, 0.04, 0.8, 0.3
    moments = moments_of(ee, ed, np.full((1, 2, 1), dd), xx=xx, xe=xe)
    evidence = evidence_of(law, moments)
    on_output = dd - (ed + dd) ** 2 / (ee + 2 * ed + dd)
    pp = 0.16 * (ee + 2 * ed + dd) + 2 * 0.4 * xe + xx
    on_noise = dd - (0.4 * (ed + dd)) ** 2 / pp
    along_v = factors(QDrift(evidence, along="output"), law)[0, 0]
    assert along_v == pytest.approx(on_output * 0.3 / (2 * 0.6), rel=1e-5)
    # in y: s = .6 / .4, s_next = .3 / .7, Var(dy) = (.3 / .7)^2 V
    along_noise = factors(QDrift(evidence, along="epsilon"), law)[0, 0]
    s, after = 0.6 / 0.4, 0.3 / 0.7
    assert along_noise == pytest.approx(
        (0.3 / 0.7) ** 2 * on_noise / (2 * s * (s - after)), rel=1e-5
    )


def test_consistent_flow_factor_is_that_of_the_noise() -> None:
    """(1 - sigma)^2 V |ds| / 2s with s = sigma / (1 - sigma): the same step written with the noise."""
    law = law_of("flow-euler-shift1")
    found = factors(QDrift(evidence_for(law, 0.01), along="epsilon"), law)[1:-1, 0]
    s = law.noise_to_signal
    expected = law.alpha[1:-2] ** 2 * 0.01 * (s[1:-2] - s[2:-1]) / (2 * s[1:-2])
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_per_channel_and_one_for_all(kind: Any) -> None:
    law = euler_at(*LEVELS)
    per_level = torch.tensor([0.01, 0.05, 0.09], dtype=torch.float64).expand(1, 5, 3)
    evidence = evidence_of(law, white_error(per_level))
    separate = kind(evidence).plan(law).factor
    pooled = kind(evidence, per_channel=False).plan(law).factor
    assert separate.shape == (5, 3) and pooled.shape == (5, 1)
    for channel, v in enumerate((0.01, 0.05, 0.09)):
        alone = kind(evidence_for(law, v)).plan(law).factor[:, 0]
        torch.testing.assert_close(separate[:, channel], alone)
    mean = kind(evidence_for(law, 0.05)).plan(law).factor
    torch.testing.assert_close(pooled, mean)


def test_pooled_variance_is_at_least_the_mean_of_the_channels() -> None:
    """One common line fits worse than a line per channel."""
    law = euler_at(*LEVELS)
    ed = torch.tensor([-0.2, 0.0, 0.2], dtype=torch.float64).expand(1, 5, 3)
    evidence = evidence_of(law, moments_of(1.0, ed, 0.1))
    options: dict[str, Any] = {"kind": "conditional", "trim": None, "on": "output"}
    pooled = evidence.variance(per_channel=False, **options)
    separate = evidence.variance(per_channel=True, **options)
    assert bool((pooled[:, 0] > separate.mean(1) + 1e-3).all())


def test_a_single_bad_channel_does_not_silence_the_others() -> None:
    law = euler_at(*LEVELS)
    ee = torch.tensor([1.0, 0.001], dtype=torch.float64).expand(1, 5, 2)
    plan = QDrift(evidence_of(law, moments_of(ee, 0.0, 0.05))).plan(law)
    assert plan.factor[0, 0] > 1.0 and plan.factor[0, 1] == 1.0
    assert bool(plan.active[0]) and "R^2" in plan.explanations[0]


# --- trimming ---


@pytest.mark.parametrize("kind", KINDS)
def test_trim_without_histogram_raises(kind: Any) -> None:
    law = euler_at(*LEVELS)
    with pytest.raises(CalibrationError, match="calibrate with histograms=True"):
        kind(evidence_for(law, 0.01), trim=4.0).plan(law)


def outlier_evidence(law: StepLaw) -> tuple[Evidence, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    e = torch.randn(1, law.steps, 1, 4000, generator=rng, dtype=torch.float64)
    error = 0.1 * torch.randn(1, law.steps, 1, 4000, generator=rng, dtype=torch.float64)
    core = error.clone()
    error[..., :8] = 3.0  # eight outliers at thirty standard deviations
    spread = core.std(-1)
    statistics = (error.mean(-1), spread, e.mean(-1), e.std(-1), 0 * spread, spread)
    frame = Frame(*(t.squeeze(0) for t in statistics))
    moments = PairedMoments.of(e, error, e)
    histogram = ErrorHistogram.of(frame, e, error)
    return Evidence(law.prediction, law.alpha[:-1], law.sigma[:-1], moments, histogram), core


def test_trim_takes_outliers_out() -> None:
    law = euler_at(*LEVELS)
    evidence, core = outlier_evidence(law)
    whole, trimmed = (factors(QDrift(evidence, trim=trim), law)[0, 0] for trim in (None, 4.0))
    clean = left_point(law, 0, float(core[0, 0].var()))
    assert whole > 2 * clean
    assert trimmed == pytest.approx(clean, rel=0.05)
    released = factors(QDrift.released(evidence), law)[0, 0]  # one channel: the heap is the channel
    assert released == pytest.approx(trimmed, rel=1e-9)


# --- contradictions and names ---


def test_contradictory_options_raise() -> None:
    evidence = evidence_for(euler_at(*LEVELS), 0.01)
    with pytest.raises(CalibrationError, match="pass cap=False with it"):
        QDrift(evidence, final_step="paper")
    assert QDrift(evidence, final_step="paper", cap=False).final_step == "paper"


def test_strength_scales_and_zero_strength_is_the_identity() -> None:
    law = euler_at(*LEVELS)
    evidence = evidence_for(law, 0.01)
    full = factors(QDrift(evidence), law)
    np.testing.assert_allclose(factors(QDrift(evidence, strength=0.5), law), full / 2)
    np.testing.assert_allclose(factors(QDrift(evidence, strength=-1.0), law), -full)
    assert QDrift(evidence, strength=0.0).plan(law).is_identity


def test_names_and_references() -> None:
    evidence = evidence_for(euler_at(*LEVELS), 0.01)
    made, _ = available(evidence, {})
    assert made.keys() == {name for name, entry in ALL.items() if entry.source == EVIDENCE}
    for name, correction in made.items():
        assert correction.name == name and correction.references
        assert isinstance(correction, Correction)
    assert "2603.18095" in QDrift(evidence).references[0]


# --- bootstrap ---


def test_bootstrap_of_prompts_brackets_the_estimate() -> None:
    law = euler_at(*LEVELS)
    rng = np.random.default_rng(0)
    per_prompt = 0.02 * rng.lognormal(0, 0.4, size=(24, 1, 1)) * np.ones((1, 5, 2))
    moments = PairedMoments.joined([white_error(v[None]) for v in per_prompt])
    evidence = evidence_of(law, moments)
    correction = QDrift(evidence)
    band = resampled_factors(correction, law, resamples=200, seed=1)
    assert band.shape == (200, 5, 2)
    estimate = correction.plan(law).factor
    low, high = band.quantile(0.025, 0), band.quantile(0.975, 0)
    assert bool((low[:-1] < estimate[:-1]).all()) and bool((estimate[:-1] < high[:-1]).all())
    assert bool((band[:, -1] == 1).all())
    # the width is that of a mean of 24 prompts
    relative = (band[:, 0, 0].std() / (estimate[0, 0] - 1)).item()
    expected = float(per_prompt[:, 0, 0].std() / per_prompt[:, 0, 0].mean() / np.sqrt(24))
    assert relative == pytest.approx(expected, rel=0.2)
    torch.testing.assert_close(band, resampled_factors(correction, law, resamples=200, seed=1))
    assert not torch.equal(band, resampled_factors(correction, law, resamples=200, seed=2))


def test_bootstrap_of_one_prompt_has_no_width() -> None:
    law = euler_at(*LEVELS)
    correction = QDrift(evidence_for(law, 0.02))
    band = resampled_factors(correction, law, resamples=5)
    torch.testing.assert_close(band, correction.plan(law).factor.expand(5, -1, -1))
    assert (
        correction.evidence.prompts == 1 and int(correction.evidence.moments.count.max()) == COUNT
    )
