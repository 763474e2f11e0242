"""What probing refuses, where it may start, and that it leaves no trace."""

from __future__ import annotations

import threading
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_laws import (
    REFUSED,
    dpmpp_coefficients,
    law_of,
    probed,
)

from evenkeel.errors import UnsupportedSampler
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.prediction import PREDICTION_TYPES, clean_output, epsilon_form
from evenkeel.sampling.step_law import Array, StepLaw, read_step_law
from evenkeel.testing.scheduler_cases import BY_NAME, NONLINEAR, SD_BETAS, Case

# --- refused ---


@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_clipping_is_refused_with_the_setting_to_change(case: Case) -> None:
    with pytest.raises(UnsupportedSampler, match=r"clip_sample=False, thresholding=False"):
        probe_scheduler(case.ready(), step_kwargs=case.step)


@pytest.mark.parametrize("name", REFUSED)
def test_linear_but_refused(name: str) -> None:
    match = "tau_func=lambda t: 0" if name == "sa-tau1" else "preconditions the model output"
    with pytest.raises(UnsupportedSampler, match=match):
        probe_scheduler(BY_NAME[name].ready(), step_kwargs=BY_NAME[name].step)


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (d.SCMScheduler(), "its noise level is unknown"),
        (d.CMStochasticIterativeScheduler(clip_denoised=False), "preconditions the model output"),
        (d.RePaintScheduler(), "cannot be probed"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_other_families_are_refused(scheduler: Any, match: str) -> None:
    scheduler.set_timesteps(2)
    with pytest.raises(UnsupportedSampler, match=match):
        probe_scheduler(scheduler)


def test_a_solver_that_divides_by_the_last_level_is_refused() -> None:
    scheduler = d.UniPCMultistepScheduler(solver_order=2, predict_x0=False, **SD_BETAS)
    scheduler.set_timesteps(10)
    with pytest.raises(UnsupportedSampler, match='final_sigmas_type="sigma_min"'):
        probe_scheduler(scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        d.EulerDiscreteScheduler,
        d.DDIMScheduler,
        d.DPMSolverMultistepScheduler,
        d.FlowMatchEulerDiscreteScheduler,
        d.PNDMScheduler,
    ],
)
def test_set_timesteps_must_come_first(scheduler: Any) -> None:
    with pytest.raises(UnsupportedSampler, match="call set_timesteps first"):
        probe_scheduler(scheduler())


# --- flow matching: the denoiser must be told the level that the sample has ---


DYNAMIC = {"use_dynamic_shifting": True}
EVEN = np.linspace(1.0, 0.1, 10)


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (DYNAMIC, {"timesteps": 1000 * EVEN, "mu": 1.15}),
        ({"shift": 3.0}, {"timesteps": 1000 * EVEN}),
        (DYNAMIC, {"timesteps": 1000 * EVEN, "sigmas": EVEN, "mu": 1.15}),
    ],
)
def test_explicit_timesteps_with_shifted_sigmas_are_refused(
    config: dict[str, Any], call: dict[str, Any]
) -> None:
    scheduler = d.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(**call)
    if float(scheduler.timesteps[1]) != 900:
        pytest.skip("diffusers before 0.42 shifts explicit timesteps, too")
    with pytest.raises(UnsupportedSampler, match=r"shifted \(by mu or shift\).*Pass sigmas"):
        probe_scheduler(scheduler)


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (DYNAMIC, {"sigmas": EVEN, "mu": 1.15}),
        (DYNAMIC, {"num_inference_steps": 10, "mu": 1.15}),
        ({"shift": 3.0}, {"num_inference_steps": 10}),
        ({}, {"timesteps": 1000 * EVEN}),
        ({}, {"timesteps": [999, 812, 503, 250, 1]}),
        ({**DYNAMIC, "shift_terminal": 0.1}, {"sigmas": EVEN, "mu": 1.0}),
        ({"use_karras_sigmas": True}, {"num_inference_steps": 10}),
        ({"use_exponential_sigmas": True}, {"num_inference_steps": 10}),
        ({"use_beta_sigmas": True}, {"num_inference_steps": 10}),
        # CogView4 and GLM-Image: unshifted times on purpose
        (
            {**DYNAMIC, "time_shift_type": "linear"},
            {"timesteps": 1000 * EVEN, "sigmas": EVEN, "mu": 1.15},
        ),
    ],
)
def test_consistent_flow_schedules_pass(config: dict[str, Any], call: dict[str, Any]) -> None:
    scheduler = d.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(**call)
    law = probe_scheduler(scheduler)
    np.testing.assert_allclose(law.sigma[:-1], scheduler.sigmas[:-1].numpy(), atol=1e-6)


@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize(
    "scheduler",
    [d.FlowMatchHeunDiscreteScheduler, d.FlowMatchLCMScheduler],
    ids=lambda c: c.__name__,
)
def test_other_flow_schedulers_pass(scheduler: Any, begin: int) -> None:
    law = probed(scheduler(shift=3.0), begin=begin)
    assert law.sigma[-1] == 0.0


# --- the scheduler is left alone, and may start anywhere ---


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("euler-ancestral", 0),
        ("euler-ancestral", 4),
        ("ddpm", 4),
        ("dpmsolver++-3-midpoint", 0),
        ("unipc-2-bh2-x0", 0),
        ("pndm-plms-epsilon", 0),
    ],
)
def test_probing_leaves_no_trace(name: str, after: int) -> None:
    probed_run, probes = sampled(BY_NAME[name], {after})
    plain_run, none = sampled(BY_NAME[name], set())
    assert torch.equal(probed_run, plain_run)
    assert (probes, none) == (1, 0)


def sampled(case: Case, probe_at: set[int]) -> tuple[torch.Tensor, int]:
    """A run with the scheduler's own noise, and how often it was probed on the way."""
    scheduler, probes = case.ready(), 0
    torch.manual_seed(3)
    x = torch.randn(2, 4, 3, 3)
    for k, t in enumerate(scheduler.timesteps):
        if k in probe_at:
            before = torch.get_rng_state()
            probe_scheduler(scheduler, step_kwargs=case.step)
            probes += torch.equal(torch.get_rng_state(), before)
        x = scheduler.step(0.3 * x, t, x, return_dict=False, **case.step)[0]
    return x, probes


def test_probing_disturbs_no_other_thread() -> None:
    scheduler = BY_NAME["euler-ancestral"].ready()
    expected = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    probing, done, drawn = threading.Event(), threading.Event(), []

    class Waiting(type(scheduler)):  # type: ignore[misc]
        """While it is probed, it lets the other thread draw."""

        def step(self, *args: Any, **kwargs: Any) -> Any:
            probing.set()
            done.wait(5)
            return super().step(*args, **kwargs)

    def draw() -> None:
        probing.wait(5)
        try:
            generator = torch.Generator().manual_seed(1)
            drawn.append(torch.randn((4, 4), generator=generator))
            drawn.append(torch.randn_like(expected).shape)
        finally:
            done.set()

    scheduler.__class__ = Waiting
    other = threading.Thread(target=draw)
    other.start()
    law = probe_scheduler(scheduler)
    other.join()
    assert torch.equal(drawn[0], expected) and drawn[1] == (4, 4)
    assert law.is_stochastic


def test_a_subclass_is_recognised_by_what_it_derives_from() -> None:
    class Ours(d.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        """Another name, the same arithmetic."""

        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    config = {"shift": 3.0}
    ours, theirs = Ours(**config), d.FlowMatchEulerDiscreteScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
    found, wanted = probe_scheduler(ours), probe_scheduler(theirs)
    assert found.prediction == wanted.prediction == "flow_prediction"
    np.testing.assert_array_equal(found.output_weights, wanted.output_weights)


def test_a_step_wrapped_on_the_instance_is_not_taken_while_probing() -> None:
    scheduler = BY_NAME["euler-epsilon"].ready()
    inner, taken = scheduler.step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        return inner(*args, **kwargs)

    scheduler.step = step
    law = probe_scheduler(scheduler)
    assert law.steps == len(scheduler.timesteps) and taken == []
    assert scheduler.step_index is None


@pytest.mark.parametrize("name", ["euler-epsilon", "flow-euler-shift3", "ddim-epsilon"])
def test_starting_in_the_middle_of_a_one_step_solver(name: str) -> None:
    case, whole = BY_NAME[name], law_of(name)
    law = probe_scheduler(case.ready(), begin=4)
    assert law.steps == 6
    np.testing.assert_allclose(law.sigma, whole.sigma[4:], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        law.output_weights, whole.output_weights[4:, 4:], rtol=1e-4, atol=1e-6
    )


def test_starting_in_the_middle_of_a_multistep_solver_starts_at_first_order() -> None:
    case, whole = BY_NAME["dpmsolver++-2-midpoint"], law_of("dpmsolver++-2-midpoint")
    law = probe_scheduler(case.ready(), begin=4)
    keep, (c0,) = dpmpp_coefficients(law.alpha, law.sigma, 0, 1)
    assert law.output_weights[0, 0] == pytest.approx(-c0 * law.sigma[0] / law.alpha[0], rel=1e-4)
    assert keep == pytest.approx(law.sigma[1] / law.sigma[0])
    assert abs(law.output_weights[0, 0] - whole.output_weights[4, 4]) > 1e-3
    scheduler = case.ready()
    scheduler.set_begin_index(4)
    x, m = torch.tensor([[[[0.7]]]]), torch.tensor([[[[-0.4]]]])
    found = scheduler.step(m, scheduler.timesteps[4], x, return_dict=False)[0].item()
    expected = law.sample_weights[0, 0] * 0.7 - law.output_weights[0, 0] * 0.4
    assert found == pytest.approx(expected, abs=1e-5)


# --- reading a law off any linear machine ---


class Machine:
    """A made-up linear sampler with full history, and optionally a bend."""

    def __init__(self, seed: int, steps: int, bend: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        self.a = np.tril(rng.normal(size=(steps, steps)))
        self.w = np.tril(rng.normal(size=(steps, steps)))
        self.c = np.abs(rng.normal(size=steps))
        self.bend = bend
        self.x: list[Array] = []
        self.m: list[Array] = []

    def step(self, model_output: Array, sample: Array, noise: Array) -> Array:
        k = len(self.x)
        self.x.append(sample)
        self.m.append(model_output)
        result = self.a[k, : k + 1] @ np.stack(self.x) + self.w[k, : k + 1] @ np.stack(self.m)
        return np.asarray(result + self.c[k] * noise + self.bend * model_output * sample)


def read(machine: Machine, steps: int, prediction: str) -> StepLaw:
    return read_step_law(
        machine,
        sampler="machine",
        prediction=prediction,
        timesteps=list(range(steps)),
        alpha_start=0.6,
        sigma_start=0.8,
    )


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 8), which=st.sampled_from(PREDICTION_TYPES))
def test_any_linear_machine_is_read_exactly(seed: int, steps: int, which: str) -> None:
    machine = Machine(seed, steps)
    # Levels of a made-up machine grow without meaning; "sample" divides by none of them here.
    law = read(machine, steps, which)
    np.testing.assert_allclose(law.sample_weights, machine.a, atol=1e-12)
    np.testing.assert_allclose(law.output_weights, machine.w, atol=1e-12)
    np.testing.assert_allclose(law.noise_weights, machine.c, atol=1e-12)


def test_a_bend_of_one_in_a_thousand_is_refused() -> None:
    with pytest.raises(UnsupportedSampler, match="is not linear"):
        read(Machine(0, 4, bend=1e-3), 4, "epsilon")


# --- prediction types ---


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    which=st.sampled_from(PREDICTION_TYPES),
    alpha=st.floats(0.01, 1.0),
    sigma=st.floats(0.01, 20.0),
    x0=st.floats(-3, 3),
    eps=st.floats(-3, 3),
)
def test_every_prediction_type_tells_the_noise(
    which: str, alpha: float, sigma: float, x0: float, eps: float
) -> None:
    form = epsilon_form(which, alpha, sigma)
    output = clean_output(which, alpha, sigma, x0, eps)
    x = alpha * x0 + sigma * eps
    scale = 1 + abs(form.from_sample) * (abs(x) + abs(sigma)) + abs(form.to_eps) * abs(output)
    assert form.to_eps * output + form.from_sample * x == pytest.approx(eps, abs=1e-9 * scale)


def test_unknown_prediction_and_clean_sample_at_zero_noise() -> None:
    with pytest.raises(UnsupportedSampler, match="'score' is not known"):
        epsilon_form("score", 1.0, 1.0)
    with pytest.raises(UnsupportedSampler, match="'score' is not known"):
        clean_output("score", 1.0, 1.0, 0.0, 1.0)
    with pytest.raises(UnsupportedSampler, match="no noise form"):
        epsilon_form("sample", 1.0, 0.0)
