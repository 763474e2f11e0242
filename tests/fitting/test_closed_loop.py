"""Two runs of every batch in lock-step: same noise, two evaluations per step, gone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import pytest
import torch
from changed_denoisers import twin
from tiny_pipelines import ALL, TinyPipeline
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.fitting import fit_readout
from evenkeel.fitting.closed_loop import paused_call
from evenkeel.fitting.closed_loop.loop import LoopResult, Pair, Rule, run_closed_loop
from evenkeel.hosts.actuators.correcting import heads_attached, interceptors_of
from evenkeel.hosts.pipeline.pipelines import denoiser_swapped, run_pipeline
from evenkeel.hosts.run import Run
from evenkeel.hosts.scheduler.interception import install, installed, plain_class, uninstall
from evenkeel.hosts.scheduler.tape import Recorder, Tape
from evenkeel.quantizers import QuantizerSpec, quantize_module

pytestmark = pytest.mark.usefixtures("no_thread_survives")
STEPS = 3
PLAIN = {"beta_schedule": "linear"}
SCHEDULERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "ddim": (lambda: d.DDIMScheduler(clip_sample=False, **PLAIN), {}),
    "ddim, eta 1": (lambda: d.DDIMScheduler(clip_sample=False, **PLAIN), {"eta": 1.0}),
    "ddpm": (lambda: d.DDPMScheduler(clip_sample=False, **PLAIN), {}),
    "euler ancestral": (lambda: d.EulerAncestralDiscreteScheduler(**PLAIN), {}),
    "plms": (lambda: d.PNDMScheduler(skip_prk_steps=True, **PLAIN), {}),
    "2s": (lambda: d.DPMSolverSinglestepScheduler(solver_order=2, **PLAIN), {}),
}


def pixart(scheduler: str = "ddim") -> tuple[TinyPipeline, dict[str, Any]]:
    build, call = SCHEDULERS[scheduler]
    tiny = ALL["pixart_sigma"]()
    tiny.pipe.scheduler = build()
    return tiny, call


def prompts_of(tiny: TinyPipeline, n: int) -> list[Any]:
    return [i if isinstance(tiny.prompts[0], int) else f"prompt number {i}" for i in range(n)]


def looped(
    tiny: TinyPipeline, quantized: Any, rule: Rule, n: int = 4, batch_size: int = 2, **changes: Any
) -> LoopResult:
    call = {k: v for k, v in tiny.call.items() if k != "output_type"} | changes.pop("call", {})
    steps = changes.pop("steps", STEPS)
    guidance = changes.pop("guidance_scale", tiny.guidance_scale)
    run = Run(
        tiny.pipe,
        prompts_of(tiny, n),
        steps,
        guidance_scale=guidance,
        batch_size=batch_size,
        call=call,
        quantized=quantized,
    )
    return run_closed_loop(run, rule, progress=False, **changes)


class Observer(Rule):
    """Keeps everything, changes nothing."""

    def __init__(self) -> None:
        self.pairs: list[list[Pair]] = []
        self.results: list[list[tuple[Tensor, Tensor]]] = []

    def output(self, step: int, pairs: list[Pair], layout: Any, law: Any) -> None:
        assert step == len(self.pairs)
        self.pairs.append(pairs)

    def state(self, step: int, results: Any, layout: Any, law: Any) -> None:
        self.results.append(results)


def recorded(tiny: TinyPipeline, denoiser: Any, prompts: list[Any], seed: int, **o: Any) -> Tape:
    """A plain run, with or without a correction."""
    tape = Tape()
    correction = o.pop("correction", None)
    below = [] if correction is None else interceptors_of(correction, tiny.pipe, denoiser)
    install(tiny.pipe.scheduler, *below, Recorder(tape))
    call = {k: v for k, v in tiny.call.items() if k != "output_type"} | o
    with denoiser_swapped(tiny.pipe, denoiser), heads_attached(below):
        run_pipeline(
            tiny.pipe,
            prompts,
            range(seed, seed + len(prompts)),
            num_inference_steps=STEPS,
            guidance_scale=tiny.guidance_scale,
            output_type="latent",
            call=call,
        )
    uninstall(tiny.pipe.scheduler)
    return tape


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_both_runs_are_the_plain_runs(scheduler: str) -> None:
    tiny, call = pixart(scheduler)
    quantized = twin(tiny.model, lambda m: 0.9 * m)
    seen = Observer()
    result = looped(tiny, quantized, seen, call=call)
    prompts = prompts_of(tiny, 4)
    for b, span in enumerate((slice(0, 2), slice(2, 4))):
        e = recorded(tiny, tiny.model, prompts[span], span.start, **call)
        q = recorded(tiny, quantized, prompts[span], span.start, **call)
        assert result.steps == len(e.results) == len(seen.pairs)
        for k, pairs in enumerate(seen.pairs):
            assert torch.equal(pairs[b].reference_sample, e.samples[k])
            assert torch.equal(pairs[b].sample, q.samples[k])
            assert torch.equal(pairs[b].reference_output, e.outputs[k])
            assert torch.equal(pairs[b].output, q.outputs[k])
            assert torch.equal(seen.results[k][b][0], e.results[k])
            assert torch.equal(seen.results[k][b][1], q.results[k])
    assert not torch.equal(e.results[-1], q.results[-1])


@pytest.mark.parametrize("scheduler", ["ddim, eta 1", "ddpm", "euler ancestral"])
def test_twins_of_one_function_share_their_noise(scheduler: str) -> None:
    tiny, call = pixart(scheduler)
    seen = Observer()
    result = looped(tiny, twin(tiny.model, lambda m: m), seen, call=call)
    assert result.law.is_stochastic
    assert all(torch.equal(e, q) for step in seen.results for e, q in step)


def test_noise_of_the_global_generator_is_matched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ALL["dit"]()  # this pipeline hands its scheduler no generator
    tiny.pipe.scheduler = SCHEDULERS["ddpm"][0]()
    quantized = twin(tiny.model, lambda m: m)
    before = torch.get_rng_state()
    seen = Observer()
    assert looped(tiny, quantized, seen, n=2).law.is_stochastic
    assert all(torch.equal(e, q) for step in seen.results for e, q in step)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(paused_call, "_seed_global_noise", lambda *_: None)
    apart = Observer()
    looped(tiny, quantized, apart, n=2)
    assert not any(torch.equal(e, q) for e, q in apart.results[0])


@pytest.mark.parametrize(
    ("name", "unconditional", "scale"), [("pixart_sigma", 0, 4.5), ("dit", 1, 4.0), ("wan", 1, 5.0)]
)
def test_branches_and_their_shares(name: str, unconditional: int, scale: float) -> None:
    tiny = ALL[name]()
    seen = Observer()
    result = looped(tiny, twin(tiny.model, lambda m: 0.9 * m), seen, n=2, steps=2)
    for pair in (p for step in seen.pairs for p in step):
        shares = pair.shares.now()
        assert shares is not None
        assert shares[unconditional] == pytest.approx(1 - scale, abs=1e-3)
        assert shares[1 - unconditional] == pytest.approx(scale, abs=1e-3)
        parts = ((pair.reference_branches, pair.reference_output), (pair.branches, pair.output))
        for branches, output in parts:
            guided = sum(float(s) * b for s, b in zip(shares, branches, strict=True))
            assert torch.allclose(guided, output, atol=1e-4)
            assert len(output) == 2
    assert result.sample.shape == seen.pairs[0][0].sample.shape


class Replace(Observer):
    """Replaces outputs and states; synchronizes at one step."""

    def __init__(self, synchronized: int) -> None:
        super().__init__()
        self.synchronized = synchronized

    def output(self, step: int, pairs: list[Pair], layout: Any, law: Any) -> Any:
        super().output(step, pairs, layout, law)
        return None, [p.reference_output + 0.1 * p.sample for p in pairs]

    def state(self, step: int, results: Any, layout: Any, law: Any) -> Any:
        super().state(step, results, layout, law)
        states = [quantized + 1.0 for _, quantized in results]
        return (states if step == self.synchronized else None), states


@pytest.mark.parametrize("name", ["pixart_sigma", "dit"])
def test_replaced_outputs_and_states_are_gone_on_with(name: str) -> None:
    tiny = ALL[name]()
    seen = Replace(1)
    result = looped(tiny, twin(tiny.model, lambda m: 0.9 * m), seen)
    law = result.law
    for b in range(2):
        for k in range(STEPS - 1):
            after, entered = seen.results[k][b], seen.pairs[k + 1][b]
            assert torch.equal(entered.sample, after[1] + 1.0)
            expected = after[1] + 1.0 if k == 1 else after[0]
            assert torch.equal(entered.reference_sample, expected)
        first = seen.pairs[0][b]  # the scheduler stepped with the replaced output
        m = first.reference_output + 0.1 * first.sample
        stepped = law.sample_weights[0, 0] * first.sample + law.output_weights[0, 0] * m
        assert torch.allclose(seen.results[0][b][1], stepped, atol=1e-4)


def test_two_evaluations_per_step_and_batch() -> None:
    tiny, _ = pixart("2s")
    calls = {"reference": 0, "quantized": 0}

    def counted(name: str) -> Callable[[Tensor], Tensor]:
        def change(m: Tensor) -> Tensor:
            calls[name] += 1
            return m

        return change

    quantized = twin(tiny.model, counted("quantized"))
    tiny.pipe.transformer = twin(tiny.model, counted("reference"))
    tiny.pipe.transformer.evenkeel_quantizer = "none"
    result = looped(tiny, quantized, Replace(0), n=5, batch_size=2)
    assert calls == {"reference": 3 * result.steps, "quantized": 3 * result.steps}


@pytest.mark.parametrize("name", ["pixart_sigma", "wan"])
def test_corrections_below_act_on_every_batch(name: str) -> None:
    tiny = ALL[name]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w4a4-g16"))[0]
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    readout = fit_readout(
        tiny.pipe,
        quantized=quantized,
        prompts=prompts_of(tiny, 4),
        num_inference_steps=STEPS,
        guidance_scale=tiny.guidance_scale,
        call=call,
        progress=False,
    )
    assert not readout.table.is_identity
    weights = {n: t.clone() for n, t in quantized.state_dict().items()}
    seen = Observer()
    looped(tiny, quantized, seen, correction=readout)
    bare = recorded(tiny, quantized, prompts_of(tiny, 4)[2:], 2)
    for b, span in enumerate((slice(0, 2), slice(2, 4))):
        q = recorded(tiny, quantized, prompts_of(tiny, 4)[span], span.start, correction=readout)
        for k in range(STEPS):
            assert torch.equal(seen.pairs[k][b].output, q.outputs[k])
            assert torch.equal(seen.results[k][b][1], q.results[k])
    assert any(not torch.equal(*pair) for pair in zip(q.outputs, bare.outputs, strict=True))
    assert all(torch.equal(t, weights[n]) for n, t in quantized.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in quantized.modules())


class Interrupt(Rule):
    def output(self, step: int, pairs: list[Pair], layout: Any, law: Any) -> None:
        if step == 1:
            raise KeyboardInterrupt


def broken(at: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Behaves until its call number ``at``."""
    calls = iter(range(10_000))

    def forward(m: Tensor) -> Tensor:
        return m if next(calls) < at else change(m)

    return forward


def fail(m: Tensor) -> Tensor:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("rule", "change", "error"),
    [
        (Interrupt(), lambda m: m, KeyboardInterrupt),
        (Rule(), broken(3, fail), RuntimeError),
        (Rule(), broken(2, lambda m: m * float("nan")), CalibrationError),
    ],
    ids=["interrupt", "error", "nan"],
)
def test_ends_without_a_trace(rule: Rule, change: Any, error: type[BaseException]) -> None:
    tiny, _ = pixart()
    scheduler, model = tiny.pipe.scheduler, tiny.model
    attributes = set(vars(scheduler))
    quantized = twin(model, change)
    with pytest.raises(error):
        looped(tiny, quantized, rule)
    assert tiny.pipe.scheduler is scheduler and tiny.pipe.transformer is model
    assert type(scheduler) is plain_class(scheduler) and installed(scheduler) == []
    assert set(vars(scheduler)) == attributes
    assert not model._forward_hooks and not quantized._forward_hooks
    looped(tiny, twin(model, lambda m: 0.9 * m), Rule())


def test_non_finite_outputs_are_named_with_their_step() -> None:
    tiny, _ = pixart()
    for_two_batches = broken(2, lambda m: m * float("nan"))
    with pytest.raises(CalibrationError, match=r"quantized denoiser .* at step 1"):
        looped(tiny, twin(tiny.model, for_two_batches), Rule())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n": 0}, "non-empty list"), ({"batch_size": 0}, "at least 1")],
)
def test_requests_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    tiny, _ = pixart()
    with pytest.raises(CalibrationError, match=message):
        looped(tiny, twin(tiny.model, lambda m: 0.9 * m), Rule(), **changes)


def test_half_precision_states_are_changed_in_single_precision() -> None:
    tiny, _ = pixart()
    tiny.pipe.to(torch.bfloat16)
    seen = Replace(99)
    looped(tiny, twin(tiny.model, lambda m: 0.9 * m), seen)
    assert seen.results[0][0][1].dtype == torch.float32
    assert seen.results[0][0][0].dtype == torch.bfloat16
    entered = seen.pairs[1][0].sample
    assert torch.equal(entered, (seen.results[0][0][1] + 1.0).bfloat16().float())
