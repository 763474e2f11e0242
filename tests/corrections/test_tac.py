"""TAC-Diffusion: its gain against minimization, its closed loop on tiny pipelines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers as d
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from changed_denoisers import twin
from scipy.optimize import minimize_scalar
from tiny_pipelines import ALL, TinyPipeline
from torch import Tensor

from evenkeel.corrections.base import Correction, digest_of, text_of
from evenkeel.corrections.reconstruction import Reconstruction, reconstruction_gain
from evenkeel.corrections.tac import TAC
from evenkeel.errors import CalibrationError, OutOfRange
from evenkeel.fitting import calibrate, fit_readout
from evenkeel.fitting.closed_loop.fit_tac import fit_tac
from evenkeel.fitting.closed_loop.loop import Rule, run_closed_loop
from evenkeel.hosts.run import Run
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.sampling.step_law import StepLaw

STEPS = 4
PLAIN = {"beta_schedule": "linear"}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: d.DDIMScheduler(clip_sample=False, **PLAIN),
    "ddpm": lambda: d.DDPMScheduler(clip_sample=False, **PLAIN),
    "dpm++ 2m": lambda: d.DPMSolverMultistepScheduler(solver_order=2, **PLAIN),
    "plms": lambda: d.PNDMScheduler(skip_prk_steps=True, **PLAIN),
    "2s": lambda: d.DPMSolverSinglestepScheduler(solver_order=2, **PLAIN),
}


# ---- the gain


def outputs(seed: int, samples: int = 3) -> tuple[Tensor, Tensor]:
    """(samples, 2, 16) full-precision and quantized outputs with a gain, a mean and noise."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(samples, 2, 16, generator=generator, dtype=torch.float64) + 0.3
    noise = torch.randn(e.shape, generator=generator, dtype=torch.float64)
    return e, 0.8 * e + 0.2 * noise


def mask_of(e: Tensor, threshold: float, mask: str) -> Tensor:
    tau = threshold * e.abs().mean((1, 2), keepdim=True)
    return e.abs() > tau if mask == "magnitude" else e > tau


def loss(k: float, e: Tensor, q: Tensor, l1: float, l2: float, count: float, times: float) -> float:
    """Eq. 12 on the masked elements of one channel; ``times`` stands in front of the relative term."""
    absolute = ((k * q - e) ** 2).sum() / count
    relative = times * (((k * q - e) / e) ** 2).sum() / count
    return float((1 - l1) * absolute + l1 * relative + l2 * (k - 1) ** 2)


@hypothesis.settings(derandomize=True, max_examples=40, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 1000),
    lambda_1=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    lambda_2=st.sampled_from([0.0, 1e-3, 0.3]),
    threshold=st.sampled_from([0.25, 1.0]),
    mask=st.sampled_from(["magnitude", "signed"]),
    per_channel=st.booleans(),
)
def test_gain_minimizes_the_loss(
    seed: int, lambda_1: float, lambda_2: float, threshold: float, mask: str, per_channel: bool
) -> None:
    e, q = outputs(seed)
    found = reconstruction_gain(
        e,
        q,
        lambda_1=lambda_1,
        lambda_2=lambda_2,
        threshold=threshold,
        mask=mask,
        per_channel=per_channel,
    )
    chosen = mask_of(e, threshold, mask)
    parts = [(slice(None), c) for c in range(2)] if per_channel else [(slice(None), slice(None))]
    assert found.shape == (len(parts),)
    for value, part in zip(found.tolist(), parts, strict=True):
        kept = chosen[part]
        a, b = e[part][kept], q[part][kept]
        args = (a, b, lambda_1, lambda_2, float(len(a)), 1.0)
        best = minimize_scalar(loss, args=args, bracket=(0.0, 2.0))
        assert value == pytest.approx(best.x, abs=1e-6)
        assert loss(value, *args) <= loss(value + 1e-3, *args)


@pytest.mark.parametrize("samples", [1, 3])
def test_published_form_counts_the_relative_error_n_times(samples: int) -> None:
    e, q = outputs(0, samples)
    options: dict[str, Any] = {"lambda_1": 0.2, "lambda_2": 1e-3, "threshold": 0.5}
    found = reconstruction_gain(e, q, form="published", **options)
    consistent = reconstruction_gain(e, q, **options)
    n = e[0].numel()
    kept = mask_of(e, 0.5, "magnitude")
    for c in range(2):
        a, b = e[:, c][kept[:, c]], q[:, c][kept[:, c]]
        best = minimize_scalar(
            loss, args=(a, b, 0.2, 1e-3, float(n * samples), float(n)), bracket=(0.0, 2.0)
        )
        assert float(found[c]) == pytest.approx(best.x, abs=1e-6)
        relative_only = float((b / a).sum() / ((b / a) ** 2).sum())
        assert abs(float(found[c]) - relative_only) < 0.5 * abs(
            float(consistent[c]) - relative_only
        )


def test_published_form_as_printed() -> None:
    """Eq. 19, written out with loops for one sample and one channel."""
    e, q = outputs(1, 1)
    tau = 0.5 * float(e.abs().mean())
    n, above, below = e.numel(), 0.0, 0.0
    for a, b in zip(e[0, 0].tolist(), q[0, 0].tolist(), strict=True):
        chosen = 1.0 if a > tau else 0.0
        above += 0.7 * b * a * chosen + 0.3 * n * b / a * chosen
        below += 0.7 * b * b * chosen + 0.3 * n * (b / a) ** 2 * chosen
    printed = (above + 0.01 * n) / (below + 0.01 * n)
    options: dict[str, Any] = {"lambda_1": 0.3, "lambda_2": 0.01, "threshold": 0.5}
    found = reconstruction_gain(e, q, mask="signed", form="published", **options)
    assert float(found[0]) == pytest.approx(printed, rel=1e-12)


@pytest.mark.parametrize("form", ["consistent", "published"])
@pytest.mark.parametrize("lambda_2", [0.0, 1e-3])
def test_nothing_above_the_threshold_gives_one(form: str, lambda_2: float) -> None:
    e, q = outputs(0)
    found = reconstruction_gain(e, q, threshold=100.0, lambda_2=lambda_2, form=form)
    assert torch.equal(found, torch.ones(2, dtype=torch.float64))


def test_signed_and_magnitude_masks_differ() -> None:
    e, q = outputs(0)
    q = torch.where(e > 0, q, 0.5 * q)  # negative outputs shrank more
    signed, both = (reconstruction_gain(e, q, mask=m) for m in ("signed", "magnitude"))
    assert bool((both > signed + 0.05).all())


def test_a_ratio_of_root_mean_squares_does_not_shrink_where_outputs_have_drifted_apart() -> None:
    e, other = torch.randn(2, 4, 2, 2000, generator=torch.Generator().manual_seed(0)).unbind()
    q = 0.8 * (0.6 * e + 0.8 * other)  # of correlation 0.6, four fifths as large
    shrunk, kept = (reconstruction_gain(e, q, estimator=s) for s in ("least-squares", "rms"))
    assert bool((shrunk < 0.9).all()) and bool(((kept - 1.25).abs() < 0.1).all())


def test_the_printed_form_has_no_limits() -> None:
    far = torch.tensor([0.1, 3.0])
    assert torch.equal(Reconstruction.published().limited(far), far)
    assert Reconstruction().limited(far).tolist() == [0.5, 1.5]
    with pytest.raises(CalibrationError, match="rms"):
        Reconstruction(lambda_1=0.1, threshold=1.0, estimator="rms")


def test_sums_of_batches_are_sums_of_all() -> None:
    e, q = outputs(0, 6)
    rule = Reconstruction.least_squares(lambda_1=0.3, threshold=0.5)
    together = rule.gain(rule.sums(e, q))
    parts = rule.gain(rule.sums(e[:4], q[:4]) + rule.sums(e[4:], q[4:]))
    assert torch.allclose(parts, together, rtol=1e-12)
    mean_of_ratios = (rule.gain(rule.sums(e[:4], q[:4])) + rule.gain(rule.sums(e[4:], q[4:]))) / 2
    assert not torch.allclose(mean_of_ratios, together, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"lambda_1": 0.1},
        {"lambda_1": -0.1, "threshold": 1.0},
        {"lambda_1": 1.1, "threshold": 1.0},
        {"lambda_2": -1.0},
        {"lambda_2": float("nan")},
        {"threshold": -1.0},
        {"mask": "positive"},
        {"form": "printed"},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError):
        reconstruction_gain(*outputs(0), **options)


def test_outputs_that_make_no_sense() -> None:
    e, q = outputs(0)
    with pytest.raises(CalibrationError, match="shape"):
        reconstruction_gain(e, q[:1])
    with pytest.raises(CalibrationError, match="not finite"):
        reconstruction_gain(e, q * float("nan"))


# ---- the correction


def law_of(steps: int, scheduler: str = "ddim") -> StepLaw:
    found = SCHEDULERS[scheduler]()
    found.set_timesteps(steps)
    return probe_scheduler(found)


def made(law: StepLaw, gain: Tensor | None = None, bias: Tensor | None = None, **o: Any) -> TAC:
    return TAC(law.alpha[:-1], law.sigma[:-1], gain, bias, **o)


def test_gain_is_carried_over_log_snr() -> None:
    law = law_of(10)
    log_snr = np.log(law.alpha[:-1] / law.sigma[:-1])
    gain = torch.from_numpy(1 + 0.01 * log_snr)[:, None].expand(-1, 4).clone()
    other = law_of(5)
    edit = made(law, gain).plan(other, allow_range=True).edit
    assert edit is not None
    inside = other.timesteps >= law.timesteps.min()
    expected = 1 + 0.01 * np.log(other.alpha[:-1] / other.sigma[:-1])
    assert np.allclose(edit.gain.numpy()[inside], expected[inside, None], atol=1e-9)
    same = made(law, gain).plan(law)
    assert same.edit is not None and torch.equal(same.edit.gain, gain)
    assert same.stages == ("output",) and same.edit.branch is None
    branch = made(law, gain, branch=1).plan(law).edit
    assert branch is not None and branch.branch == 1


def test_steps_outside_are_refused_or_left_alone() -> None:
    law = law_of(10)
    short = TAC(law.alpha[3:7], law.sigma[3:7], torch.full((4, 4), 1.2, dtype=torch.float64), None)
    with pytest.raises(OutOfRange, match="6 of 10"):
        short.plan(law)
    plan = short.plan(law, allow_range=True)
    assert plan.edit is not None
    assert plan.edit.gain[:, 0].tolist() == [1.0] * 3 + [1.2] * 4 + [1.0] * 3
    assert [bool(n) for n in plan.explanations] == [True] * 3 + [False] * 4 + [True] * 3


def test_gains_are_limited_and_said_to_be() -> None:
    law = law_of(4)
    gain = torch.tensor([[1.0], [-3.0], [1.2], [9.0]], dtype=torch.float64)
    plan = made(law, gain).plan(law)
    assert plan.edit is not None
    assert plan.edit.gain.flatten().tolist() == [1.0, 0.5, 1.2, 1.5]
    assert [("limited" in n) for n in plan.explanations] == [False, True, False, True]


def test_bias_belongs_to_its_schedule() -> None:
    law = law_of(4)
    bias = torch.ones(4, 2, 3, 3)
    bias[1] = 0
    plan = made(law, bias=bias).plan(law)
    assert plan.active.tolist() == [True, False, True, True]
    assert plan.shift is bias and plan.stages == ("state",)
    for other in (law_of(5), law_of(4, "dpm++ 2m")):
        with pytest.raises(OutOfRange, match="input bias"):
            made(law, bias=bias).plan(other, allow_range=True)


def test_names_references_options_digests() -> None:
    law = law_of(4)
    gain, bias = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 2, 3, 3)
    both = made(
        law, gain, bias, reconstruction=Reconstruction.least_squares(lambda_1=0.1, threshold=0.5)
    )
    parts = [both, made(law, gain), made(law, bias=bias)]
    assert [p.name for p in parts] == ["tac", "tac-ner", "tac-ibc"]
    assert [("8-19" in p.references[0], "22-24" in p.references[0]) for p in parts] == [
        (True, True),
        (True, False),
        (False, True),
    ]
    assert all(isinstance(p, Correction) for p in parts)
    assert both.options["lambda_1"] == 0.1 and "threshold=0.5" in text_of(both)
    moved = (
        replace(both, gain=gain + 1e-9),
        replace(both, bias=bias + 1e-6),
        replace(both, branch=0),
    )
    assert len({digest_of(c) for c in (*parts, *moved)}) == 6
    assert digest_of(replace(both, gain=gain.clone())) == digest_of(both)


@pytest.mark.parametrize(
    ("gain", "bias", "branch"),
    [
        (None, None, None),
        (torch.ones(3, 2), None, None),
        (torch.full((4, 2), float("nan")), None, None),
        (None, torch.full((4, 2, 3, 3), float("inf")), None),
        (None, torch.ones(4, 2, 3, 3), 0),
    ],
)
def test_tables_that_make_no_sense(gain: Any, bias: Any, branch: Any) -> None:
    with pytest.raises(CalibrationError):
        made(law_of(4), gain, bias, branch=branch)


# ---- the fit


def bent(m: Tensor) -> Tensor:
    """A gain, an offset and something that is not linear."""
    return 0.9 * m + 0.05 * m.abs() + 0.02


def pixart(scheduler: str = "ddim") -> TinyPipeline:
    tiny = ALL["pixart_sigma"]()
    tiny.pipe.scheduler = SCHEDULERS[scheduler]()
    return tiny


def common(tiny: TinyPipeline, n: int = 4) -> dict[str, Any]:
    whole = isinstance(tiny.prompts[0], int)
    return {
        "prompts": [i if whole else f"prompt number {i}" for i in range(n)],
        "num_inference_steps": STEPS,
        "guidance_scale": tiny.guidance_scale,
        "call": {k: v for k, v in tiny.call.items() if k != "output_type"},
        "progress": False,
    }


def fitted(tiny: TinyPipeline, quantized: Any, n: int = 4, **changes: Any) -> TAC:
    return fit_tac(tiny.pipe, quantized=quantized, **(common(tiny, n) | changes))


class MeanError(Rule):
    """Mean over all prompts of the state error after each step, and its spread."""

    def __init__(self) -> None:
        self.mean: list[float] = []
        self.size: list[float] = []
        self.scale = 1.0  # of the states: what float32 can resolve

    def state(self, step: int, results: Any, layout: Any, law: Any) -> None:
        error = torch.cat([q.double() - e.double() for e, q in results])
        self.mean.append(float(error.mean(0).abs().max()))
        self.size.append(float(error.abs().max()))
        self.scale = max(self.scale, *(float(q.abs().max()) for _, q in results))


def errors_with(
    tiny: TinyPipeline, quantized: Any, correction: Any, **o: Any
) -> tuple[Any, MeanError]:
    """The run that a user gets, against the full-precision one."""
    c = common(tiny) | o
    call, seen = c["call"], MeanError()
    run = Run(
        tiny.pipe,
        c["prompts"],
        c["num_inference_steps"],
        guidance_scale=c["guidance_scale"],
        batch_size=2,
        call=call,
        quantized=quantized,
    )
    result = run_closed_loop(run, seen, correction=correction, progress=False)
    return result.law, seen


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_mean_error_is_left_after_any_step(scheduler: str) -> None:
    tiny = pixart(scheduler)
    quantized = twin(tiny.model, bent)
    tac = fitted(tiny, quantized, batch_size=2)
    law, seen = errors_with(tiny, quantized, tac)
    assert tac.gain is not None and tac.bias is not None
    steps = range(law.steps)
    assert tac.bias.shape == (law.steps, 4, 16, 16) and tac.gain.shape == (law.steps, 4)
    assert all(seen.mean[k] < 1e-6 * seen.scale for k in steps if not law.intermediate[k])
    assert all((tac.bias[k] == 0).all() == bool(law.intermediate[k]) for k in steps)
    assert all(bool((tac.gain[k] != 1).all()) for k in steps)
    assert all(
        ("intermediate" in n) == bool(law.intermediate[k])
        for k, n in enumerate(tac.plan(law).explanations)
    )
    _, bare = errors_with(tiny, quantized, None)
    assert bare.mean[-1] > 100 * seen.mean[-1] and bare.size[-1] > seen.size[-1] > 1e-3


def test_the_bias_of_the_output_is_the_mean_error_of_every_output() -> None:
    tiny = pixart()
    quantized = twin(tiny.model, bent)
    tac = fitted(tiny, quantized, reconstruction=None, bias_of_the_output=True)
    errors: list[Tensor] = []

    class Outputs(Rule):
        """Mean error of the outputs along the corrected run."""

        def output(self, step: int, pairs: Any, layout: Any, law: Any) -> None:
            errors.append(torch.cat([p.output - p.reference_output for p in pairs]).mean(0))

    c = common(tiny)
    run = Run(
        tiny.pipe,
        c["prompts"],
        STEPS,
        guidance_scale=c["guidance_scale"],
        batch_size=4,
        call=c["call"],
        quantized=quantized,
    )
    law = run_closed_loop(run, Outputs(), correction=tac, progress=False).law
    assert tac.bias is not None and tac.gain is None
    weights = torch.as_tensor(law.output_weights).diagonal().float()
    for k, error in enumerate(errors):
        assert torch.allclose(tac.bias[k], weights[k] * error, atol=1e-5)
    assert float(errors[0].abs().max()) > 1e-3
    with pytest.raises(CalibrationError, match="without memory"):
        fitted(pixart("plms"), quantized, reconstruction=None, bias_of_the_output=True)


def test_two_stage_and_pseudo_linear_solvers_have_intermediate_steps() -> None:
    """Or the test above would not see them."""
    assert law_of(4, "2s").intermediate.any() and law_of(4, "plms").intermediate.any()


def test_all_prompts_count_alike_whatever_the_batch() -> None:
    tiny = pixart()
    quantized = twin(tiny.model, bent)
    whole, halves, uneven = (fitted(tiny, quantized, n=8, batch_size=b) for b in (8, 4, 3))
    for parts in (halves, uneven):
        assert torch.allclose(parts.gain, whole.gain, atol=1e-6)  # type: ignore[arg-type]
        assert torch.allclose(parts.bias, whole.bias, atol=1e-5)  # type: ignore[arg-type]
    fewer = fitted(tiny, quantized, n=6, batch_size=6)
    assert not torch.allclose(fewer.bias, whole.bias, atol=1e-4)  # type: ignore[arg-type]


def test_a_known_gain_is_found_and_undone() -> None:
    tiny = pixart()
    quantized = twin(tiny.model, lambda m: m / 1.1)
    tac = fitted(tiny, quantized, reconstruction=Reconstruction(lambda_2=0.0), input_bias=False)
    assert tac.gain is not None and tac.bias is None and tac.name == "tac-ner"
    assert torch.allclose(tac.gain, torch.full_like(tac.gain, 1.1), atol=1e-5)
    assert errors_with(tiny, quantized, tac)[1].size[-1] < 1e-4
    held = fitted(
        tiny,
        quantized,
        reconstruction=Reconstruction.least_squares(lambda_2=100.0),
        input_bias=False,
    ).gain
    assert held is not None and bool((held < 1.01).all())


def test_gain_is_applied_as_far_as_it_is_limited() -> None:
    tiny = pixart()
    quantized = twin(tiny.model, lambda m: 0.4 * m)
    tac = fitted(tiny, quantized, reconstruction=Reconstruction(lambda_2=0.0))
    assert tac.gain is not None and torch.allclose(tac.gain[0], torch.full_like(tac.gain[0], 2.5))
    seen = errors_with(tiny, quantized, tac)[1]
    assert max(seen.mean) < 1e-6 * seen.scale  # B was measured below K = 1.5


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_twins_of_one_function_need_nothing(scheduler: str) -> None:
    tiny = pixart(scheduler)
    tac = fitted(tiny, twin(tiny.model, lambda m: m))
    assert tac.gain is not None and bool((tac.gain == 1).all())
    assert tac.bias is not None and not bool(tac.bias.any())


@pytest.mark.parametrize("name", ["pixart_sigma", "flux", "dit"])
def test_bias_per_channel_is_the_channels_mean(name: str) -> None:
    tiny = ALL[name]()
    quantized = twin(tiny.model, bent)
    per_element, per_channel = (
        fitted(tiny, quantized, reconstruction=None, input_bias_per_channel=p)
        for p in (False, True)
    )
    assert per_channel.gain is None and per_channel.name == "tac-ibc"
    a, b = per_element.bias, per_channel.bias
    assert a is not None and b is not None
    first, axis = a[0], tiny.channel_axis - 1
    others = tuple(i for i in range(first.dim()) if i != axis)
    expected = first.mean(others)  # at the first step both runs are the same
    patch = first.shape[axis] // tiny.latent_channels
    expected = expected.reshape(-1, patch).mean(1).repeat_interleave(patch)
    assert torch.allclose(b[0].flatten(), expected, atol=1e-6)
    assert b.shape[1 + axis] == first.shape[axis] and b[0].numel() == first.shape[axis]
    errors_with(tiny, quantized, per_channel)  # it can be carried out


@pytest.mark.parametrize(("name", "expected"), [("pixart_sigma", 0), ("dit", 1), ("wan", 1)])
def test_the_unconditional_branch_alone(name: str, expected: int) -> None:
    tiny = ALL[name]()
    quantized = twin(tiny.model, lambda m: m / 1.1)
    tac = fitted(
        tiny,
        quantized,
        reconstruct_unconditional=True,
        reconstruction=Reconstruction(lambda_2=0.0),
        batch_size=2,
    )
    assert tac.branch == expected
    assert tac.gain is not None and torch.allclose(tac.gain[0], torch.full_like(tac.gain[0], 1.1))
    assert tac.options["branch"] == expected
    law, seen = errors_with(tiny, quantized, tac)
    kept = [m for m, i in zip(seen.mean, law.intermediate, strict=True) if not i]
    assert kept and max(kept) < 3e-5 * seen.scale  # guidance subtracts large branches
    other = errors_with(tiny, quantized, replace(tac, branch=1 - expected))[1]
    assert other.mean[-1] > 100 * max(kept)


def test_the_unconditional_edit_arrives_with_its_share() -> None:
    """One branch wrong, one right: with the branch set right, nothing is left to correct."""
    tiny = pixart()

    def first_half(m: Tensor) -> Tensor:
        half = len(m) // 2
        return torch.cat([m[:half] / 1.1, m[half:]])

    tac = fitted(
        tiny,
        twin(tiny.model, first_half),
        reconstruct_unconditional=True,
        reconstruction=Reconstruction(lambda_2=0.0),
    )
    assert tac.gain is not None and tac.bias is not None
    assert torch.allclose(tac.gain, torch.full_like(tac.gain, 1.1), atol=1e-4)
    assert float(tac.bias.abs().max()) < 1e-4
    after = fitted(tiny, twin(tiny.model, first_half), reconstruction=Reconstruction(lambda_2=0.0))
    assert after.bias is not None and float(after.bias.abs().max()) > 1e-2


def test_no_unconditional_branch() -> None:
    tiny = pixart()
    with pytest.raises(CalibrationError, match="one guidance branch"):
        fitted(tiny, twin(tiny.model, bent), guidance_scale=1.0, reconstruct_unconditional=True)


def test_below_a_readout() -> None:
    tiny = pixart()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w4a4-g16"))[0]
    readout = fit_readout(tiny.pipe, quantized=quantized, **common(tiny))
    tac = fitted(tiny, quantized, batch_size=2, correction=readout)
    both = type(readout)(**{**vars(readout), "then": tac})
    seen = errors_with(tiny, quantized, both)[1]
    assert max(seen.mean) < 1e-6 * seen.scale
    alone = fitted(tiny, quantized, batch_size=2)
    assert not torch.equal(alone.bias, tac.bias)  # type: ignore[arg-type]
    assert "readout" in tac.source.correction  # type: ignore[attr-defined]


def test_open_loop_is_the_first_step_of_the_closed_one() -> None:
    """At the first step both see the same states; later ones differ."""
    tiny = pixart()
    quantized = twin(tiny.model, bent)
    evidence = calibrate(tiny.pipe, quantized=quantized, **common(tiny)).evidence
    for per_channel in (True, False):
        opened = TAC.open_loop(evidence, per_channel=per_channel)
        closed = fitted(tiny, quantized, reconstruction=Reconstruction.least_squares())
        assert opened.gain is not None and closed.gain is not None and opened.bias is None
        assert opened.gain.shape == (STEPS, 4 if per_channel else 1)
        assert torch.allclose(opened.gain[0], closed.gain[0], atol=1e-5) == per_channel
        assert not torch.allclose(opened.gain[-1], closed.gain[-1], atol=1e-5)
    with pytest.raises(CalibrationError):
        TAC.open_loop(evidence, lambda_2=-1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "non-empty"),
        ({"batch_size": 0}, "batch_size"),
        ({"reconstruction": None, "input_bias": False}, "at least one part"),
        ({"reconstruction": None, "reconstruct_unconditional": True}, "at least one part"),
        ({"bias_of_the_output": True}, "pass reconstruction=None"),
    ],
)
def test_requests_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    tiny = pixart()
    with pytest.raises(CalibrationError, match=message):
        fitted(tiny, twin(tiny.model, bent), **changes)


def test_identical_twins_are_refused() -> None:
    tiny = pixart()
    with pytest.raises(CalibrationError, match="identical"):
        fitted(tiny, copy.deepcopy(tiny.model))
    with pytest.raises(CalibrationError, match="own denoiser"):
        fitted(tiny, tiny.model)


def test_another_schedule_is_refused() -> None:
    tiny = pixart()
    quantized = twin(tiny.model, bent)
    tac = fitted(tiny, quantized)
    with pytest.raises(OutOfRange):
        errors_with(tiny, quantized, tac, num_inference_steps=STEPS + 1)
