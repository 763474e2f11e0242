"""Gaussian data, exact score, white errors: sampling is linear, so variances propagate exactly.

Data N(0, s^2) and its exact denoiser make every model output a multiple of the sample. The sample is
carried as loadings on independent unit sources (the start, one error per step, the injected noise),
one row each, through the real diffusers schedulers with the production correction installed. The
final standard deviation is the root of the sum of squared loadings: no sampling error at all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from typing import Any
from unittest import mock

import diffusers as d
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from gaussian_data import PIPELINE, SCALARS, denoiser, error_variance, euler, karras
from synthetic_evidence import evidence_for

from evenkeel.corrections import ExactDrift, QDrift, SamplerPlan
from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import stretch_plan
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.scheduler.interception import install
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.prediction import PREDICTION_TYPES
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.testing.scheduler_cases import BY_NAME, SD_BETAS


def sampled_std(
    scheduler: Any, s: float, errors: Array, correction: Correction | None = None
) -> tuple[float, SamplerPlan | None]:
    """Final standard deviation over s, through the scheduler itself; and the plan that was used."""
    law = probe_scheduler(scheduler)
    corrector = Corrector(correction, PIPELINE, layout=SCALARS) if correction else None
    install(scheduler, *([corrector] if corrector else []))
    steps = law.steps
    x = torch.zeros(1 + 2 * steps, 1, 1, 1, dtype=torch.float64)
    x[0] = math.hypot(law.alpha[0] * s, law.sigma[0])
    drawn = torch.zeros_like(x)
    module = sys.modules[type(scheduler).__module__]

    def noise(shape: Any, *args: Any, **named: Any) -> Any:  # probing, in between, draws its own
        return drawn if tuple(shape) == drawn.shape else randn_tensor(shape, *args, **named)

    with mock.patch.object(module, "randn_tensor", create=True, side_effect=noise):
        for k, t in enumerate(scheduler.timesteps):
            m = denoiser(law, k, s) * x
            m[1 + k] += errors[k] ** 0.5
            drawn.zero_()
            drawn[1 + steps + k] = 1.0
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(m, t, x, return_dict=False)[0].double()
    return float((x**2).sum().sqrt()) / s, corrector.plan if corrector else None


def predicted_std(law: StepLaw, s: float, errors: Array, plan: SamplerPlan | None = None) -> float:
    """The same from the law's and the plan's numbers alone."""
    steps = law.steps
    x = np.zeros((steps + 1, 1 + 2 * steps))
    m = np.zeros((steps, 1 + 2 * steps))
    x[0, 0] = math.hypot(law.alpha[0] * s, law.sigma[0])
    for k in range(steps):
        m[k] = denoiser(law, k, s) * x[k]
        m[k, 1 + k] += errors[k] ** 0.5
        x[k + 1] = law.sample_weights[k] @ x[:steps] + law.output_weights[k] @ m
        x[k + 1, 1 + steps + k] += law.noise_weights[k]
        if plan is not None:
            x[k + 1] *= float(plan.base[k, 0])
            for lag in range(min(k + 1, plan.samples.shape[1])):
                x[k + 1] += float(plan.samples[k, lag, 0]) * x[k - lag]
                x[k + 1] += float(plan.outputs[k, lag, 0]) * m[k - lag]
    return float(np.sqrt((x[-1] ** 2).sum())) / s


# --- a table that was made without this library ---


def recursion(s: float, v: float, steps: int, method: str) -> float:
    """Variance of an Euler run in closed form: v' = (1 + (1 + c) ds g)^2 v + ((1 + c) ds)^2 V."""
    levels, error = karras(steps), 0.0 if method == "full" else v
    variance = s * s + levels[0] ** 2
    for level, after in itertools.pairwise(levels):
        length = level - after
        room = after**2 - length**2 * v
        c = {
            "full": 0.0,
            "quantized": 0.0,
            "published": length / (2 * level) * v,
            "q-drift": min(length / (2 * level) * v, after / length),
            "exact": (level - math.sqrt(room)) / length - 1 if room > 0 else 0.0,
        }[method]
        pull = 1 - length * (1 + c) * level / (s * s + level**2)
        variance = pull**2 * variance + (length * (1 + c)) ** 2 * error
    return math.sqrt(variance) / s


# s, V, steps: full precision, quantized, Q-Drift as published (with the last step), exact drift.
# With 4 steps the root is not real for two of them.
TABLE = [
    (0.5, 0.05, 20, 0.9144, 0.9425, 0.9210, 0.9139),
    (0.5, 0.10, 20, 0.9144, 0.9698, 0.9281, 0.9142),
    (0.5, 0.20, 30, 0.9425, 1.0105, 0.9551, 0.9439),
    (1.0, 0.10, 30, 0.9488, 0.9748, 0.9529, 0.9486),
    (1.0, 0.05, 4, 0.5978, 0.9225, 0.8593, 0.8229),
]
COLUMNS = ("full", "quantized", "published", "exact")


@pytest.mark.parametrize("row", TABLE)
def test_closed_recursion_gives_the_table(row: tuple[float, ...]) -> None:
    s, v, steps, *expected = row
    found = [recursion(s, v, int(steps), column) for column in COLUMNS]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.51e-4)


@pytest.mark.parametrize("row", TABLE)
def test_real_scheduler_gives_the_recursion(row: tuple[float, ...]) -> None:
    s, v, steps = row[0], row[1], int(row[2])
    law = probe_scheduler(euler(steps))
    evidence, errors = evidence_for(law, v), np.full(steps, v)
    published = QDrift(evidence, cap=False, final_step="paper")
    found = {
        "full": sampled_std(euler(steps), s, 0 * errors)[0],
        "quantized": sampled_std(euler(steps), s, errors)[0],
        "published": sampled_std(euler(steps), s, errors, published)[0],
        "q-drift": sampled_std(euler(steps), s, errors, QDrift(evidence))[0],
        "exact": sampled_std(euler(steps), s, errors, ExactDrift(evidence))[0],
    }
    for method, value in found.items():
        assert value == pytest.approx(recursion(s, v, steps, method), abs=2e-5), method


def test_leaving_the_last_step_alone_costs_next_to_nothing() -> None:
    """The table scales it (c = V / 2); ours does not, for there is no noise left to take off."""
    for s, v, steps, *_ in TABLE:
        gap = recursion(s, v, steps, "q-drift") - recursion(s, v, steps, "published")
        assert 0 <= gap < 5e-4


# --- what is recovered, sampler by sampler ---

KARRAS: dict[str, Any] = {"use_karras_sigmas": True, **SD_BETAS}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS: dict[str, Any] = {
    "euler": lambda: d.EulerDiscreteScheduler(**KARRAS),
    "euler-v": lambda: d.EulerDiscreteScheduler(prediction_type="v_prediction", **KARRAS),
    "euler-sample": lambda: d.EulerDiscreteScheduler(prediction_type="sample", **KARRAS),
    "euler-ancestral": lambda: d.EulerAncestralDiscreteScheduler(**SD_BETAS),
    "ddim": lambda: d.DDIMScheduler(clip_sample=False, **SD_BETAS),
    "dpmpp-1": lambda: d.DPMSolverMultistepScheduler(solver_order=1, **KARRAS),
    "dpmpp-2": lambda: d.DPMSolverMultistepScheduler(solver_order=2, **KARRAS),
    "dpmpp-3": lambda: d.DPMSolverMultistepScheduler(solver_order=3, **SD_BETAS),
    "dpmpp-2-flow": lambda: d.DPMSolverMultistepScheduler(solver_order=2, **FLOW),
    "heun": lambda: d.HeunDiscreteScheduler(**KARRAS),
    "heun-v": lambda: d.HeunDiscreteScheduler(prediction_type="v_prediction", **KARRAS),
    "single-2": lambda: d.DPMSolverSinglestepScheduler(lower_order_final=True, **KARRAS),
    "flow": lambda: d.FlowMatchEulerDiscreteScheduler(shift=1.0),
    "flow-heun": lambda: d.FlowMatchHeunDiscreteScheduler(),
}
STEPS, DATA, ERROR = 20, 0.5, 0.05


def ready(name: str, steps: int = STEPS) -> Any:
    scheduler = SAMPLERS[name]()
    scheduler.set_timesteps(steps)
    return scheduler


@functools.cache
def baseline(name: str) -> tuple[StepLaw, Array, float, float]:
    """Law, error variances, full-precision and quantized standard deviation."""
    law = probe_scheduler(ready(name))
    # Along v the error of a flow network is naturally of one size; elsewhere that of the noise is.
    flat = law.prediction == "flow_prediction"
    errors = np.full(law.steps, ERROR) if flat else error_variance(law, ERROR)
    full, _ = sampled_std(ready(name), DATA, 0 * errors)
    quantized, _ = sampled_std(ready(name), DATA, errors)
    return law, errors, full, quantized


def recovered(name: str, kind: type[QDrift] | type[ExactDrift], **options: Any) -> float:
    """Share of the lost marginal that a correction brings back: 0 nothing, 1 all, above 1 too much."""
    law, errors, full, quantized = baseline(name)
    corrected, plan = sampled_std(
        ready(name), DATA, errors, kind(evidence_for(law, errors), **options)
    )
    assert plan is not None and bool(plan.active.any())
    return (quantized - corrected) / (quantized - full)


@pytest.mark.parametrize("name", SAMPLERS)
def test_injected_error_shifts_the_marginal_as_the_law_says(name: str) -> None:
    law, errors, full, quantized = baseline(name)
    assert full == pytest.approx(predicted_std(law, DATA, 0 * errors), rel=1e-4)
    assert quantized == pytest.approx(predicted_std(law, DATA, errors), rel=1e-4)
    assert quantized - full > 1e-3


@pytest.mark.parametrize("kind", [QDrift, ExactDrift])
@pytest.mark.parametrize("name", SAMPLERS)
def test_plan_is_carried_out_as_written(name: str, kind: type[QDrift] | type[ExactDrift]) -> None:
    law, errors, _, quantized = baseline(name)
    corrected, plan = sampled_std(ready(name), DATA, errors, kind(evidence_for(law, errors)))
    assert corrected == pytest.approx(predicted_std(law, DATA, errors, plan), rel=1e-4)
    assert abs(corrected - quantized) > 5e-4


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("euler", 0.95, 1.05),
        ("euler-v", 0.95, 1.05),
        ("euler-sample", 0.95, 1.05),
        ("euler-ancestral", 0.75, 0.9),
        ("ddim", 0.75, 0.9),
        ("dpmpp-1", 0.75, 1.05),
        ("dpmpp-2", 0.9, 1.25),
        ("dpmpp-3", 0.95, 1.15),
        ("dpmpp-2-flow", 0.95, 1.4),
        ("heun", 0.9, 1.4),
        ("heun-v", 0.9, 1.4),
        ("single-2", 0.8, 1.15),
        ("flow", 0.95, 1.1),
        ("flow-heun", 0.95, 1.1),
    ],
)
def test_exact_drift_brings_the_marginal_back(name: str, low: float, high: float) -> None:
    assert low < recovered(name, ExactDrift) < high


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("euler", 0.7, 0.85),
        ("euler-v", 0.7, 0.85),
        ("euler-sample", 0.7, 0.85),
        ("euler-ancestral", 0.5, 0.7),
        ("ddim", 0.9, 1.05),
        ("dpmpp-1", 0.6, 0.9),
        ("heun", 0.85, 1.2),
        ("single-2", 0.6, 0.9),
        ("flow-heun", 0.85, 1.0),
    ],
)
def test_q_drift_brings_most_of_it_back(name: str, low: float, high: float) -> None:
    assert low < recovered(name, QDrift) < high


def test_flow_matching_along_v_and_along_the_noise() -> None:
    """The paper's heuristic recovers little where the consistent direction recovers most."""
    assert 0.05 < recovered("flow", QDrift, along="paper") < 0.3
    assert recovered("flow", QDrift, along="output") == recovered("flow", QDrift, along="paper")
    assert 0.7 < recovered("flow", QDrift, along="epsilon") < 0.9


@pytest.mark.parametrize("prediction", ["euler-v", "euler-sample"])
def test_same_noise_error_same_result_whatever_is_predicted(prediction: str) -> None:
    for kind in (QDrift, ExactDrift):
        assert recovered(prediction, kind) == pytest.approx(recovered("euler", kind), abs=2e-3)
    assert recovered("heun-v", ExactDrift) == pytest.approx(recovered("heun", ExactDrift), abs=5e-3)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp-1", "heun"])
def test_negative_strength_makes_it_worse(name: str) -> None:
    """Companion: the sign of c is what is tested above."""
    assert recovered(name, QDrift, strength=-1.0) < -0.3


def test_ancestral_noise_is_kept_as_it_is() -> None:
    law, errors, _, _ = baseline("euler-ancestral")
    plan = ExactDrift(evidence_for(law, errors)).plan(law)
    assert torch.equal(plan.base, torch.ones_like(plan.base))
    assert bool((plan.outputs[plan.active] < 0).all())  # only the deterministic part is stretched


# --- multistep solvers meet each error again ---


@pytest.mark.parametrize(("name", "low"), [("dpmpp-2", 2.0), ("dpmpp-3", 3.0)])
def test_published_q_drift_over_corrects_multistep_solvers(name: str, low: float) -> None:
    """Eq. 37 counts the error of a remembered output as fresh, though it enters with opposite sign."""
    assert recovered(name, QDrift) > low
    assert recovered(name, ExactDrift) < 1.25


@pytest.mark.parametrize(
    ("order", "weights"), [(1, [1.0]), (2, [3 / 2, -1 / 2]), (3, [11 / 6, -7 / 6, 1 / 3])]
)
def test_overcount_tends_to_that_of_equal_short_steps(order: int, weights: list[float]) -> None:
    """Per step of length 1 Var(dy) tends to sum w^2, and the growth of the variance to (sum w)^2 = 1."""
    scheduler = d.DPMSolverMultistepScheduler(
        solver_order=order, use_lu_lambdas=True, prediction_type="sample", **SD_BETAS
    )
    scheduler.set_timesteps(300)
    law = probe_scheduler(scheduler)
    evidence = evidence_for(law, 1e-6)
    published = QDrift(evidence, denominator="interval").plan(law).factor[150, 0] - 1
    exact = ExactDrift(evidence).plan(law).factor[150, 0] - 1
    assert float(published / exact) == pytest.approx(sum(w * w for w in weights), rel=0.07)


# --- the formulas ---


def dns_stretch(level: float, after: float, v: float) -> float:
    """c of the deformable noise scheduler by bisection: target^2 + (level - target)^2 V = after^2."""
    low, high = v * level / (1 + v), after
    for _ in range(200):
        middle = (low + high) / 2
        over = middle**2 + (level - middle) ** 2 * v > after**2
        low, high = (low, middle) if over else (middle, high)
    return (after - low) / (level - after)


def euler_at(levels: list[float]) -> StepLaw:
    scheduler = d.EulerDiscreteScheduler(**SD_BETAS)
    scheduler.set_timesteps(sigmas=levels)
    return probe_scheduler(scheduler)


def first_c(correction: Correction, law: StepLaw) -> float:
    return float(correction.plan(law).factor[0, 0]) - 1


def test_three_methods_agree_for_short_steps() -> None:
    gaps = []
    for length in (0.4, 0.2, 0.1):
        law, v = euler_at([2.0, 2.0 - length, 0.5]), 0.05
        q_drift = first_c(QDrift(evidence_for(law, v)), law)
        exact = first_c(ExactDrift(evidence_for(law, v)), law)
        dns = dns_stretch(2.0, 2.0 - length, v)
        gaps.append((abs(dns / q_drift - 1), abs(exact / q_drift - 1)))
    assert gaps[0][0] > gaps[1][0] > gaps[2][0] and gaps[2][0] < 0.06
    assert gaps[0][1] > gaps[1][1] > gaps[2][1] and gaps[2][1] < 0.06
    assert gaps[0][0] > 0.15  # and differ for long ones


@pytest.mark.parametrize(
    ("level", "after", "v"), [(1.2, 1.0, 0.05), (7.0, 4.3, 0.2), (0.3, 0.2, 0.1)]
)
def test_order_of_the_denominators(level: float, after: float, v: float) -> None:
    """Left point 1 / 2s < exact integral 1 / (s + s_next) < exact drift, which is beyond 1 / 2s_next."""
    law = euler_at([level, after, after / 4])
    evidence = evidence_for(law, v)
    left = first_c(QDrift(evidence, denominator="left"), law)
    interval = first_c(QDrift(evidence, denominator="interval"), law)
    exact = first_c(ExactDrift(evidence), law)
    length = level - after
    assert left == pytest.approx(v * length / (2 * level), rel=1e-4)
    assert interval == pytest.approx(v * length / (level + after), rel=1e-4)
    assert exact == pytest.approx(
        (level - math.sqrt(after**2 - length**2 * v)) / length - 1, rel=1e-3
    )
    assert left < interval < exact
    assert exact >= v * length / (2 * after) * (1 - 1e-3)
    assert first_c(QDrift(evidence), law) == left  # Euler: Eq. 22


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", [QDrift, ExactDrift])
def test_last_step_is_left_alone_and_everything_is_finite(
    name: str, kind: type[QDrift] | type[ExactDrift]
) -> None:
    law, errors, _, _ = baseline(name)
    plan = kind(evidence_for(law, errors)).plan(law)
    assert plan.factor[-1, 0] == 1.0 and not bool(plan.active[-1])
    assert "final step" in plan.explanations[-1]
    for values in (plan.factor, plan.base, plan.samples, plan.outputs):
        assert bool(torch.isfinite(values).all())


def test_published_last_step_is_stretched_by_v() -> None:
    """Euler writes V / 2 where the DPM wrapper's exact integral gives V (methods of the paper)."""
    law = euler_at([1.0, 0.5, 0.0])
    options: dict[str, Any] = {"cap": False, "final_step": "paper"}
    last = QDrift(evidence_for(law, 0.1), **options).plan(law).factor[-1, 0]
    assert float(last) == pytest.approx(1.05, rel=1e-5)
    interval = QDrift(evidence_for(law, 0.1), denominator="interval", **options)
    assert float(interval.plan(law).factor[-1, 0]) == pytest.approx(1.1, rel=1e-5)


def test_cap_holds_where_the_error_is_large() -> None:
    law = euler_at([2.0, 0.5, 0.1])
    evidence = evidence_for(law, 5.0)
    plan = QDrift(evidence).plan(law)
    assert first_c(QDrift(evidence), law) == pytest.approx(0.5 / 1.5, rel=1e-6)
    assert "capped" in plan.explanations[0]
    assert first_c(QDrift(evidence, cap=False), law) == pytest.approx(5 * 1.5 / 4, rel=1e-5)


def to_clean(prediction: str, a: float, n: float) -> float:
    """B: how an error of the raw output becomes one of the clean sample."""
    return {"epsilon": -n / a, "sample": 1.0, "v_prediction": -n, "flow_prediction": -n}[prediction]


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_factors_of_dpmpp_2m_are_the_published_ones(prediction: str) -> None:
    """A = 1 + Var(dy) / |s^2 - s_next^2|, Var(dy) = sum (C_j / alpha_next)^2 B_j^2 V_j (Eqs. 37-39)."""
    flow = {"flow_prediction": {"use_flow_sigmas": True, "flow_shift": 3.0}}.get(prediction, {})
    scheduler = d.DPMSolverMultistepScheduler(prediction_type=prediction, **SD_BETAS, **flow)
    scheduler.set_timesteps(20)
    law = probe_scheduler(scheduler)
    v = 1e-4 * (1 + np.arange(20))
    plan = QDrift(evidence_for(law, v), cap=False).plan(law)
    a, n = law.alpha, law.sigma
    lam = np.log(a[:-1] / n[:-1])
    b = [to_clean(prediction, a[k], n[k]) for k in range(20)]
    h = np.diff(lam)
    scale = 1 - np.exp(-h)
    half = np.append(0.0, scale[1:] / (2 * h[:-1] / h[1:]))  # the first step is first order
    before = np.append(0.0, np.square(b[:-2]) * v[:-2])
    variance = (scale + half) ** 2 * np.square(b[:-1]) * v[:-1] + half**2 * before
    s = n / a
    expected = variance / (s[:-2] ** 2 - s[1:-1] ** 2)
    np.testing.assert_allclose(plan.factor[:-1, 0].numpy() - 1, expected, rtol=2e-3)


# --- Eq. 39 and not Eq. 45 ---


def toy() -> tuple[StepLaw, Array, Array]:
    """DPM-Solver++ 2M with levels s = 10, 5, 2, written down by hand; states x and outputs m."""
    s = np.array([10.0, 5.0, 2.0])
    alpha = 1 / np.sqrt(1 + s**2)
    h = np.log(s[:-1] / s[1:])
    e, r = math.exp(-h[1]), h[0] / h[1]
    weights_a, weights_w = np.zeros((2, 2)), np.zeros((2, 2))
    weights_a[0, 0] = alpha[1] / alpha[0] * math.exp(-h[0])
    weights_w[0, 0] = alpha[1] * (1 - math.exp(-h[0]))
    weights_a[1, 1] = alpha[2] / alpha[1] * e
    weights_w[1] = alpha[2] * (1 - e) * np.array([-1 / (2 * r), 1 + 1 / (2 * r)])
    law = StepLaw(
        sampler="DPMSolverMultistepScheduler",
        prediction="sample",
        timesteps=np.arange(2.0),
        sample_weights=weights_a,
        output_weights=weights_w,
        noise_weights=np.zeros(2),
        alpha=alpha,
        sigma=alpha * s,
        sigma_down=(alpha * s)[1:],
    )
    return law, alpha * np.array([1.3, 0.7, 0.0]), np.array([0.1, 0.4])


def test_stretch_is_equation_39() -> None:
    law, x, m = toy()
    plan = stretch_plan(law, torch.tensor([[0.0], [0.1]], dtype=torch.float64), False, ["", ""])
    base = law.sample_weights[1] @ x[:2] + law.output_weights[1] @ m
    found = float(plan.base[1, 0]) * base + float(plan.samples[1, 0, 0]) * x[1]
    assert found == pytest.approx(0.2830285, abs=5e-8)

    scaled_output_only = law.sample_weights[1] @ x[:2] + 1.1 * (law.output_weights[1] @ m)
    assert scaled_output_only == pytest.approx(0.3018114, abs=5e-8)  # Eq. 45
    keep = law.sample_weights[1, 1] * law.alpha[1] / law.alpha[2]
    difference = 0.1 * law.alpha[2] * (1 - keep) * 0.7
    assert scaled_output_only - found == pytest.approx(difference, abs=1e-12)


def test_increment_of_2m_holds_more_than_two_noise_predictions() -> None:
    """dy = w1 eps_1 + w2 eps_0 - (e^-h - 1) / 2r (y_1 - y_0): the paper's Eq. 35 drops the last term."""
    law, x, m = toy()
    s, y = law.noise_to_signal, x / law.alpha
    h = np.log(s[:-1] / s[1:])
    e, r = math.exp(-h[1]), h[0] / h[1]
    y_next = (law.sample_weights[1] @ x[:2] + law.output_weights[1] @ m) / law.alpha[2]
    eps = (y[:2] - m) / s[:2]
    two_terms = (e - 1) * ((1 + 1 / (2 * r)) * s[1] * eps[1] - s[0] / (2 * r) * eps[0])
    rest = -(e - 1) / (2 * r) * (y[1] - y[0])
    assert y_next - y[1] == pytest.approx(two_terms + rest, abs=1e-12)
    assert abs(rest) > 0.1


# --- no error, no change ---


@pytest.mark.parametrize(
    "name", ["euler-epsilon", "dpmsolver++-2-midpoint", "heun-epsilon", "unipc-flow"]
)
def test_without_error_the_run_is_the_same_bit_for_bit(name: str) -> None:
    case = BY_NAME[name]
    law = probe_scheduler(case.ready(), step_kwargs=case.step)
    errors = np.zeros(law.steps)
    plain, _ = sampled_std(case.ready(), DATA, errors)
    for kind in (QDrift, ExactDrift):
        corrected, plan = sampled_std(case.ready(), DATA, errors, kind(evidence_for(law, 0.0)))
        assert corrected == plain
        assert plan is not None and plan.is_identity


@pytest.mark.parametrize("name", ["unipc-2-bh2-x0", "unipc-2-bh2-noise", "sa-tau0", "unipc-flow"])
@pytest.mark.parametrize("steps", [3, 4, 10])
def test_predictor_correctors_run_uncorrected_and_say_so(name: str, steps: int) -> None:
    case = dataclasses.replace(BY_NAME[name], set_timesteps={"num_inference_steps": steps})
    law = probe_scheduler(case.ready())
    errors = np.full(steps, 0.01)
    plain, _ = sampled_std(case.ready(), DATA, errors)
    corrected, plan = sampled_std(case.ready(), DATA, errors, ExactDrift(evidence_for(law, errors)))
    assert corrected == plain
    assert plan is not None and plan.is_identity
    assert all("predictor-corrector" in note for note in plan.explanations)
