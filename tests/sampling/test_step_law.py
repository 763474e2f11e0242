"""Step laws of diffusers' schedulers"""

from __future__ import annotations

from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from step_laws import (
    REFUSED,
    Noise,
    dpmpp_coefficients,
    law_of,
    probed,
)

from evenkeel.sampling.prediction import PREDICTION_TYPES
from evenkeel.sampling.step_law import Array
from evenkeel.testing.scheduler_cases import BY_NAME, LINEAR, SD_BETAS, Case

ACCEPTED = [case for case in LINEAR if case.name not in REFUSED]
# diffusers' own arithmetic does not keep these at their nominal levels: PNDM converts a mixture of
# v outputs with the last sample only, IPNDM loses x0 in its first step (alpha = 0), and the noise of
# "sde-dpmsolver" (not ++) is right to first order in the step only.
OFF_LEVEL = ["pndm-plms-v_prediction", "ipndm", "sde-dpmsolver-1", "sde-dpmsolver-2"]
TOLERANCE = 1e-5  # the hosts keep their tables in float32


def closed(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def direct_step(
    scheduler: Any, case: Case, k: int, m: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    t = scheduler.timesteps[k]
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)
    result: torch.Tensor = scheduler.step(m, t, x, return_dict=False, **case.step)[0]
    return result.double()


# --- closed forms ---


def test_euler_is_x_plus_ds_eps() -> None:
    scheduler = d.EulerDiscreteScheduler(**SD_BETAS)
    law = probed(scheduler)
    closed(law.sample_weights, np.eye(10))
    closed(law.output_weights, np.diag(np.diff(scheduler.sigmas.double().numpy())))
    assert not law.has_history and not law.is_stochastic and not law.noise_weights.any()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler_is_x_plus_dsigma_v(shift: float) -> None:
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=shift)
    law = probed(scheduler)
    closed(law.sample_weights, np.eye(10))
    closed(law.output_weights, np.diag(np.diff(scheduler.sigmas.double().numpy())))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_its_noise_weight(eta: float) -> None:
    scheduler = d.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SD_BETAS)
    law = probed(scheduler, step_kwargs={"eta": eta})
    t = scheduler.timesteps.numpy()
    table = scheduler.alphas_cumprod.double().numpy()
    ab = table[t]
    prev = np.where(t >= 100, table[np.maximum(t - 100, 0)], table[0])
    std = eta * np.sqrt((1 - prev) / (1 - ab) * (1 - ab / prev))
    closed(law.sample_weights, np.diag(np.sqrt(prev / ab)))
    closed(
        law.output_weights,
        np.diag(np.sqrt(1 - prev - std**2) - np.sqrt(prev * (1 - ab) / ab)),
    )
    np.testing.assert_allclose(law.noise_weights, std, rtol=0, atol=TOLERANCE * eta)


def test_euler_ancestral_noise_and_down_levels() -> None:
    scheduler = d.EulerAncestralDiscreteScheduler(**SD_BETAS)
    law = probed(scheduler)
    sigma = scheduler.sigmas.double().numpy()
    up = np.sqrt(sigma[1:] ** 2 * (sigma[:-1] ** 2 - sigma[1:] ** 2) / sigma[:-1] ** 2)
    down = np.sqrt(sigma[1:] ** 2 - up**2)
    closed(law.noise_weights, up)
    closed(law.sigma_down, down)
    closed(law.output_weights, np.diag(down - sigma[:-1]))
    closed(law.sigma, sigma)


def clean_sample_form(prediction: str, a: float, s: float) -> tuple[float, float]:
    """x0 = p m + q x, written out again for the test."""
    return {
        "epsilon": (-s / a, 1 / a),
        "sample": (1.0, 0.0),
        "v_prediction": (-s, a),
        "flow_prediction": (-s, 1.0),
    }[prediction]


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_pp(order: int, prediction: str) -> None:
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0} if prediction == "flow_prediction" else {}
    scheduler = d.DPMSolverMultistepScheduler(
        prediction_type=prediction, solver_order=order, **SD_BETAS, **flow
    )
    law = probed(scheduler)
    a, s = law.alpha, law.sigma
    weights_a, weights_w = np.zeros((10, 10)), np.zeros((10, 10))
    for k in range(10):
        # The first steps have no history; the last is first order, the one before it second.
        here = min(order, k + 1, 10 - k)
        keep, coefficients = dpmpp_coefficients(a, s, k, here)
        weights_a[k, k] += keep
        for back, c in enumerate(coefficients):
            p, q = clean_sample_form(prediction, a[k - back], s[k - back])
            weights_w[k, k - back] += c * p
            weights_a[k, k - back] += c * q
    # Dividing by alpha magnifies the rounding of the tables where the state is nearly pure noise.
    np.testing.assert_allclose(law.output_weights, weights_w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(law.sample_weights, weights_a, rtol=1e-4, atol=1e-5)
    assert law.has_history == (order > 1)


# --- the law predicts what the scheduler does ---


def test_the_catalogue_is_accepted_or_refused_and_nothing_is_left_over() -> None:
    assert {c.name for c in ACCEPTED} | set(REFUSED) == {c.name for c in LINEAR}
    assert len(ACCEPTED) + len(REFUSED) == len(LINEAR)
    assert {law_of(c.name).prediction for c in ACCEPTED} == set(PREDICTION_TYPES)


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_law_predicts_every_step_from_arbitrary_inputs(case: Case, noise: Noise) -> None:
    law, scheduler = law_of(case.name), case.ready()
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(law.steps, 6, 1, 1, 1, generator=rng, dtype=torch.float64) * 2
    m = torch.randn(law.steps, 6, 1, 1, 1, generator=rng, dtype=torch.float64) * 2
    z = torch.randn(law.steps, 6, 1, 1, 1, generator=rng, dtype=torch.float64)
    assert law.prediction == case.prediction_type
    assert law.is_stochastic == case.stochastic
    for k in range(law.steps):
        noise.next = z[k]
        found = direct_step(scheduler, case, k, m[k], x[k]).reshape(-1).numpy()
        terms_x = law.sample_weights[k][:, None] * x.reshape(law.steps, -1).numpy()
        terms_m = law.output_weights[k][:, None] * m.reshape(law.steps, -1).numpy()
        expected = terms_x.sum(0) + terms_m.sum(0)
        expected = expected + law.noise_weights[k] * z[k].reshape(-1).numpy()
        scale = np.abs(terms_x).sum(0) + np.abs(terms_m).sum(0) + 1
        assert np.abs(found - expected).max() <= (TOLERANCE * scale).max(), k


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_law_predicts_the_whole_trajectory(case: Case, noise: Noise) -> None:
    law, scheduler = law_of(case.name), case.ready()
    phi, weights = law.trajectory
    rng = torch.Generator().manual_seed(2)
    m = torch.randn(law.steps, 6, 1, 1, 1, generator=rng, dtype=torch.float64)
    start = torch.randn(6, 1, 1, 1, generator=rng, dtype=torch.float64)
    noise.next = torch.zeros(6)
    x = start
    for k in range(law.steps):
        x = direct_step(scheduler, case, k, m[k], x)
        terms = weights[k][:, None] * m.reshape(law.steps, -1).numpy()
        expected = phi[k] * start.reshape(-1).numpy() + terms.sum(0)
        scale = np.abs(phi[k]) + np.abs(terms).sum(0) + 1
        assert np.abs(x.reshape(-1).numpy() - expected).max() <= (2e-5 * scale).max(), k


def test_a_wrong_law_would_not_predict() -> None:
    """Companion: the second-order law does not pass for the third-order run."""
    second, third = law_of("dpmsolver++-2-midpoint"), law_of("dpmsolver++-3-midpoint")
    assert np.abs(second.trajectory[1] - third.trajectory[1]).max() > 0.05


# --- noise levels ---


def own_levels(scheduler: Any) -> tuple[Array, Array]:
    """Signal and noise of the states that the scheduler's tables promise: one more than steps.

    Tables of cumulative products do not list the level of the result: one less there.
    """
    name, last = type(scheduler).__name__, len(scheduler.timesteps) + 1
    if name.startswith(("DPM", "UniPC", "DEIS", "SASolver")):
        sigma = scheduler.sigmas[:last].double().numpy()
        if scheduler.config.get("use_flow_sigmas", False):
            return 1 - sigma, sigma
        return 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)
    if name.startswith("FlowMatch"):
        sigma = scheduler.sigmas[:last].double().numpy()
        return 1 - sigma, sigma
    if name.startswith(("Euler", "Heun", "KDPM2", "LMS")):
        return np.ones(last), scheduler.sigmas[:last].double().numpy()
    ab = scheduler.alphas_cumprod.double().numpy()[scheduler.timesteps.long().numpy()]
    return np.sqrt(ab), np.sqrt(1 - ab)


@pytest.mark.parametrize("case", [c for c in ACCEPTED if c.name not in OFF_LEVEL], ids=str)
def test_levels_read_off_the_steps_are_those_of_the_tables(case: Case) -> None:
    law = law_of(case.name)
    alpha, sigma = own_levels(case.ready())
    entered = ~np.concatenate([[False], law.intermediate])  # not between two stages
    # Predictor-correctors are at the nominal level although all their results are intermediate.
    kept = (entered | case.name.startswith(("unipc", "sa-")))[: len(sigma)]
    assert kept.sum() >= 4
    gap_alpha, gap = (
        np.abs(law.alpha[: len(alpha)] - alpha),
        np.abs(law.sigma[: len(sigma)] - sigma),
    )
    assert (gap_alpha[kept] <= 1e-4).all()
    assert (gap[kept] <= 1e-4 * np.maximum(1, sigma[kept])).all()


@pytest.mark.parametrize("name", [n for n in OFF_LEVEL if n != "ipndm"])
def test_samplers_that_leave_their_nominal_level_are_known(name: str) -> None:
    _, sigma = own_levels(BY_NAME[name].ready())
    assert np.abs(law_of(name).sigma[: len(sigma)] - sigma).max() > 0.05


def test_ipndm_loses_the_signal_in_its_first_step() -> None:
    """It starts at alpha = 0, where x0 cannot be told from the output it is made of."""
    law = law_of("ipndm")
    assert law.alpha[0] == 0.0 and abs(law.alpha[1]) < 1e-6
    assert BY_NAME["ipndm"].ready().alphas[1] > 0.2


def test_midpoint_stages_have_the_midpoint_level() -> None:
    scheduler = BY_NAME["kdpm2-epsilon"].ready()
    law = law_of("kdpm2-epsilon")
    between = np.sqrt(law.sigma[0:-2:2] * law.sigma[2::2])  # geometric, as in the paper
    np.testing.assert_allclose(law.sigma[1:-1:2], between[: len(law.sigma[1:-1:2])], rtol=1e-4)
    assert len(law.timesteps) == len(scheduler.timesteps)


@pytest.mark.parametrize("name", ["dpmpp-2-lu-lambdas", "euler-epsilon", "ddim-sample", "ddpm"])
def test_a_clean_result_has_exactly_zero_noise(name: str) -> None:
    """Rounding must not leave 1e-6 of noise in the result: the last step would be stretched."""
    assert law_of(name).sigma[-1] == 0.0
    assert law_of(name).sigma_down[-1] == 0.0


def test_no_old_noise_is_left_where_a_step_replaces_all_of_it() -> None:
    np.testing.assert_array_equal(law_of("lcm").sigma_down, 0.0)
    np.testing.assert_array_equal(law_of("flow-euler-stochastic").sigma_down, 0.0)
    assert law_of("lcm").sigma[1] > 0.5


# --- stages and predictor-correctors ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("heun-epsilon", [0, 0, 2, 2, 4, 4]),
        ("heun-v_prediction", [0, 0, 2, 2, 4, 4]),
        ("kdpm2-epsilon", [0, 0, 2, 2, 4, 4]),
        ("kdpm2-v_prediction", [0, 0, 2, 2, 4, 4]),
        ("flow-heun", [0, 0, 2, 2, 4, 4]),
        ("single-dpmsolver++-2", [0, 0, 2, 2, 4, 4]),
        ("single-dpmsolver-2", [0, 0, 2, 2, 4, 4]),
        ("single-dpmsolver++-3", [0, 0, 0, 3, 3, 3]),
        ("single-flow", [0, 0, 2, 2, 4, 4]),
        ("pndm-prk", [0, 0, 0, 0, 4, 4]),
        ("pndm-plms-epsilon", [0, 0, 2, 3, 4, 5]),
        ("unipc-2-bh2-x0", [0] * 6),
        ("unipc-2-bh2-noise", [0] * 6),
        ("sa-tau0", [0] * 6),
        ("dpmsolver++-3-midpoint", [0, 1, 2, 3, 4, 5]),
        ("dpmpp-2-flow", [0, 1, 2, 3, 4, 5]),
        ("lms-v_prediction", [0, 1, 2, 3, 4, 5]),
        ("deis-3", [0, 1, 2, 3, 4, 5]),
        ("ddpm", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_anchor_is_the_state_that_a_step_advances(name: str, expected: list[int]) -> None:
    law = law_of(name)
    assert law.anchor[:6].tolist() == expected
    starts_over = [expected[k + 1] < k + 1 for k in range(5)]
    assert law.intermediate[:5].tolist() == starts_over


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
def test_anchor_does_not_depend_on_what_is_predicted(algorithm: str, prediction: str) -> None:
    """The second stage converts its output with the sample it is handed; it does not advance it."""
    scheduler = d.DPMSolverSinglestepScheduler(
        algorithm_type=algorithm,
        prediction_type=prediction,
        lower_order_final=True,
        final_sigmas_type="sigma_min",
        **SD_BETAS,
    )
    assert probed(scheduler).anchor[:8].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
