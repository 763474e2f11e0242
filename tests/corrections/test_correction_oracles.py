"""The corrections against oracles that were made without this library."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import diffusers as d
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from gaussian_data import PIPELINE, SCALARS, denoiser
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from synthetic_evidence import moments_of
from torch import Tensor

from evenkeel.corrections import (
    CNC,
    D2DPM,
    DNS,
    PTQD,
    Composite,
    ExactDrift,
    QDrift,
    SelfConsistent,
)
from evenkeel.corrections.dns import level_to_aim_for
from evenkeel.errors import Incompatible, UnsupportedSampler
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.scheduler.interception import install
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.second_order import SecondOrder
from evenkeel.testing.scheduler_cases import BY_NAME, SD_BETAS


def linear_evidence(law: StepLaw, s: float, v: Any, gain: float = 0.0) -> Evidence:
    """Gaussian data of standard deviation s, q = (1 + gain) e + r with Var(r) = v, no sampling error."""
    slope = np.array([denoiser(law, k, s) for k in range(law.steps)])
    xx = (law.alpha[:-1] * s) ** 2 + law.sigma[:-1] ** 2
    ee, xe = slope**2 * xx, slope * xx
    rows = [
        np.broadcast_to(a, law.steps)[None, :, None].copy()
        for a in (ee, gain * ee, v + gain**2 * ee)
    ]
    moments = moments_of(*rows, xx=xx[None, :, None], xe=xe[None, :, None])
    return Evidence(law.prediction, law.alpha[:-1], law.sigma[:-1], moments)


def final_variance(
    make: Any, s: float, v: Any, correction: Any = None, gain: float = 0.0, **step: Any
) -> float:
    """Of one run through the real scheduler, by loadings on independent sources: exact."""
    scheduler = make()
    law = probe_scheduler(scheduler, step_kwargs=step)
    install(scheduler, *([Corrector(correction, PIPELINE, layout=SCALARS)] if correction else []))
    steps = law.steps
    errors = np.broadcast_to(v, steps)
    x = torch.zeros(1 + 2 * steps, 1, 1, 1, dtype=torch.float64)
    x[0] = math.hypot(law.alpha[0] * s, law.sigma[0])
    drawn = torch.zeros_like(x)
    module = sys.modules[type(scheduler).__module__]

    def noise(shape: Any, *args: Any, **named: Any) -> Any:  # probing, in between, draws its own
        return drawn if tuple(shape) == drawn.shape else randn_tensor(shape, *args, **named)

    with mock.patch.object(module, "randn_tensor", create=True, side_effect=noise):
        for k, t in enumerate(scheduler.timesteps):
            m = (1 + gain) * denoiser(law, k, s) * x
            m[1 + k] += errors[k] ** 0.5
            drawn.zero_()
            drawn[1 + steps + k] = 1.0
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(m, t, x, return_dict=False, **step)[0].double()
    return float((x**2).sum()) / s**2


# --- DNS: the level to aim for ---


@settings(derandomize=True, max_examples=200)
@given(st.floats(0.01, 20), st.floats(0.01, 0.999), st.floats(1e-6, 0.5))
def test_the_aim_is_the_root_that_bisection_finds(level: float, share: float, v: float) -> None:
    target = share * level
    aim = level_to_aim_for(level, target, v)

    def excess(s: float) -> float:
        return s**2 + (level - s) ** 2 * v - target**2

    lowest = v * level / (1 + v)
    solvable = excess(lowest) <= 0
    assert (aim is not None) == solvable or abs(excess(lowest)) < 1e-12
    assert aim is None or aim == pytest.approx(brentq(excess, lowest, level, xtol=1e-15), rel=1e-7)


@pytest.mark.parametrize(
    ("after", "before", "v", "expected"),
    [
        (0.5, 0.6, 0.05, 0.49974874),
        (0.1, 0.2, 0.05, 0.09761620),
        (0.9, 0.95, 0.3, 0.89995827),
        (0.02, 0.05, 0.5, None),
        (0.0, 0.05, 0.01, None),
    ],
)
def test_flow_matching_numbers(
    after: float, before: float, v: float, expected: float | None
) -> None:
    """Methods note 5.4, from an independent solver; V_eps = (1 - sigma)^2 V_v."""
    aim = level_to_aim_for(before / (1 - before), after / (1 - after), (1 - before) ** 2 * v)
    found = None if aim is None else aim / (1 + aim)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-8))


@pytest.mark.parametrize(
    ("now", "following", "v", "expected"),
    [(0.4, 0.5, 0.05, 0.00569), (0.02, 0.05, 0.2, 0.0710), (0.99, 0.999, 0.1, 0.201)],
)
def test_published_newton_form_has_the_same_root(
    now: float, following: float, v: float, expected: float
) -> None:
    """ab_prev (1 + b(P)^2 V) = P, solved as the paper does; b is the coefficient of the noise."""
    level, target = (math.sqrt((1 - a) / a) for a in (now, following))

    def excess(p: float) -> float:
        b = math.sqrt(1 - p) - math.sqrt(p * (1 - now) / now)
        return following * (1 + b * b * v) - p

    p = following
    for _ in range(60):
        slope = (excess(p + 1e-7) - excess(p - 1e-7)) / 2e-7
        p -= excess(p) / slope
    aim = level_to_aim_for(level, target, v)
    assert aim is not None
    assert 1 / (1 + aim**2) == pytest.approx(p, abs=1e-9)
    assert (target - aim) / (level - target) == pytest.approx(expected, rel=6e-3)


def test_small_steps_make_dns_and_q_drift_the_same() -> None:
    for share, tolerance in ((0.9, 0.15), (0.99, 0.015), (0.999, 0.0015)):
        aim = level_to_aim_for(1.0, share, 0.02)
        assert aim is not None
        assert (share - aim) / (1 - share) == pytest.approx(0.02 * (1 - share) / 2, rel=tolerance)


def test_published_units_divide_by_the_level_squared() -> None:
    law = probe_scheduler(BY_NAME["euler-epsilon"].ready())
    plain = DNS(linear_evidence(law, 1.0, 0.02)).plan(law).factor[:-1, 0].numpy() - 1
    scaled = (
        DNS(linear_evidence(law, 1.0, 0.02 / law.sigma[:-1] ** 2)).plan(law).factor[:-1, 0].numpy()
        - 1
    )
    published = (
        DNS(linear_evidence(law, 1.0, 0.02), units="published").plan(law).factor[:-1, 0].numpy() - 1
    )
    assert published == pytest.approx(scaled, rel=1e-9)
    assert not np.allclose(published, plain, rtol=0.5)


# --- the Gaussian table of the methods note, 14.3: 30 Euler steps, V = .10 ---


def euler30() -> Any:
    scheduler = d.EulerDiscreteScheduler(**SD_BETAS)
    scheduler.set_timesteps(30)
    return scheduler


@pytest.mark.parametrize("gain", [0.0, -0.05, 0.05])
def test_gaussian_recursion_with_a_gain(gain: float) -> None:
    """No rule that looks at the noise alone sees the gain; taking it out first leaves what k = 0 leaves."""
    law = probe_scheduler(euler30())
    v = 0.1
    known = linear_evidence(law, 1.0, v, gain)
    plain = final_variance(euler30, 1.0, 0.0)
    found = {
        name: final_variance(euler30, 1.0, v, rule, gain)
        for name, rule in {
            "none": None,
            "dns": DNS(known),
            "q-drift": QDrift(known, conditional=False, cap=False),
            "cnc": CNC(known, min_explained=0.0),
            "self-consistent": SelfConsistent(known, min_explained=0.0),
            "d2": D2DPM(known, min_explained=0.0),
        }.items()
    }
    gap = {name: abs(value - plain) for name, value in found.items()}
    assert gap["self-consistent"] < 0.02
    assert gap["self-consistent"] < 0.6 * gap["cnc"] < gap["none"] + 1e-9 + 0.6 * gap["cnc"]
    assert (
        found["d2"] > 1.3 * plain
    )  # variance destroyed at noisy outputs comes back as residual noise
    assert (gap["dns"] < 0.02) == (gain == 0.0)


# --- output edits ---


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    e, r, x = torch.randn(3, 4, 10, 2, 500, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None]
    e = scale * e + 0.5
    return e, 0.08 * e + torch.tensor([0.1, -0.2])[:, None] + 0.3 * r, x


def evidence_of(e: Tensor, error: Tensor, x: Tensor, law: StepLaw) -> Evidence:
    return Evidence(law.prediction, law.alpha[:-1], law.sigma[:-1], PairedMoments.of(e, error, x))


def edited(plan: Any, q: Tensor) -> Tensor:
    gain, bias = (t[None, :, :, None] for t in (plan.edit.gain, plan.edit.bias))
    return gain * q + bias


def test_cnc_leaves_the_residual_over_one_plus_k() -> None:
    law = probe_scheduler(BY_NAME["euler-epsilon"].ready())
    e, error, x = drawn()
    left = edited(CNC(evidence_of(e, error, x, law), per_channel=True).plan(law), e + error) - e
    flat = left.transpose(0, 2).flatten(2), e.transpose(0, 2).flatten(2)
    for step in range(10):
        for channel in range(2):
            r, f = (
                t[channel, step] for t in (flat[0].reshape(2, 10, -1), flat[1].reshape(2, 10, -1))
            )
            assert abs(float(r.mean())) < 1e-12
            assert abs(float((r * (f - f.mean())).mean())) < 1e-12  # uncorrelated with e


def test_d2_is_the_least_squares_prediction() -> None:
    law = probe_scheduler(BY_NAME["euler-epsilon"].ready())
    e, error, x = drawn()
    q = e + error
    found = edited(D2DPM(evidence_of(e, error, x, law)).plan(law), q)
    for channel in range(2):
        line = np.polyfit(q[:, 3, channel].flatten(), e[:, 3, channel].flatten(), 1)
        expected = np.polyval(line, q[:, 3, channel].numpy())
        assert found[:, 3, channel].numpy() == pytest.approx(expected, abs=1e-10)


def test_forward_variance_is_backward_over_explained() -> None:
    e, error, x = drawn()
    second = SecondOrder.of(PairedMoments.of(e, error, x).pooled(0))
    one = torch.ones(1, 1, dtype=torch.float64)
    backward = second.conditional_variance(one, 0 * one)
    forward = second.residual / (1 + second.gain) ** 2
    assert torch.allclose(forward, backward / second.explained, rtol=1e-10)
    assert torch.allclose(1 - second.slope, second.explained / (1 + second.gain), rtol=1e-10)


def test_ptqd_released_bias_leaves_minus_k_mean_over_one_plus_k() -> None:
    law = probe_scheduler(BY_NAME["euler-epsilon"].ready())
    e, error, x = drawn()
    evidence = evidence_of(e, error, x, law)
    pooled = SecondOrder.of(evidence.pooled(per_channel=False))
    q = e + error
    mean = e.mean((0, 3))
    own = edited(PTQD(evidence).plan(law), q).mean((0, 3)) - mean
    released = edited(PTQD(evidence, bias="mean").plan(law), q).mean((0, 3)) - mean
    assert float(own.abs().max()) < 1e-12
    assert torch.allclose(released, -pooled.gain * mean / (1 + pooled.gain), atol=1e-12)


# --- absorption: the marginal of stochastic samplers ---


def stochastic(name: str) -> tuple[Any, dict[str, Any]]:
    case = BY_NAME[name]
    return case.ready, case.step


@pytest.mark.parametrize(
    "name",
    [
        "ddpm",
        "ddim-eta1",
        "euler-ancestral",
        "sde-dpmsolver++-1-midpoint",
        "sde-dpmsolver++-2-midpoint",
    ],
)
@pytest.mark.parametrize("method", [PTQD, D2DPM])
def test_absorbing_the_residual_keeps_the_variance(name: str, method: Any) -> None:
    """Ten steps; the last injects nothing, so the part of the damage that it does itself stays."""
    make, step = stochastic(name)
    law = probe_scheduler(make(), step_kwargs=step)
    v = 0.01 * np.ones(law.steps)
    v[law.noise_weights <= 1e-9] = 0.0
    known = linear_evidence(law, 1.0, v)
    options = {"min_explained": 0.0}
    plain = final_variance(make, 1.0, 0.0, **step)
    kept = final_variance(make, 1.0, v, method(known, absorption="none", **options), **step)
    absorbed = final_variance(make, 1.0, v, method(known, **options), **step)
    reference = (
        plain
        if method is PTQD
        else final_variance(make, 1.0, 0 * v, method(known, absorption="none", **options), **step)
    )
    assert abs(absorbed - reference) < 0.12 * abs(kept - reference)


def test_the_released_form_is_too_wide() -> None:
    make, step = stochastic("ddim-eta1")
    law = probe_scheduler(make(), step_kwargs=step)
    v = np.where(law.noise_weights > 1e-9, 0.01, 0.0)
    known = linear_evidence(law, 1.0, v)
    variances = {
        form: final_variance(make, 1.0, v, PTQD(known, absorption=form, min_explained=0.0), **step)
        for form in ("self-consistent", "released")
    }
    assert variances["released"] > variances["self-consistent"] + 1e-4


def test_absorption_without_noise_does_nothing_and_says_what_does_not_fit() -> None:
    law = probe_scheduler(BY_NAME["ddim-epsilon"].ready())
    assert PTQD(linear_evidence(law, 1.0, 0.01)).plan(law).is_identity
    make, step = stochastic("ddim-eta1")
    law = probe_scheduler(make(), step_kwargs=step)
    notes = PTQD(linear_evidence(law, 1.0, 5.0), min_explained=0.0).plan(law).explanations
    assert any("exceeds the injected noise" in note for note in notes)
    law = probe_scheduler(stochastic("sde-dpmsolver++-2-midpoint")[0]())
    with pytest.raises(UnsupportedSampler, match="one-step samplers"):
        PTQD(linear_evidence(law, 1.0, 0.01), absorption="released").plan(law)


# --- together ---


def test_a_stretch_is_planned_for_the_edited_error() -> None:
    law = probe_scheduler(euler30())
    known = linear_evidence(law, 1.0, 0.02, gain=0.2)
    both = Composite((ExactDrift(known), CNC(known))).plan(law)
    other = Composite((CNC(known), ExactDrift(known))).plan(law)
    assert torch.equal(both.factor, other.factor) and both.stages == ("output", "increment")
    alone = ExactDrift(linear_evidence(law, 1.0, 0.02 / 1.2**2), conditional=False).plan(law)
    assert torch.allclose(both.factor, alone.factor, rtol=1e-9)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((CNC, D2DPM), "both correct the output"),
        ((DNS, QDrift), "both correct the increment"),
    ],
)
def test_contradictions_are_refused_with_the_reason(parts: Any, reason: str) -> None:
    law = probe_scheduler(euler30())
    known = linear_evidence(law, 1.0, 0.02, gain=0.1)
    with pytest.raises(Incompatible, match=reason):
        Composite(tuple(part(known) for part in parts)).plan(law)


def test_two_that_make_room_for_the_same_variance_are_refused() -> None:
    make, step = stochastic("ddim-eta1")
    law = probe_scheduler(make(), step_kwargs=step)
    known = linear_evidence(law, 1.0, 0.005)
    with pytest.raises(Incompatible, match="make room"):
        Composite((PTQD(known), DNS(known))).plan(law)


def test_a_second_one_measured_after_the_first_is_accepted() -> None:
    from types import SimpleNamespace

    from evenkeel.corrections.base import text_of

    law = probe_scheduler(euler30())
    first = CNC(linear_evidence(law, 1.0, 0.02, gain=0.1))
    after = replace(
        linear_evidence(law, 1.0, 0.02, gain=0.02),
        source=SimpleNamespace(correction=text_of(first)),
    )
    plan = Composite((first, CNC(after))).plan(law)
    assert plan.edit is not None
    assert plan.edit.gain[3, 0].item() == pytest.approx(1 / 1.1 / 1.02)
