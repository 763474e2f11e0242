"""QNCD: when it asks again, what it makes of the answer, and that it leaves no trace."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import diffusers
import pytest
import torch
from qncd_hosts import (
    EVERY_OTHER,
    OFFSETS,
    Host,
    Linear,
    euler,
    law_of,
    requery_of,
    states,
)
from tiny_pipelines import TinyPipeline, generate
from torch import Tensor

import evenkeel
from evenkeel.corrections.epsilon_scaling import EpsilonScaling
from evenkeel.corrections.qncd import ASKS, QNCD, renoising
from evenkeel.errors import (
    CalibrationError,
    Incompatible,
    UnsupportedPipeline,
    UnsupportedSampler,
)
from evenkeel.hosts.actuators.step_change import ImageNoise
from evenkeel.hosts.pipeline.denoiser_calls import as_input, guidance_of, shares_of
from evenkeel.hosts.scheduler.probing import probe_scheduler


def by_hand(host: Host, x: Tensor, steps: int, rule: QNCD) -> tuple[Tensor, list[Tensor]]:
    """Euler with QNCD, written out: the final state and every mu."""
    scheduler = copy.deepcopy(host.scheduler)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    x = x * scheduler.init_noise_sigma
    source, mu, mus = ImageNoise(x, rule.seed), torch.zeros(()), []
    slope, offsets = host.unet.slope, host.unet.offsets
    offset = offsets[0] + host.guidance * (offsets[-1] - offsets[0])

    def network(state: Tensor, sigma: Tensor) -> Tensor:
        return slope * state / (sigma**2 + 1).sqrt() + offset

    for k, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        q = network(x, sigma)
        if k < steps - 1 and (k + 1 - 2) % rule.interval == rule.interval // 2:
            n = source.draw(x, uniform=False).double()
            provisional = x + (following - sigma) * q
            again = network(provisional + (sigma**2 - following**2).sqrt() * n, sigma)
            mu = (again - n).mean((1, 2, 3), keepdim=True)
            mu = mu if rule.per_image else mu.mean()
            mus.append(mu)
        x = x + (following - sigma) * (q - mu)
    return x, mus


# ---- when


def test_the_seventh_seventeenth_and_twenty_seventh_of_thirty_steps_refresh() -> None:
    plan = QNCD().plan(law_of(euler(), 30))
    assert plan.refresh is not None
    one_based = (plan.refresh.active.nonzero().flatten() + 1).tolist()
    assert one_based == [7, 17, 27]
    assert [k + 1 for k, note in enumerate(plan.explanations) if note == ASKS] == one_based
    assert plan.stages == ("refresh",) and not plan.active.any()


@pytest.mark.parametrize("interval", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_the_rule_of_the_released_code_without_the_last_step(interval: int, steps: int) -> None:
    released = [n for n in range(1, steps + 1) if (n - 2) % interval == interval // 2]
    assert [k + 1 for k in QNCD(interval).due(steps)] == [n for n in released if n != steps]


@pytest.mark.parametrize("interval", [0, -1, 2.5])
def test_an_interval_that_counts_no_steps_is_refused(interval: Any) -> None:
    with pytest.raises(CalibrationError, match="whole number of steps"):
        QNCD(interval=interval)


def test_it_is_marked_as_calling_the_network() -> None:
    assert "refresh" in QNCD.stages
    assert "refresh" not in EpsilonScaling().stages


def test_without_a_refresh_the_plan_is_the_identity_and_says_so() -> None:
    plan = QNCD().plan(law_of(euler(), 6))
    assert plan.is_identity
    assert set(plan.explanations) == {"no refresh falls into 6 steps at interval 10"}


# ---- re-noising


def test_variance_preserving_re_noising_is_the_published_one() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    law = law_of(scheduler, 10)
    for k in range(9):
        now = scheduler.alphas_cumprod[scheduler.timesteps[k]]
        later = scheduler.alphas_cumprod[scheduler.timesteps[k + 1]]
        f = float(now / later)
        assert renoising(law, k) == pytest.approx((math.sqrt(f), math.sqrt(1 - f)), rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        euler,
        lambda: diffusers.DPMSolverMultistepScheduler(),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        lambda: diffusers.EulerAncestralDiscreteScheduler(),
    ],
)
def test_re_noising_leads_back_to_the_level_of_the_step(make: Any) -> None:
    law = law_of(make(), 12)
    for k in range(1, 11):
        keep, spread = renoising(law, k)
        assert keep * law.alpha[k + 1] == pytest.approx(law.alpha[k])
        assert math.hypot(keep * law.sigma_down[k], spread) == pytest.approx(law.sigma[k], rel=1e-5)


# ---- what is refused, and what is left out


def test_a_step_without_signal_is_left_out_and_says_why() -> None:
    law = law_of(diffusers.FlowMatchEulerDiscreteScheduler(), 6)
    assert law.alpha[0] == 0
    plan = EVERY_OTHER.plan(law)
    assert plan.refresh is not None
    assert plan.refresh.active.tolist() == [False, False, True, False, True, False]
    assert plan.explanations[0].startswith("no refresh: the state holds no signal (sigma = 1")
    # The companion: with signal the same step does refresh.
    assert bool(EVERY_OTHER.plan(law_of(euler(), 6)).refresh.active[0])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "interval", "reason"),
    [
        (diffusers.HeunDiscreteScheduler, 10, "29 steps .*step 6: the next step starts over"),
        (diffusers.HeunDiscreteScheduler, 5, "29 steps .*step 8: the next step starts over"),
        (diffusers.UniPCMultistepScheduler, 10, "15 steps .*step 6: the next step starts over"),
    ],
)
def test_samplers_that_take_their_steps_back_are_refused(
    make: Any, interval: int, reason: str
) -> None:
    law = law_of(make(), 15)
    with pytest.raises(UnsupportedSampler, match=f"refresh nowhere in {reason}"):
        QNCD(interval).plan(law)


def test_a_second_stage_at_the_level_of_its_result_is_not_re_noised() -> None:
    law = law_of(diffusers.HeunDiscreteScheduler(), 15)
    with pytest.raises(UnsupportedSampler, match="step 3: its result has no less noise"):
        QNCD(5).plan(law)


def test_a_learned_variance_beside_the_noise_changes_nothing() -> None:
    class Doubled(Linear):
        def forward(self, sample: Tensor, timestep: Any, branch: int = 0) -> tuple[Tensor]:
            return (torch.cat([super().forward(sample, timestep, branch)[0], 7 * sample], 1),)

    found = []
    for net, learned in ((Linear(), None), (Doubled(), "learned")):
        host = Host(diffusers.DPMSolverMultistepScheduler(variance_type=learned), net)
        evenkeel.apply(host, EVERY_OTHER)
        found.append(host.sample(states()[:, :3], 4))
    torch.testing.assert_close(*found)


# ---- the number


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_euler_with_a_linear_network_by_hand(per_image: bool, guidance: float) -> None:
    rule = QNCD(interval=4, per_image=per_image, seed=3)
    host = Host(euler(), Linear(offsets=OFFSETS[:2]), guidance)
    plain = host.sample(states(), 12)
    expected, mus = by_hand(host, states(), 12, rule)
    host.unet.inputs.clear()
    evenkeel.apply(host, rule)
    found = host.sample(states(), 12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert len(host.unet.inputs) == 2 * (12 + len(rule.due(12)))
    asked = requery_of(host).mu
    assert asked is not None and asked.shape == ((2, 1, 1, 1) if per_image else (1, 1, 1, 1))
    torch.testing.assert_close(asked.flatten(), mus[-1].flatten(), rtol=1e-5, atol=1e-6)


def test_mu_is_the_mean_of_the_output_and_not_of_its_error() -> None:
    """The documented defect: a perfect network with an output of mean b has b taken off."""
    host = Host(euler(), Linear(slope=0.0, offsets=(0.25,)))
    evenkeel.apply(host, QNCD(interval=10))
    host.sample(states(1), 12)
    n = ImageNoise(states(1) * host.scheduler.init_noise_sigma, 0).draw(states(1), uniform=False)
    asked = requery_of(host).mu
    assert asked is not None
    assert float(asked) == pytest.approx(0.25 - float(n.mean()), abs=1e-6)


def test_another_seed_draws_another_noise() -> None:
    def sampled(seed: int) -> Tensor:
        host = Host(euler(), Linear())
        evenkeel.apply(host, QNCD(interval=2, seed=seed))
        return host.sample(states(), 6)

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffusers.DPMSolverMultistepScheduler(),
        lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3),
        lambda: diffusers.DEISMultistepScheduler(),
        lambda: diffusers.DDIMScheduler(clip_sample=False),
    ],
    ids=["2M", "3M", "DEIS", "DDIM"],
)
def test_the_provisional_step_is_the_one_the_sampler_would_make(make: Any) -> None:
    """Histories included: a twin of the sampler is stepped with the output as it was."""
    host = Host(make(), Linear())
    rule = QNCD(interval=4)
    evenkeel.apply(host, rule)
    host.sample(states(), 12)
    inputs, asked_at = host.unet.inputs, rule.due(12)
    assert len(inputs) == 12 + len(asked_at)
    law = law_of(make(), 12)
    source = ImageNoise(states(), rule.seed)
    twin, mu, x, position = make(), torch.zeros(()), states(), 0
    twin.set_timesteps(12)
    for k, t in enumerate(twin.timesteps):
        torch.testing.assert_close(inputs[position], x, rtol=1e-4, atol=1e-4)
        q = 0.4 * x + OFFSETS[0]
        position += 1
        if k in asked_at:
            keep, spread = renoising(law, k)
            provisional = copy.deepcopy(twin).step(q, t, x, return_dict=False)[0]
            n = source.draw(x, uniform=False).double()
            renoised = keep * provisional + spread * n
            torch.testing.assert_close(inputs[position], renoised, rtol=1e-4, atol=1e-4)
            position += 1
            mu = (0.4 * renoised + OFFSETS[0] - n).mean((1, 2, 3), keepdim=True)
        x = twin.step(q - mu, t, x, return_dict=False)[0]


def test_other_predictions_are_corrected_in_their_noise_form() -> None:
    """A network and its restatement as velocity are one model: they must sample alike."""

    class AsVelocity(Linear):
        def forward(self, sample: Tensor, timestep: Any, branch: int = 0) -> tuple[Tensor]:
            eps = super().forward(sample, timestep, branch)[0]
            a = table[int(timestep)].double().sqrt()
            return ((eps - (1 - a**2).sqrt() * sample) / a,)

    table = diffusers.DDIMScheduler().alphas_cumprod
    results = []
    for prediction, network in (("epsilon", Linear()), ("v_prediction", AsVelocity())):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=prediction)
        host = Host(scheduler, network)
        evenkeel.apply(host, QNCD(interval=3))
        results.append(host.sample(states(), 8))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_a_stochastic_sampler_steps_provisionally_without_its_own_noise() -> None:
    host = Host(diffusers.EulerAncestralDiscreteScheduler(), Linear())
    evenkeel.apply(host, QNCD(interval=10))
    host.scheduler.set_timesteps(9)
    law = probe_scheduler(host.scheduler)
    torch.manual_seed(0)
    host.sample(states(), 9)
    asked, x = host.unet.inputs[7], host.unet.inputs[6]  # in the scale of the denoiser
    scale = math.hypot(law.sigma[6], 1.0)
    x = x * scale
    provisional = law.sample_weights[6, 6].item() * x
    provisional += law.output_weights[6, 6].item() * (0.4 * x / scale + OFFSETS[0])
    n = ImageNoise(states() * host.scheduler.init_noise_sigma, 0).draw(x, uniform=False)
    spread = math.sqrt(law.sigma[6] ** 2 - law.sigma_down[6] ** 2)
    torch.testing.assert_close(asked * scale, provisional + spread * n, rtol=1e-4, atol=1e-4)
    assert law.noise_weights[6] > 0.1


# ---- batches


def test_an_image_depends_on_its_batch_only_if_mu_is_shared() -> None:
    pair = states(2)
    pair[1] += 0.5  # another mean, so that a shared mu differs from both

    def sampled(rule: QNCD, x: Tensor) -> Tensor:
        host = Host(euler(), Linear())
        evenkeel.apply(host, rule)
        return host.sample(x, 6)

    alone = sampled(QNCD(interval=2), pair[:1])
    torch.testing.assert_close(sampled(QNCD(interval=2), pair)[:1], alone, rtol=1e-10, atol=1e-10)
    shared = QNCD(interval=2, per_image=False)
    torch.testing.assert_close(sampled(shared, pair[:1]), alone, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(sampled(shared, pair)[:1], alone, rtol=1e-3, atol=1e-3)


# ---- refused when it runs


def test_guidance_that_is_not_linear_is_refused(sdxl: TinyPipeline) -> None:
    evenkeel.apply(sdxl.pipe, EVERY_OTHER)
    with pytest.raises(UnsupportedPipeline, match="no linear combination"):
        generate(sdxl, seeds=(0, 1), guidance_rescale=0.9)


def test_a_copied_scheduler_asks_the_denoiser_of_its_pipeline() -> None:
    host = Host(euler(), Linear())
    evenkeel.apply(host, EVERY_OTHER)
    wanted = host.sample(states(), 4)
    host.scheduler = copy.deepcopy(host.scheduler)
    assert torch.equal(host.sample(states(), 4), wanted)


def test_a_denoiser_compiled_in_place_is_refused() -> None:
    host = Host(euler(), Linear())
    evenkeel.apply(host, EVERY_OTHER)
    host.unet.compile(backend="eager")
    with pytest.raises(Incompatible, match="compiled in place"):
        host.sample(states(), 4)


def test_a_compiled_wrapper_is_asked_like_the_module_itself() -> None:
    eager = Host(euler(), Linear())
    evenkeel.apply(eager, EVERY_OTHER)
    wrapped = Host(euler(), Linear())
    inner = wrapped.unet
    wrapped.unet = torch.compile(inner, backend="eager")  # type: ignore[assignment]
    evenkeel.apply(wrapped, EVERY_OTHER)
    torch.testing.assert_close(wrapped.sample(states(), 4), eager.sample(states(), 4))
    assert requery_of(wrapped).mu is not None
    torch.compiler.reset()


def test_an_enabled_cache_is_refused() -> None:
    host = Host(euler(), Linear())
    evenkeel.apply(host, EVERY_OTHER)
    host.unet.is_cache_enabled = True  # type: ignore[assignment]
    with pytest.raises(Incompatible, match="a cache is enabled"):
        host.sample(states(), 4)


def test_another_noise_level_for_the_network_is_refused() -> None:
    host = Host(euler(), Linear())
    evenkeel.apply(host, EVERY_OTHER)
    requery = requery_of(host)

    class Telling:
        """A plan that also relabels."""

        plan = QNCD(interval=1).plan(law_of(euler(), 4))

    class Relabels:
        active = torch.tensor([True])

    object.__setattr__(Telling.plan, "relabel", Relabels())
    requery._corrector = Telling()  # type: ignore[assignment]
    with pytest.raises(Incompatible, match="another noise level"):
        host.sample(states(), 4)


def test_values_that_are_not_finite_are_refused() -> None:
    class Fragile(Linear):
        def forward(self, sample: Tensor, timestep: Any, branch: int = 0) -> tuple[Tensor]:
            out = super().forward(sample, timestep, branch)[0]
            return (out * float("nan"),) if len(self.inputs) == 2 else (out,)

    host = Host(euler(), Fragile())
    evenkeel.apply(host, EVERY_OTHER)
    with pytest.raises(CalibrationError, match="asked again at step 0, gives values that are not"):
        host.sample(states(), 4)


def test_latents_joined_with_other_images_are_refused() -> None:
    x = states()
    with pytest.raises(UnsupportedPipeline, match="something is joined"):
        as_input(torch.cat([x, x], 1), x, x)
    with pytest.raises(UnsupportedPipeline, match="not a multiple"):
        as_input(x + states(seed=1), x, x)
    torch.testing.assert_close(as_input(torch.cat([3 * x, 3 * x]), x, -x), torch.cat([-3 * x] * 2))


def test_the_shares_of_guidance_are_recovered() -> None:
    a, b = states(2, 1), states(2, 2)
    found = shares_of([a, b], -3.0 * a + 4.0 * b)
    assert found is not None and found.tolist() == pytest.approx([-3.0, 4.0])
    assert shares_of([a, b], a * b) is None
    doubled = torch.cat(
        [2 * a - b] * 2
    )  # class-conditional: both halves of the rows are the result
    rows, shares = guidance_of([torch.cat([a, b])], doubled)
    assert rows == 2 and shares.tolist() == pytest.approx([2.0, -1.0])
