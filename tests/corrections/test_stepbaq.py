"""StepbaQ: against the paper's formulas, steps computed by hand, and networks that are watched."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepbaq_laws import (
    SCHEDULERS,
    STEPS,
    law_of,
)
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor

import evenkeel
from evenkeel.corrections.base import Correction, digest_of, text_of
from evenkeel.corrections.composite import Composite
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.corrections.stepbaq import StepbaQ
from evenkeel.errors import CalibrationError, OutOfRange
from evenkeel.fitting.closed_loop.fit_stepbaq import training_levels
from evenkeel.hosts.scheduler.interception import install, installed
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.hosts.scheduler.tape import Recorder, Tape
from evenkeel.sampling.prediction import clean_output, epsilon_form
from evenkeel.sampling.step_law import StepLaw

ONE_STEP = ["ddim", "ddim v", "ddim sample", "euler", "euler v", "euler a", "euler a v", "flow"]


def made(law: StepLaw, training: Any, variance: float | list[float], **options: Any) -> StepbaQ:
    """Variance relative to alpha^2 + sigma^2 of the state it is in; the mean is 0.1 per channel."""
    power = torch.from_numpy(law.alpha[1:] ** 2 + law.sigma[1:] ** 2)
    relative = torch.as_tensor(variance, dtype=torch.float64) * torch.ones(law.steps).double()
    mean = 0.1 * torch.arange(1, 5).double().view(1, 4, 1, 1).repeat(law.steps, 1, 1, 1)
    given = {"mean": mean} | options
    return StepbaQ(
        law.alpha[:-1], law.sigma[:-1], variance=relative * power, training=training, **given
    )


def stepped(plan: SamplerPlan, k: int, x: Tensor, m: Tensor, z: float | Tensor = 0.0) -> Tensor:
    """Step k of a one-step solver as a host carries ``plan`` out, without its shift."""
    law = plan.law
    if plan.edit is not None:
        m = plan.edit.gain[k] * m + plan.edit.sample[k] * x
    base = law.sample_weights[k, k] * x + law.output_weights[k, k] * m + law.noise_weights[k] * z
    result: Tensor = plan.base[k] * base + plan.samples[k, 0] * x + plan.outputs[k, 0] * m
    return result


# ---- the level


def test_the_level_is_the_papers() -> None:
    """ab_tau = ab_t / (1 + V), input times sqrt(ab_tau / ab_t), without rounding."""
    law, scheduler = law_of("ddim")
    training = training_levels(scheduler, law.prediction)
    variance = 0.02
    correction = made(law, training, 0.0, round_to_training=None)
    correction = replace(correction, variance=torch.full((STEPS,), variance).double())
    plan = correction.plan(law)
    assert plan.relabel is not None and training is not None
    assert plan.relabel.active.tolist() == [False] + [True] * (STEPS - 1)
    for k in range(1, STEPS):
        ab = float(law.alpha[k]) ** 2
        ab_tau = ab / (1 + variance)
        assert float(plan.relabel.scale[k]) == pytest.approx(math.sqrt(ab_tau / ab), rel=1e-6)
        tau = float(plan.relabel.timestep[k])
        low, high = training[math.floor(tau)], training[math.ceil(tau)]
        assert low <= math.sqrt((1 - ab_tau) / ab_tau) * (1 + 1e-9)
        assert high >= math.sqrt((1 - ab_tau) / ab_tau) * (1 - 1e-9)
        assert tau > law.timesteps[k]
        next_level = law.sigma[k + 1] / law.alpha[k + 1]
        level = law.sigma[k] / law.alpha[k]
        stretch = (math.sqrt((1 - ab_tau) / ab_tau) - next_level) / (level - next_level)
        assert float(plan.factor[k]) == pytest.approx(stretch, rel=1e-5)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.floats(1e-8, 2.0), st.integers(1, STEPS - 1))
def test_rounding_goes_to_the_nearest_training_timestep_or_nowhere(v: float, k: int) -> None:
    law, scheduler = law_of("ddim")
    training = training_levels(scheduler, law.prediction)
    assert training is not None
    plan = made(law, training, v).plan(law)
    assert plan.relabel is not None or v < 0.1
    level = law.noise_to_signal[k]
    wanted = math.sqrt(level**2 + v * (1 + level**2))
    inside = wanted <= training[-1]
    nearest = int(np.argmin(np.abs(np.arctan(training) - math.atan(wanted))))
    expected = nearest if inside else law.timesteps[k]
    told = law.timesteps if plan.relabel is None else plan.relabel.timestep.numpy()
    # Halfway between two timesteps, the time axis and the level axis may round differently.
    assert abs(told[k] - expected) <= 1
    assert float(told[k]).is_integer()
    assert plan.factor[k] == 1 or told[k] > law.timesteps[k]
    assert (plan.factor[k] == 1) == (told[k] == law.timesteps[k])


def test_rounding_to_the_own_timestep_does_nothing_and_leaves_the_mean() -> None:
    law, scheduler = law_of("ddim")
    training = training_levels(scheduler, law.prediction)
    plan = made(law, training, [1e-9, 0.05, 1e-9, 1e-9, 1e-9]).plan(law)
    assert plan.relabel is not None and plan.shift is not None
    assert plan.relabel.active.tolist() == [False, False, True, False, False]
    assert plan.active.tolist() == [False, True, True, False, False]
    assert "rounds to its own timestep" in plan.explanations[1]
    # The mean comes off the state that enters the relabelled step, and nowhere else.
    assert (plan.shift != 0).flatten(1).any(1).tolist() == [False, True, False, False, False]
    assert torch.allclose(plan.shift[1].flatten(), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    unrounded = replace(made(law, training, 1e-9), round_to_training=None).plan(law)
    assert unrounded.relabel is not None
    assert unrounded.relabel.active.tolist() == [False] + [True] * (STEPS - 1)
    assert made(law, training, 1e-9).plan(law).is_identity


def test_zero_variance_is_the_identity() -> None:
    for name in ("ddim", "flow"):
        law, _ = law_of(name)
        plan = made(law, None, 0.0).plan(law)
        assert plan.is_identity and plan.relabel is None and plan.edit is None
        assert plan.shift is None and not plan.active.any()
        assert all(plan.explanations)


def test_flow_matching_is_told_its_time_exactly() -> None:
    law, scheduler = law_of("flow")
    assert training_levels(scheduler, law.prediction) is None
    plan = made(law, None, 0.01).plan(law)
    assert plan.relabel is not None
    for k in range(1, STEPS):
        s = math.hypot(law.noise_to_signal[k], 0.1 * math.hypot(1, law.noise_to_signal[k]))
        assert float(plan.relabel.timestep[k]) == pytest.approx(1000 * s / (1 + s), rel=1e-4)
        assert float(plan.relabel.scale[k]) == pytest.approx((1 / (1 + s)) / law.alpha[k], rel=1e-4)


def test_few_step_models_keep_the_told_time_and_are_not_rounded() -> None:
    law, scheduler = law_of("euler a")
    training = training_levels(scheduler, law.prediction)
    plan = made(law, training, 1e-7, relabel_time=False).plan(law)
    assert plan.relabel is not None
    assert plan.relabel.timestep.tolist() == law.timesteps.tolist()
    assert plan.relabel.active[1:].all() and not plan.relabel.active[0]
    strong = made(law, training, 0.3, relabel_time=False).plan(law)
    for k in range(1, STEPS):
        variance = float(made(law, None, 0.3).variance[k - 1])
        tau = math.sqrt(law.sigma[k] ** 2 + variance)  # alpha is 1 here
        assert strong.relabel is not None
        scale = math.sqrt((1 + law.sigma[k] ** 2) / (1 + tau**2))  # of x / sqrt(sigma^2 + 1)
        assert float(strong.relabel.scale[k]) == pytest.approx(scale, rel=1e-6)
        stretch = (tau - law.sigma_down[k]) / (law.sigma[k] - law.sigma_down[k])
        assert float(strong.factor[k]) == pytest.approx(stretch, rel=1e-6)


# ---- the step


def test_a_relabelled_step_is_the_ddim_step_from_tau() -> None:
    law, scheduler = law_of("ddim")
    plan = made(law, training_levels(scheduler, law.prediction), 0.05).plan(law)
    assert plan.relabel is not None and plan.edit is None
    x, eps = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    ab = scheduler.alphas_cumprod.double()
    for k in range(1, STEPS):
        tau = int(plan.relabel.timestep[k])
        assert tau > law.timesteps[k]
        at_tau = x * float(plan.relabel.scale[k])
        clean = (at_tau - (1 - ab[tau]).sqrt() * eps) / ab[tau].sqrt()
        by_hand = law.alpha[k + 1] * clean + law.sigma[k + 1] * eps
        torch.testing.assert_close(stepped(plan, k, x, eps), by_hand, rtol=1e-4, atol=1e-4)
        nominal = law.sample_weights[k, k] * x + law.output_weights[k, k] * eps
        assert (nominal - by_hand).abs().max() > 1e-3


@pytest.mark.parametrize("name", ONE_STEP)
def test_any_prediction_goes_down_from_tau_by_the_noise_it_means_there(name: str) -> None:
    """y_next = y + (s_next - s_tau) eps, with eps read from the output at (tau, scaled x)."""
    law, scheduler = law_of(name)
    plan = made(law, training_levels(scheduler, law.prediction), 0.05).plan(law)
    assert plan.relabel is not None and plan.relabel.active[1:].all()
    x, m, z = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).double()
    flow = law.prediction == "flow_prediction"
    for k in range(1, STEPS):
        # The network's own levels at tau, from the factor on its input alone.
        own = law.noise_to_signal[k]
        signal = float(plan.relabel.scale[k]) * (1 / (1 + own) if flow else 1 / math.hypot(1, own))
        noise = 1 - signal if flow else math.sqrt(1 - signal**2)
        y = x / law.alpha[k]
        form = epsilon_form(law.prediction, signal, noise)
        eps = form.to_eps * m + form.from_sample * signal * y
        down = law.sigma_down[k] / law.alpha[k + 1]
        by_hand = law.alpha[k + 1] * (y + (down - noise / signal) * eps) + law.noise_weights[k] * z
        torch.testing.assert_close(stepped(plan, k, x, m, z), by_hand, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_perfect_network_at_tau_lands_on_the_nominal_next_level(name: str) -> None:
    """x at tau's level: the corrected step gives alpha_next x0 + sigma_next eps, the plain one not."""
    law, scheduler = law_of(name)
    plan = made(law, training_levels(scheduler, law.prediction), 0.05).plan(law)
    assert plan.relabel is not None
    flow = law.prediction == "flow_prediction"
    x0, eps = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).double()
    missed = []
    for k in range(1, STEPS):
        own = law.noise_to_signal[k]
        signal = float(plan.relabel.scale[k]) * (1 / (1 + own) if flow else 1 / math.hypot(1, own))
        noise = 1 - signal if flow else math.sqrt(1 - signal**2)
        x = law.alpha[k] * (x0 + noise / signal * eps)
        pairs = zip(x0.tolist(), eps.tolist(), strict=True)
        m = torch.tensor([clean_output(law.prediction, signal, noise, a, b) for a, b in pairs])
        expected = law.alpha[k + 1] * x0 + law.sigma_down[k] * eps
        torch.testing.assert_close(stepped(plan, k, x, m), expected, rtol=1e-3, atol=1e-3)
        missed.append(law.sample_weights[k, k] * x + law.output_weights[k, k] * m - expected)
    assert max(float(difference.abs().max()) for difference in missed) > 5e-3


def test_multistep_solvers_keep_their_history_and_stretch_the_increment() -> None:
    law, scheduler = law_of("2m")
    plan = made(law, training_levels(scheduler, law.prediction), 0.05).plan(law)
    assert plan.relabel is not None and bool(plan.relabel.active[2])
    assert plan.samples.shape[1] == 1 and not plan.outputs.any()
    assert float(plan.factor[2]) > 1
    assert plan.stages == ("level", "increment", "state")


# ---- what is left alone


def test_first_and_last_step() -> None:
    law, scheduler = law_of("ddim")
    plan = made(law, training_levels(scheduler, law.prediction), 0.05).plan(law)
    assert plan.relabel is not None and plan.shift is not None
    assert plan.explanations[0] == "first step: no error yet" and not plan.relabel.active[0]
    assert not plan.shift[-1].any()  # nothing comes after it


@pytest.mark.parametrize(("name", "reason"), [("heun", "stage"), ("unipc", "predictor-corrector")])
def test_solvers_whose_state_is_not_advanced_step_by_step(name: str, reason: str) -> None:
    law, scheduler = law_of(name)
    plan = made(law, training_levels(scheduler, law.prediction), 0.05).plan(law)
    touched = torch.zeros(law.steps, dtype=torch.bool)
    touched |= plan.active if plan.relabel is None else plan.active | plan.relabel.active
    stages = torch.from_numpy(law.intermediate | (law.anchor != np.arange(law.steps)))
    assert any(reason in note for note in plan.explanations)
    relabelled = torch.zeros_like(touched) if plan.relabel is None else plan.relabel.active
    assert not (relabelled & stages).any()
    assert not relabelled[1:-1].any()  # only a plain last step is left to correct


def test_a_last_step_that_misses_zero_by_a_rounding_is_a_last_step() -> None:
    scheduler = d.DPMSolverMultistepScheduler(solver_order=2, beta_schedule="linear")
    scheduler.set_timesteps(STEPS)
    law = probe_scheduler(scheduler)
    assert -1e-4 < law.sigma_down[-1] < 0
    plan = made(law, training_levels(scheduler, law.prediction), 0.05).plan(law)
    assert plan.relabel is not None and bool(plan.relabel.active[-1])


def test_levels_beyond_training_are_left_alone() -> None:
    law, scheduler = law_of("ddim")
    training = training_levels(scheduler, law.prediction)
    plan = made(law, training, [1e6, 0.0, 0.0, 0.0, 0.0]).plan(law)
    assert plan.is_identity and "noisier than the network" in plan.explanations[1]
    flow, _ = law_of("flow")
    assert made(flow, None, 0.01).plan(flow).relabel is not None
    cut = replace(flow, alpha=flow.alpha + 0.3, sigma=flow.sigma * 0.7)
    found = made(cut, None, 1e6).plan(cut)
    assert found.is_identity and "noisier than the first" in found.explanations[1]


def test_a_training_table_that_ends_in_pure_noise() -> None:
    scheduler = d.DDIMScheduler(
        clip_sample=False,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(STEPS)
    law = probe_scheduler(scheduler)
    training = training_levels(scheduler, law.prediction)
    assert training is not None and training[-1] == math.inf
    plan = made(law, training, [1e12, 0.05, 0.05, 0.05, 0.05]).plan(law)
    assert plan.relabel is not None and "holds no signal" in plan.explanations[1]
    assert plan.relabel.active.tolist() == [False, False, True, True, True]
    assert all(bool(t.isfinite().all()) for t in (plan.base, plan.samples, plan.relabel.scale))


def test_another_schedule_is_refused_or_left_alone_by_name() -> None:
    law, scheduler = law_of("ddim")
    correction = made(law, training_levels(scheduler, law.prediction), 0.05)
    for steps in (4, 6):
        other, _ = law_of("ddim", steps)
        with pytest.raises(OutOfRange, match=f"this run has {steps}"):
            correction.plan(other)
        plan = correction.plan(other, allow_range=True)
        assert plan.is_identity and "another schedule" in plan.explanations[0]
    flow, _ = law_of("flow")
    with pytest.raises(OutOfRange):
        correction.plan(flow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variance": torch.tensor([0.1, -1.0, 0, 0, 0])}, "non-negative"),
        ({"variance": torch.tensor([0.1, math.nan, 0, 0, 0])}, "finite"),
        ({"variance": torch.zeros(4)}, "one per noise level"),
        ({"mean": torch.full((5, 4, 1, 1), math.nan)}, "finite"),
        ({"mean": torch.zeros(3, 4, 1, 1)}, "shape \\(3, 4, 1, 1\\)"),
        ({"training": np.array([0.2, 0.1])}, "increasing"),
        ({"training": np.array([0.1, math.nan])}, "increasing"),
        ({"round_to_training": "up"}, "'nearest' or None; got 'up'"),
    ],
)
def test_malformed_fits_are_refused(changes: dict[str, Any], message: str) -> None:
    law, _ = law_of("ddim")
    good = made(law, None, 0.0)
    with pytest.raises(CalibrationError, match=message):
        replace(good, **changes)


def test_it_is_a_correction_like_the_others() -> None:
    law, _ = law_of("ddim")
    found = made(law, None, 0.05)
    assert isinstance(found, Correction) and found.name == "stepbaq"
    assert text_of(found) == "stepbaq(relabel_time=True, round_to_training='nearest')"
    others = [
        made(law, None, 0.04),
        replace(found, mean=2 * found.mean),
        replace(found, relabel_time=False),
        replace(found, training=np.array([0.1, 0.2])),
    ]
    digests = {digest_of(c) for c in (found, made(law, None, 0.05), *others)}
    assert len(digests) == 1 + len(others)
    whole = Composite((found,))
    assert "level" in whole.stages and whole.plan(law).stages == found.plan(law).stages


# ---- in pipelines


@dataclass
class Watched:
    """States that enter the steps, and what the network is called with."""

    tape: Tape
    times: list[float]
    samples: list[Tensor]


def watched(tiny: TinyPipeline, correction: StepbaQ | None, steps: int = STEPS) -> Watched:
    found = Watched(Tape(), [], [])
    if correction is not None:
        evenkeel.apply(tiny.pipe, correction)
    inner: Any = type(tiny.model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
        sample = named["hidden_states"] if "hidden_states" in named else named["sample"]
        found.samples.append(sample.clone())
        found.times.append(float(torch.as_tensor(named["timestep"]).max()))
        return inner(tiny.model, *args, **kwargs)

    before = installed(tiny.pipe.scheduler)
    install(tiny.pipe.scheduler, *before, Recorder(found.tape))
    tiny.model.forward = forward  # type: ignore[method-assign]
    generate(tiny, steps=steps)
    del tiny.model.forward
    evenkeel.remove(tiny.pipe)
    return found


@pytest.mark.parametrize(
    ("name", "scheduler", "unit"),
    [("sdxl", "ddim", 1.0), ("sdxl", "euler", 1.0), ("dit", "ddim", 1.0), ("flux", None, 1e-3)],
)
def test_the_network_receives_tau_and_the_scaled_input(
    name: str, scheduler: str | None, unit: float
) -> None:
    tiny = ALL[name]()
    built = tiny.pipe.scheduler if scheduler is None else SCHEDULERS[scheduler]()
    tiny.pipe.scheduler = built
    law = watched(tiny, None).tape.law
    assert law is not None
    mean = torch.zeros(STEPS, 1, 1) if name == "flux" else torch.zeros(STEPS, 1, 1, 1)
    correction = made(law, training_levels(built, law.prediction), 0.05, mean=mean)
    plan = correction.plan(law)
    found = watched(tiny, correction)
    assert plan.relabel is not None and plan.relabel.active[1:].all()
    told = plan.relabel.timestep.tolist()
    assert found.times == pytest.approx([unit * t for t in told], rel=1e-5)
    assert told[2] > law.timesteps[2] + 0.5
    for k in range(STEPS):
        state, sample = found.tape.samples[k], found.samples[k]
        network = {"euler": 1 / math.hypot(1, law.sigma[k])}.get(str(scheduler), 1.0)
        expected = state * network * float(plan.relabel.scale[k])
        torch.testing.assert_close(sample[: len(state)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sdxl", "flux", "dit"])
def test_no_variance_changes_no_bit(name: str) -> None:
    tiny = ALL[name]()
    plain = watched(tiny, None)
    assert plain.tape.law is not None
    before = generate(tiny, steps=STEPS)
    shape = (STEPS, 1, 1) if name == "flux" else (STEPS, 1, 1, 1)
    nothing = made(plain.tape.law, None, 0.0, mean=torch.ones(shape))
    with evenkeel.applied(tiny.pipe, nothing):
        assert torch.equal(generate(tiny, steps=STEPS), before)
    training = training_levels(tiny.pipe.scheduler, plain.tape.law.prediction)
    something = made(plain.tape.law, training, 0.05, mean=torch.ones(shape))
    with evenkeel.applied(tiny.pipe, something):
        assert not torch.equal(generate(tiny, steps=STEPS), before)
    assert torch.equal(generate(tiny, steps=STEPS), before)
