"""Covariance-aware drift on Gaussian data: sampling is linear, so every number here is exact."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_data import (
    PIPELINE,
    SCALARS,
    autoregressive,
    denoiser,
    error_variance,
    euler,
    evidence,
)

from evenkeel.corrections.covariance_drift import CovarianceDrift
from evenkeel.corrections.exact_drift import ExactDrift
from evenkeel.corrections.linear_run import LinearRun
from evenkeel.corrections.q_drift import QDrift
from evenkeel.errors import CalibrationError
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.scheduler.interception import install
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.testing.scheduler_cases import BY_NAME


def final_std(
    scheduler: Any,
    s: float,
    errors: np.ndarray,
    rho: float,
    correction: Any = None,
    gain: float = 0.0,
) -> float:
    """Through the real scheduler: loadings on the start and on independent sources of the errors."""
    law = probe_scheduler(scheduler)
    install(scheduler, *([Corrector(correction, PIPELINE, layout=SCALARS)] if correction else []))
    steps = law.steps
    root = np.linalg.cholesky(
        autoregressive(steps, rho) * np.sqrt(np.outer(errors, errors)) + 1e-14 * np.eye(steps)
    )
    x = torch.zeros(1 + steps, 1, 1, 1, dtype=torch.float64)
    x[0] = math.hypot(law.alpha[0] * s, law.sigma[0])
    for k, t in enumerate(scheduler.timesteps):
        m = (1 + gain) * denoiser(law, k, s) * x
        m[1:, 0, 0, 0] += torch.from_numpy(root[k])
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(m, t, x, return_dict=False)[0].double()
    return float((x**2).sum().sqrt()) / s


def recovered(
    make: Any, correction: Any, s: float, errors: np.ndarray, rho: float, gain: float = 0.0
) -> float:
    """Share of the damage to the final standard deviation that is undone."""
    plain = final_std(make(), s, 0 * errors, 0.0)
    damaged = final_std(make(), s, errors, rho, gain=gain)
    return 1 - abs(final_std(make(), s, errors, rho, correction, gain) - plain) / abs(
        damaged - plain
    )


def ready(name: str) -> Any:
    return BY_NAME[name].ready()


@pytest.mark.parametrize(("rho", "least"), [(0.0, 0.99), (0.5, 0.99), (0.9, 0.9)])
def test_it_recovers_what_independence_cannot(rho: float, least: float) -> None:
    """Methods note 14.3: at rho = .9 the rules that assume independence recover about 6 %."""
    make = lambda: euler(30)  # noqa: E731
    law = probe_scheduler(make())
    errors = error_variance(law, 0.1)
    known = evidence(law, 1.0, errors, rho)
    assert recovered(make, CovarianceDrift(known), 1.0, errors, rho) > least
    assert recovered(make, CovarianceDrift(known, correlated=False), 1.0, errors, 0.9) < 0.1


def test_variance_based_rules_recover_six_percent() -> None:
    make = lambda: euler(30)  # noqa: E731
    law = probe_scheduler(make())
    errors = error_variance(law, 0.1)
    known = evidence(law, 1.0, errors, 0.9)
    for rule in (QDrift(known, conditional=False), ExactDrift(known, conditional=False)):
        assert 0.03 < recovered(make, rule, 1.0, errors, 0.9) < 0.1


@pytest.mark.parametrize("gain", [-0.05, 0.05])
def test_it_sees_an_error_of_gain(gain: float) -> None:
    make = lambda: euler(30)  # noqa: E731
    law = probe_scheduler(make())
    errors = error_variance(law, 0.02)
    known = evidence(law, 1.0, errors, 0.0, gain)
    assert recovered(make, CovarianceDrift(known), 1.0, errors, 0.0, gain) > 0.95
    assert recovered(make, CovarianceDrift(known, see_gain=False), 1.0, errors, 0.0, gain) < 0.3


@pytest.mark.parametrize(
    "name",
    [
        "dpmsolver++-2-midpoint",
        "dpmsolver++-3-midpoint",
        "ddim-epsilon",
        "ddim-v_prediction",
        "flow-euler-shift3",
    ],
)
def test_any_linear_sampler(name: str) -> None:
    """Ten steps: the last one, which is left alone, injects a good part of what stays."""
    law = probe_scheduler(ready(name))
    errors = np.minimum(error_variance(law, 0.01), 0.01)
    known = evidence(law, 0.7, errors, 0.7)
    aware = recovered(lambda: ready(name), CovarianceDrift(known), 0.7, errors, 0.7)
    blind = recovered(lambda: ready(name), ExactDrift(known, conditional=False), 0.7, errors, 0.7)
    assert aware > 0.6
    assert aware > blind + 0.2


def test_no_error_is_the_identity_bit_for_bit() -> None:
    law = probe_scheduler(euler(30))
    plan = CovarianceDrift(evidence(law, 1.0, np.zeros(30), 0.0)).plan(law)
    assert torch.equal(plan.factor, torch.ones_like(plan.factor))
    assert plan.is_identity


def test_factors_are_limited() -> None:
    law = probe_scheduler(euler(30))
    known = evidence(law, 1.0, error_variance(law, 0.5), 0.99)
    factor = CovarianceDrift(known, limit=0.2).plan(law).factor
    assert float((factor - 1).abs().max()) == pytest.approx(0.2)


def test_without_the_gram_matrix_it_says_what_is_missing() -> None:
    law = probe_scheduler(euler(4))
    known = replace(evidence(law, 1.0, np.full(4, 0.1), 0.0), gram=None)
    with pytest.raises(CalibrationError, match="covariance between steps"):
        CovarianceDrift(known).plan(law)


def test_another_number_of_steps_interpolates_the_covariance() -> None:
    law, other = probe_scheduler(euler(30)), probe_scheduler(euler(20))
    known = evidence(law, 1.0, error_variance(law, 0.05), 0.5)
    factor = CovarianceDrift(known).plan(other).factor
    assert factor.shape == (20, 1)
    assert bool((factor[:-2] > 1).all())  # then R^2 is low, and the final step


def test_the_recursion_is_that_of_the_law() -> None:
    """One step by hand: Var = (1 - g l J)^2 P + (g l)^2 V must equal (1 - l J)^2 P."""
    law = probe_scheduler(euler(30))
    level, after = law.sigma[0], law.sigma[1]
    start, variance = 1 + level**2, 0.05
    slope = level / start
    same = np.full(30, slope)
    run = LinearRun(law, start, same, same, variance * np.eye(30))
    g = run.factors(np.arange(30) == 0, 0.5)[0]
    length = level - after
    found = (1 - g * length * slope) ** 2 * start + (g * length) ** 2 * variance
    assert found == pytest.approx((1 - length * slope) ** 2 * start, rel=1e-9)
