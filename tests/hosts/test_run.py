"""A run: resolved once, and what it gives."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import ALL, TinyPipeline
from torch import Tensor, nn

import evenkeel
from evenkeel.comparing.comparison import compare, standard_arms
from evenkeel.comparing.generation import generate
from evenkeel.corrections import Identity, QDrift
from evenkeel.errors import CalibrationError, UnsupportedPipeline
from evenkeel.fitting import calibrate, fit_readout
from evenkeel.hosts.pipeline import fingerprint as fingerprints
from evenkeel.hosts.pipeline.denoiser_calls import finite, one_per_prompt
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.prompts import Prompts
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import installed, plain_class
from evenkeel.hosts.scheduler.tape import Recorder, Tape
from evenkeel.quantizers import QuantizerSpec, quantize_module

STEPS = 3
CALL = {"output_type": "pt"}  # DiT knows no latent output


@pytest.fixture(scope="module")
def dit() -> TinyPipeline:
    return ALL["dit"]()


@pytest.fixture(scope="module")
def twin(dit: TinyPipeline) -> nn.Module:
    return quantize_module(dit.model, QuantizerSpec.parse("w3a4-g8"))[0]


def made(dit: TinyPipeline, prompts: Any = (3, 7, 3, 7, 3), **options: Any) -> Run:
    return Run(dit.pipe, prompts, STEPS, **{"call": CALL, **options})


# ---- what it is asked for


@pytest.mark.parametrize(
    ("parameters", "values", "expected"),
    [
        ({"prompt", "generator"}, ("a", 7), {"prompt": ["a", "7"]}),
        ({"class_labels"}, (3, "7"), {"class_labels": [3, 7]}),
        ({"batch_size"}, (1, 2, 3), {"batch_size": 3}),
        ({"image"}, (1, 2, 3), {}),
    ],
)
def test_prompts_become_the_arguments_that_a_pipeline_takes(
    parameters: set[str], values: Any, expected: dict[str, Any]
) -> None:
    assert Prompts.of(values).arguments(dict.fromkeys(parameters)) == expected


def test_batches_cover_every_prompt_once_each_with_its_own_seed(dit: TinyPipeline) -> None:
    batches = made(dit, batch_size=2, seed=10).batches()
    assert [b.prompts.values for b in batches] == [(3, 7), (3, 7), (3,)]
    assert [list(b.seeds) for b in batches] == [[10, 11], [12, 13], [14]]
    assert [list(b.span) for b in batches] == [[0, 1], [2, 3], [4]]
    assert batches[1].alone == Batch(Prompts((3,)), 2, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "non-empty list"),
        ({"prompts": "a cat"}, "non-empty list"),
        ({"batch_size": 0}, "at least 1"),
        ({"prompts": [3, 5000]}, "5000 is no class .* 0 to"),
        ({"prompts": [-1]}, "-1 is no class"),
        ({"prompts": ["3", "a cat"]}, "'a cat' is no class"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    dit: TinyPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        made(dit, **options)


def test_the_own_denoiser_is_no_twin_of_itself(dit: TinyPipeline) -> None:
    with pytest.raises(CalibrationError, match="own denoiser object"):
        made(dit, quantized=dit.model)
    with pytest.raises(CalibrationError, match="no quantized denoiser"):
        _ = made(dit).pair
    with pytest.raises(UnsupportedPipeline, match="no component"):
        Run(object(), ["a"], STEPS)


# ---- what is resolved once


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the weights of each module were read for a fingerprint."""
    counts: Counter[int] = Counter()
    inner = fingerprints.stored_tensors

    def counted(module: nn.Module, **how: Any) -> Any:
        counts[id(module)] += 1
        return inner(module, **how)

    monkeypatch.setattr(fingerprints, "stored_tensors", counted)
    return counts


def test_fingerprints_are_remembered_for_a_module_compiled_or_not(
    dit: TinyPipeline, twin: nn.Module, looked_at: Counter[int]
) -> None:
    run = made(dit, quantized=twin)
    assert run.twins == run.twins == (run.fingerprint(dit.model), run.fingerprint(twin))
    assert run.fingerprint(torch.compile(twin, backend="eager")) == run.twins[1]
    looked_at.pop(id(dit.pipe.vae), None)
    assert looked_at == {id(dit.model): 1, id(twin): 1}
    assert run.twins == (fingerprint(dit.model), fingerprint(twin))


def test_calibrating_with_closed_loops_fingerprints_each_denoiser_once(
    dit: TinyPipeline, twin: nn.Module, looked_at: Counter[int], tmp_path: Path
) -> None:
    record = calibrate(
        dit.pipe,
        quantized=twin,
        prompts=[3, 7],
        num_inference_steps=STEPS,
        batch_size=1,
        call=CALL,
        closed_loop=True,
        resume=tmp_path,
        progress=False,
    )
    looked_at.pop(id(dit.pipe.vae), None)
    assert looked_at == {id(dit.model): 1, id(twin): 1}
    tac = record.closed_loop.corrections["tac"]
    assert tac.made_for is not None
    assert replace(tac.made_for, trajectory="full-precision") == record.provenance


def test_comparing_fingerprints_each_denoiser_once(
    dit: TinyPipeline, twin: nn.Module, looked_at: Counter[int], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"prompts": [3, 7], "num_inference_steps": STEPS, "progress": False}
    record = calibrate(dit.pipe, quantized=twin, **asked)
    looked_at.clear()
    two = {"drift": QDrift(record.evidence), "other": QDrift(record.evidence, strength=2.0)}
    compare(dit.pipe, standard_arms(dit.pipe, twin, two), folder=tmp_path, batch_size=1, **asked)
    looked_at.pop(id(dit.pipe.vae), None)
    assert looked_at == {id(dit.model): 1, id(twin): 1}


def test_the_guidance_scale_of_the_pipeline_stands_for_none(dit: TinyPipeline) -> None:
    assert made(dit).guidance_scale == 4.0
    assert made(dit, guidance_scale=2.5).guidance_scale == 2.5


def test_identity_says_everything_that_is_asked_but_prompts(dit: TinyPipeline) -> None:
    run = made(dit)
    assert run.identity == made(dit, prompts=[7], seed=3, batch_size=1).identity
    for change in ({"guidance_scale": 2.0}, {"call": {}}):
        assert made(dit, **change).identity != run.identity
    assert Run(dit.pipe, [3], STEPS + 1, call=CALL).identity != run.identity


# ---- sampling


def test_a_call_is_the_plain_call_of_the_pipeline(dit: TinyPipeline) -> None:
    run = made(dit, seed=5, batch_size=2)
    plain = dit.pipe(
        class_labels=[3, 7],
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(s) for s in (7, 8)],
        return_dict=False,
        **CALL,
    )[0]
    with run.undisturbed():
        assert torch.equal(run.sample(run.batches()[1]), plain)


class Sees(Recorder):
    """Also says whether it holds the denoiser."""

    held = False

    def attach(self) -> None:
        self.held = True

    def detach(self) -> None:
        self.held = False


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_undisturbed_stretch_puts_everything_back(
    dit: TinyPipeline, twin: nn.Module, error: type[BaseException] | None
) -> None:
    pipe, scheduler, reference = dit.pipe, dit.pipe.scheduler, dit.model
    bars = dict(pipe._progress_bar_config)
    run = made(dit, prompts=[3, 7])
    evenkeel.apply(pipe, Identity())
    before = installed(scheduler)
    sees = Sees(Tape())
    with pytest.raises(error) if error else nullcontext(), run.undisturbed(twin, sees):
        assert getattr(pipe, dit.denoiser) is twin and installed(scheduler) == [sees]
        assert pipe._progress_bar_config["disable"]
        assert sees.held
        if error is not None:
            raise error
    assert not sees.held
    assert pipe.scheduler is scheduler and installed(scheduler) == before
    assert dit.model is reference and dict(pipe._progress_bar_config) == bars
    evenkeel.remove(pipe)
    assert type(scheduler) is plain_class(scheduler)
    assert not reference._forward_pre_hooks and not reference._forward_hooks


def test_a_readout_that_is_applied_is_set_aside_and_comes_back() -> None:
    tiny = ALL["pixart_sigma"]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g8"))[0]
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    asked: dict[str, Any] = {"prompts": ["a", "b"], "num_inference_steps": STEPS, "call": call}
    readout = fit_readout(tiny.pipe, quantized=quantized, progress=False, **asked)
    setattr(tiny.pipe, tiny.denoiser, quantized)
    run = Run(tiny.pipe, ["c"], STEPS, call=call)
    (batch,) = run.batches()

    def sampled() -> Tensor:
        found: Tensor = run.sample(batch)
        return found

    plain = sampled()
    evenkeel.apply(tiny.pipe, readout)
    corrected = sampled()
    assert not torch.equal(corrected, plain)
    with run.undisturbed():
        assert torch.equal(sampled(), plain)
    assert torch.equal(sampled(), corrected)
    evenkeel.remove(tiny.pipe)
    assert torch.equal(sampled(), plain)


def test_images_of_an_arm_are_its_own_whatever_is_applied(
    dit: TinyPipeline, twin: nn.Module
) -> None:
    full, quantized, _ = arms = standard_arms(dit.pipe, twin, [Identity()])
    run = Run(dit.pipe, [3], STEPS)
    first = [generate(run, arm)[0] for arm in arms]
    record = calibrate(
        dit.pipe, quantized=twin, prompts=[3, 7], num_inference_steps=STEPS, progress=False
    )
    strong = QDrift(record.evidence, strength=100.0, min_explained=0.0)
    with evenkeel.applied(dit.pipe, strong, allow=("denoiser",)):
        for arm, images in zip((full, quantized), first, strict=False):
            assert torch.equal(generate(run, arm)[0], images)
        assert evenkeel.summary(dit.pipe).correction == strong.name
    assert evenkeel.summary(dit.pipe).correction is None


@pytest.mark.parametrize("name", ALL)
def test_the_law_is_that_of_the_calls_and_asks_the_denoiser_once(name: str) -> None:
    tiny = ALL[name]()
    call = {k: v for k, v in tiny.call.items() if k != "output_type" or name == "dit"}
    prompts = [*tiny.prompts][:1]
    run = Run(tiny.pipe, prompts, STEPS, guidance_scale=tiny.guidance_scale, call=call)
    state = {n: t.clone() for n, t in tiny.model.state_dict().items()}
    tape, asked = Tape(), []
    forward = type(tiny.model).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(tiny.model), "forward", lambda *a, **k: (asked.append(1), forward(*a, **k))[1]
        )
        law = run.law()
        assert len(asked) == 1
        with run.undisturbed(None, Recorder(tape)):
            run.sample(run.batches()[0])
        assert len(asked) > STEPS
    assert tape.law is not None
    exact = tape.law.until(len(tape.samples))
    for field in fields(law):
        assert np.array_equal(getattr(law, field.name), getattr(exact, field.name)), field.name
    assert tiny.pipe.components[tiny.denoiser] is tiny.model and "forward" not in vars(tiny.model)
    assert all(torch.equal(state[n], t) for n, t in tiny.model.state_dict().items())


def test_the_law_of_a_pipeline_that_accelerate_moves_is_read_off_its_own_denoiser() -> None:
    tiny, asked = ALL["dit"](), []
    tiny.model.register_forward_hook(lambda *_: asked.append(1))
    tiny.pipe.enable_model_cpu_offload(device="cpu")
    law = made(tiny).law()
    assert len(asked) == STEPS == law.steps


def test_twins_take_turns_on_the_device(dit: TinyPipeline, twin: nn.Module) -> None:
    moved: list[tuple[str, str]] = []

    class Moves(nn.Module):
        def __init__(self, label: str) -> None:
            super().__init__()
            self.label = label

        def to(self, device: Any) -> Any:
            moved.append((self.label, str(device)))

    run = made(dit, quantized=twin, side_by_side=False)
    run.denoiser, run.quantized = Moves("full"), Moves("quantized")
    run.place(run.denoiser)
    run.place(run.quantized)
    assert moved == [("quantized", "cpu"), ("full", "cpu"), ("full", "cpu"), ("quantized", "cpu")]
    run.side_by_side = True
    run.place(run.denoiser)
    assert len(moved) == 4


# ---- what the scheduler is handed


def test_doubled_rows_are_counted_once_and_other_numbers_refused() -> None:
    rows = torch.arange(8.0).reshape(4, 2)
    assert torch.equal(one_per_prompt(rows, 4), rows)
    assert torch.equal(one_per_prompt(torch.cat([rows, rows]), 4), rows)
    with pytest.raises(CalibrationError, match=r"8 samples for 4 prompts.*num_images_per_prompt=1"):
        one_per_prompt(torch.cat([rows, rows + 1]), 4)


def test_what_is_not_finite_is_named_with_its_step() -> None:
    finite(torch.ones(2), "quantized", 3).now()
    with pytest.raises(CalibrationError, match=r"the quantized denoiser .* step 3; float16"):
        finite(torch.tensor([1.0, float("inf")]), "quantized", 3).now()
