"""StepbaQ's fit"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import diffusers as d
import pytest
import torch
from stepbaq_laws import (
    SCHEDULERS,
    STEPS,
    law_of,
    noise,
)
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel import zoo
from evenkeel.corrections.base import digest_of
from evenkeel.corrections.stepbaq import StepbaQ
from evenkeel.errors import CalibrationError, EvenkeelError, OutOfRange, UnsupportedSampler
from evenkeel.fitting.closed_loop.fit_stepbaq import fit_stepbaq, pending_error, training_levels
from evenkeel.hosts.pipeline.pipelines import denoiser_of, denoiser_swapped, run_pipeline
from evenkeel.hosts.scheduler.interception import installed
from evenkeel.quantizers import QuantizerSpec, quantize_module

# ---- the fit


def twin(model: nn.Module, change: Callable[[Tensor, int], Tensor]) -> Any:
    """A copy of the denoiser whose prediction goes through ``change(output, number of the call)``."""
    copied: Any = copy.deepcopy(model)
    inner: Any = type(model).forward
    calls = iter(range(10_000))

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(copied, *args, **kwargs)
        changed = change(out[0], next(calls))
        return (changed, *out[1:]) if isinstance(out, tuple) else type(out)(sample=changed)

    copied.forward = forward
    copied.evenkeel_quantizer = "twin"
    return copied


def fitted(tiny: TinyPipeline, quantized: Any, n: int = 2, **options: Any) -> StepbaQ:
    call = {k: v for k, v in tiny.call.items() if k != "output_type"} | options.pop("call", {})
    prompts = [tiny.prompts[i % 2] for i in range(n)]
    return fit_stepbaq(
        tiny.pipe,
        quantized=quantized,
        prompts=prompts,
        num_inference_steps=options.pop("steps", STEPS),
        guidance_scale=tiny.guidance_scale,
        call=call,
        progress=False,
        **options,
    )


def at_call(number: int, offset: float = 0.0) -> Callable[[Tensor, int], Tensor]:
    """Adds fixed noise, the same to both guidance branches, to one call's prediction."""

    def change(output: Tensor, call: int) -> Tensor:
        if call != number:
            return output
        added = noise((len(output) // 2, 4, *output.shape[2:])) + offset
        both = torch.cat([added, added])
        return output + torch.cat([both, both * 0][: output.shape[1] // 4], 1)

    return change


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sdxl", "ddim"),
        ("sdxl", "euler"),
        ("sdxl", "2m"),
        ("dit", "ddim"),
        ("dit", "2m"),
        ("sd3", "flow"),
    ],
)
def test_an_error_of_known_variance_is_found_and_gone_after_the_relabelling(
    name: str, scheduler: str
) -> None:
    """Both runs are relabelled: with an error at one step only, they agree ever after."""
    tiny = ALL[name]()
    tiny.pipe.scheduler = SCHEDULERS[scheduler]()
    found = fitted(tiny, twin(tiny.model, at_call(0, offset=0.3)))
    law, _ = law_of(scheduler)
    weight = float(law.output_weights[0, 0])
    size = tiny.model.config["sample_size"]
    added = noise((2, 4, size, size)).double() + 0.3
    means = added.mean((0, 2, 3), keepdim=True)
    assert float(found.variance[0]) == pytest.approx(
        weight**2 * float((added - means).var(correction=0)), rel=1e-3
    )
    torch.testing.assert_close(found.mean[0], weight * means[0], rtol=1e-3, atol=1e-4)
    plan = found.plan(law)
    assert plan.relabel is not None and bool(plan.relabel.active[1])
    # 2M looks back on the faulty output once more.
    settled = 2 if law.has_history else 1
    assert found.variance[settled:].max() < 1e-8
    assert found.variance[0] > 1e-4


def test_an_error_that_rounds_to_nothing_goes_on_growing() -> None:
    tiny = ALL["sdxl"]()
    tiny.pipe.scheduler = SCHEDULERS["ddim"]()

    def faint(output: Tensor, call: int) -> Tensor:
        return output + 1e-2 * (at_call(0)(output, 0) - output)

    found = fitted(tiny, twin(tiny.model, faint))
    law, _ = law_of("ddim")
    relabel = found.plan(law).relabel
    assert relabel is None or not relabel.active[1:3].any()
    # The same noise at every step: in y = x / alpha its error adds up, with no synchronization.
    errors = found.variance.sqrt() / torch.from_numpy(law.alpha[1:].copy())
    assert (errors[1:3] > 1.05 * errors[:2]).all()


@pytest.mark.parametrize("name", ["sdxl", "dit", "flux", "sd3", "pixart_sigma"])
def test_the_loop_ran_what_a_corrected_pipeline_runs(name: str) -> None:
    """The quantized states whose errors were measured are those of the finished correction."""
    tiny = ALL[name]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g8"))[0]
    seen: list[Tensor] = []
    fits = []
    for _ in range(2):
        seen.clear()
        handle = quantized.register_forward_pre_hook(
            lambda module, args, kwargs: (
                seen.append(  # after the level was told: hooks run in order
                    (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()
                )
            ),
            with_kwargs=True,
        )
        fits.append(fitted(tiny, quantized))
        handle.remove()
    assert torch.equal(fits[0].mean, fits[1].mean)  # deterministic
    assert torch.equal(fits[0].variance, fits[1].variance)
    assert digest_of(fits[0]) == digest_of(fits[1])
    measured = [s.clone() for s in seen]
    setattr(tiny.pipe, tiny.denoiser, quantized)
    evenkeel.apply(tiny.pipe, fits[0])
    handle = quantized.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()
        ),
        with_kwargs=True,
    )
    seen.clear()
    generate(tiny, steps=STEPS, seeds=(0, 1))
    handle.remove()
    plan = evenkeel.summary(tiny.pipe).plan
    assert plan is not None and plan.relabel is not None and plan.relabel.active.sum() >= 2
    assert len(seen) == len(measured) == STEPS
    own = tiny.pipe.scheduler.timesteps.tolist()
    assert len(own) == STEPS
    for k in range(STEPS):
        scale = float(plan.relabel.scale[k])
        torch.testing.assert_close(seen[k], scale * measured[k], rtol=1e-3, atol=1e-3)


def test_batches_change_nothing_and_nothing_stays_behind() -> None:
    tiny = ALL["dit"]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w4a4-g8"))[0]
    whole, split = (fitted(tiny, quantized, n=4, batch_size=b) for b in (4, 2))
    torch.testing.assert_close(whole.variance, split.variance, rtol=1e-3, atol=1e-9)
    assert whole.training is not None and len(whole.training) == 1000
    for module in (tiny.model, quantized):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert installed(tiny.pipe.scheduler) == []


def test_the_fence_leaves_outliers_out() -> None:
    values = torch.cat(
        [torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([90.0])]
    )
    everything = pending_error([values.reshape(1, 1, -1)], None).now()[1]
    assert everything == pytest.approx(float(values.double().var(correction=0)))
    fenced = pending_error([values.reshape(1, 1, -1)], 1.7).now()[1]
    assert everything > 5 and 0.8 < fenced < 1.1
    assert pending_error([values.reshape(1, 1, -1)], 1e6).now()[1] == everything
    tiny = ALL["dit"]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w4a4-g8"))[0]
    loose, tight = (fitted(tiny, quantized, fence=f) for f in (None, 0.5))
    assert 0 < float(tight.variance[0]) < float(loose.variance[0])
    assert torch.equal(tight.mean[0], loose.mean[0])


def test_few_step_fits_keep_the_time() -> None:
    tiny = ALL["sdxl"]()
    tiny.pipe.scheduler = SCHEDULERS["euler a"]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g8"))[0]
    found = fitted(tiny, quantized, relabel_time=False, steps=3)
    assert not found.relabel_time
    setattr(tiny.pipe, tiny.denoiser, quantized)
    with evenkeel.applied(tiny.pipe, found):
        assert torch.isfinite(generate(tiny, steps=3)).all()
        plan = evenkeel.summary(tiny.pipe).plan
    assert plan is not None and plan.relabel is not None
    assert plan.relabel.timestep.tolist() == plan.law.timesteps.tolist()
    assert plan.relabel.active.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, CalibrationError, "non-empty list"),
        ({"batch_size": 0}, CalibrationError, "at least 1"),
        ({"fence": -1.0}, CalibrationError, "interquartile"),
        ({"fence": math.nan}, CalibrationError, "interquartile"),
    ],
)
def test_bad_requests_are_refused(
    options: dict[str, Any], error: type[EvenkeelError], message: str
) -> None:
    tiny = ALL["dit"]()
    with pytest.raises(error, match=message):
        fitted(tiny, twin(tiny.model, lambda m, call: 0.9 * m), **options)


def test_identical_twins_and_values_that_are_not_finite_are_refused() -> None:
    tiny = ALL["dit"]()
    same = copy.deepcopy(tiny.model)
    with pytest.raises(CalibrationError, match="identical"):
        fitted(tiny, same)
    tiny = ALL["flux"]()
    with pytest.raises(CalibrationError, match="quantized denoiser gave a non-finite"):
        fitted(tiny, twin(tiny.model, lambda m, call: m * math.nan))
    assert not tiny.model._forward_pre_hooks


def test_a_scheduler_without_training_levels_is_refused() -> None:
    with pytest.raises(UnsupportedSampler, match="IPNDMScheduler has no alphas_cumprod"):
        training_levels(d.IPNDMScheduler(), "v_prediction")


def test_eta_is_known_only_to_the_step_and_still_the_plan_is_that_of_the_run() -> None:
    """DDIM with linspace spacing: its states' levels depend on eta, which ``set_timesteps`` is not told."""
    pipe = zoo.load("pixart-sigma")
    pipe.scheduler = d.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    quantized = quantize_module(denoiser_of(pipe), QuantizerSpec.parse("w3a4-g32-r16"))[0]
    asked: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.5, "call": {"eta": 1.0}}
    prompts = ["a red number seven", "a blue number two"]
    fitted = fit_stepbaq(pipe, quantized=quantized, prompts=prompts, progress=False, **asked)
    with denoiser_swapped(pipe, quantized):
        plain = run_pipeline(pipe, prompts, [0, 1], output_type="latent", **asked)
        with evenkeel.applied(pipe, fitted):
            corrected = run_pipeline(pipe, prompts, [0, 1], output_type="latent", **asked)
            asked["call"] = {}
            with pytest.raises(OutOfRange, match="measured at 10 noise levels"):
                run_pipeline(pipe, prompts, [0, 1], output_type="latent", **asked)
    assert bool(torch.isfinite(corrected).all()) and not torch.equal(plain, corrected)
