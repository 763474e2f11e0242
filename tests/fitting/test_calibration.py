"""Calibration as a user meets it: eight real pipelines, interruptions, several processes, errors."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel.corrections import Identity, QDrift
from evenkeel.errors import CalibrationError, Incompatible, StorageError, UnsupportedPipeline
from evenkeel.fitting import calibrate
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.layouts import LatentLayout, find_layout
from evenkeel.hosts.pipeline.pipelines import denoiser_name
from evenkeel.hosts.processes import Processes
from evenkeel.hosts.scheduler.interception import installed, plain_class
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.record import Record, prompt_key
from evenkeel.statistics.histogram import Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.storage import json_safe

SPEC = QuantizerSpec.parse("w3a4-g8")
LABELS = [3, 7, 3, 7, 3]  # the same label from other noise is another prompt


def quantized_twin(tiny: TinyPipeline) -> nn.Module:
    return quantize_module(tiny.model, SPEC)[0]


def measure(tiny: TinyPipeline, quantized: nn.Module, **changes: Any) -> Record:
    options: dict[str, Any] = {
        "prompts": list(tiny.prompts),
        "num_inference_steps": 3,
        "guidance_scale": tiny.guidance_scale,
        "call": tiny.call,
        "progress": False,
        **changes,
    }
    return calibrate(tiny.pipe, quantized=quantized, **options)


def tensors_of(record: Record) -> dict[str, Tensor]:
    found = {f.name: getattr(record.moments, f.name) for f in fields(PairedMoments)}
    found |= {f"frame.{f.name}": getattr(record.frame, f.name) for f in fields(Frame)}
    names = ("prompt_keys", "seeds", "gram", "noise_floor", "spectrum")
    found |= {n: getattr(record, n) for n in names}
    sums = None if record.histogram is None else record.histogram.sums
    return {n: t for n, t in (found | {"histogram": sums}).items() if t is not None}


def differing(a: Record, b: Record) -> list[str]:
    """What is not equal to the bit."""
    left, right = tensors_of(a), tensors_of(b)
    names = sorted(left.keys() ^ right.keys())
    names += [n for n in left.keys() & right.keys() if not torch.equal(left[n], right[n])]
    return names + [n for n in ("provenance",) if getattr(a, n) != getattr(b, n)]


@contextlib.contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The latents that enter ``module`` inside the block."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@contextlib.contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def denoiser_in_place(tiny: TinyPipeline, module: nn.Module) -> Iterator[None]:
    original = tiny.model
    setattr(tiny.pipe, tiny.denoiser, module)
    yield
    setattr(tiny.pipe, tiny.denoiser, original)


# ---- the whole way, on every pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_calibrate_save_load_apply_sample_remove(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny = ALL[name]()
    tiny.pipe.to(dtype)
    quantized = quantized_twin(tiny)
    record = measure(tiny, quantized)
    loaded = Record.load(record.save(tmp_path / "record.safetensors"))
    assert differing(loaded, record) == []

    assert record.moments.count.shape == (2, 3, 4)
    latents = torch.float32 if name in ("sana", "wan") else dtype  # these two keep them wide
    assert f"torch.{record.provenance.dtype}" == str(latents)
    layout = LatentLayout(**record.provenance.layout)
    assert (layout.axis, layout.channels) == (tiny.channel_axis, tiny.latent_channels)
    assert layout.patch == {"flux": 4}.get(name, 1)
    per_prompt = torch.Size(record.provenance.latent_shape).numel()
    assert record.moments.count.unique().tolist() == [per_prompt // 4]
    assert (record.evidence.by_channel.dd > 0).any(1).all()
    assert (record.noise_floor == 0).all()

    with denoiser_in_place(tiny, quantized):
        before = generate(tiny, steps=3)
        evenkeel.apply(tiny.pipe, QDrift(loaded.evidence, strength=100.0, min_explained=0.0))
        corrected = generate(tiny, steps=3)
        plan = evenkeel.summary(tiny.pipe).plan
        evenkeel.remove(tiny.pipe)
        after = generate(tiny, steps=3)
    assert torch.isfinite(corrected).all()
    assert (corrected.dtype, corrected.shape) == (before.dtype, before.shape)
    assert plan is not None
    assert plan.is_identity == (name == "wan")  # UniPC is left alone
    assert torch.equal(corrected, before) == plan.is_identity
    assert torch.equal(after, before)


@pytest.fixture(scope="module")
def dit() -> TinyPipeline:
    """The fastest one: class labels and no text encoder."""
    return ALL["dit"]()


@pytest.fixture(scope="module")
def twin(dit: TinyPipeline) -> nn.Module:
    return quantized_twin(dit)


@pytest.fixture(scope="module")
def record(dit: TinyPipeline, twin: nn.Module) -> Record:
    return distributed_record(dit, twin)


def distributed_record(tiny: TinyPipeline, quantized: nn.Module, **options: Any) -> Record:
    """Five prompts in three batches; the same call for one process, several, and after a kill."""
    return measure(tiny, quantized, prompts=LABELS, batch_size=2, seed=10, **options)


# ---- what is measured


def test_captured_outputs_are_the_guidance_combination_computed_by_hand() -> None:
    tiny = ALL["sd3"]()
    quantized, scale, steps = quantized_twin(tiny), 5.0, 3
    raw: dict[str, list[Tensor]] = {"e": [], "q": []}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: raw[name].append(output[0].clone())

    with (
        hooked(tiny.model, keep("e")),
        hooked(quantized, keep("q")),
        inputs_of(quantized) as states,
    ):
        record = measure(tiny, quantized, guidance_scale=scale)
    guided = {}
    for name, outputs in raw.items():
        halves = [output.chunk(2) for output in outputs[:steps]]
        combined = [empty + scale * (text - empty) for empty, text in halves]
        guided[name] = torch.stack(combined, 1).flatten(3)
    x = torch.stack([state.chunk(2)[0] for state in states[:steps]], 1).flatten(3)
    by_hand = PairedMoments.of(guided["e"], guided["q"].double() - guided["e"].double(), x)
    for f in fields(PairedMoments):
        found, wanted = getattr(record.moments, f.name), getattr(by_hand, f.name)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=f.name)
    text_only = torch.stack([output.chunk(2)[1] for output in raw["e"][:steps]], 1).flatten(3)
    assert (record.moments.mean_e - text_only.mean(-1)).abs().max() > 1e-3


@pytest.mark.parametrize("trajectory", ["full-precision", "quantized", "corrected"])
def test_both_runs_go_through_the_states_of_the_chosen_one(
    dit: TinyPipeline, twin: nn.Module, record: Record, trajectory: str
) -> None:
    correction = QDrift(record.evidence, strength=100.0, min_explained=0.0)
    chosen = {"corrected": correction}.get(trajectory)
    with inputs_of(dit.model) as for_reference, inputs_of(twin) as for_quantized:
        made = measure(dit, twin, trajectory=trajectory, correction=chosen)
    assert made.provenance.trajectory == trajectory
    for a, b in zip(for_reference[:3], for_quantized[:3], strict=True):
        assert torch.equal(a, b)

    free: dict[str, list[Tensor]] = {}
    with inputs_of(dit.model) as free["full-precision"]:
        generate(dit, steps=3, seeds=(0, 1))
    with denoiser_in_place(dit, twin), inputs_of(twin) as seen:
        generate(dit, steps=3, seeds=(0, 1))
        with evenkeel.applied(dit.pipe, correction):
            generate(dit, steps=3, seeds=(0, 1))
    free["quantized"], free["corrected"] = seen[:3], seen[3:]
    same = {name: torch.equal(states[2], for_quantized[2]) for name, states in free.items()}
    assert same == {name: name == trajectory for name in free}


def test_noised_states_hold_the_result_and_fresh_noise_of_every_level(
    dit: TinyPipeline, twin: nn.Module
) -> None:
    with inputs_of(dit.model) as for_reference, inputs_of(twin) as for_quantized:
        made = measure(dit, twin, trajectory="noised")
    law, led, noised = made.law, for_reference[:3], for_reference[3:6]
    assert law is not None and made.provenance.trajectory == "noised"
    for a, b in zip(noised, for_quantized[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(led[0], noised[0]) and not torch.equal(led[2], noised[2])
    rows = len(noised[0]) // 2  # both branches of guidance see the same state
    assert torch.equal(noised[2][:rows], noised[2][rows:])
    # x_1 and x_2 hold the same x_0: without it, what is left is white, of unit variance, and new each step.
    a, s = law.alpha, law.sigma
    both = float(s[1] / a[1]) ** 2 + float(s[2] / a[2]) ** 2
    left = (noised[1] / float(a[1]) - noised[2] / float(a[2]))[:rows] / both**0.5
    assert left.std().item() == pytest.approx(1.0, abs=0.1) and abs(left.mean().item()) < 0.1
    one, two = (measure(dit, twin, trajectory="noised", batch_size=n) for n in (1, 2))
    assert torch.allclose(one.moments.mean_e, two.moments.mean_e, atol=1e-4)


def test_prompt_i_starts_from_seed_plus_i_whatever_the_batch_size(
    dit: TinyPipeline, twin: nn.Module
) -> None:
    one, two = (measure(dit, twin, prompts=LABELS[:4], batch_size=n, seed=5) for n in (1, 2))
    assert one.seeds.tolist() == two.seeds.tolist() == [5, 6, 7, 8]
    assert torch.equal(one.prompt_keys, torch.stack([prompt_key(str(p)) for p in LABELS[:4]]))
    first, second = (r.moments.s(0, 2) / r.moments.count for r in (one, two))
    torch.testing.assert_close(first, second, rtol=0.02, atol=1e-6)
    # The same label from another seed is told apart by more than that.
    assert ((first[0] - first[2]).abs() > 0.02 * first[0]).any()


def test_parts_calibrated_with_one_pilot_merge_to_the_whole_to_the_bit(
    dit: TinyPipeline, twin: nn.Module, record: Record
) -> None:
    first = measure(dit, twin, prompts=LABELS[:2], batch_size=2, seed=10)
    rest = measure(dit, twin, prompts=LABELS[2:], batch_size=2, seed=12, pilot=first)
    assert differing(rest.merge(first), record) == []
    unpiloted = measure(dit, twin, prompts=LABELS[2:], batch_size=2, seed=12)
    with pytest.raises(Incompatible, match="pilot"):
        first.merge(unpiloted)


def test_provenance_says_what_was_measured(
    dit: TinyPipeline, twin: nn.Module, record: Record
) -> None:
    found = record.provenance
    assert (found.pipeline_class, found.denoiser) == ("DiTPipeline", "transformer")
    assert (found.scheduler_class, found.prediction) == ("DDIMScheduler", "epsilon")
    assert (found.reference, found.quantized) == (fingerprint(dit.model), fingerprint(twin))
    assert found.quantizer == str(SPEC)
    assert found.guidance_scale == dit.guidance_scale and found.num_inference_steps == 3
    assert found.timesteps == sorted(found.timesteps, reverse=True)
    assert found.scheduler_config["beta_schedule"] == "linear"


def test_the_default_guidance_scale_is_written_down(dit: TinyPipeline, twin: nn.Module) -> None:
    assert measure(dit, twin, guidance_scale=None).provenance.guidance_scale == 4.0


def test_histograms_can_be_left_out_and_the_twins_moved_around(
    dit: TinyPipeline, twin: nn.Module
) -> None:
    plain = measure(dit, twin)
    assert measure(dit, twin, histograms=False).histogram is None
    assert differing(measure(dit, twin, side_by_side=False), plain) == []


# ---- interruption


def killed_run(folder: str) -> None:
    """In a child process: dies without any warning in the third batch."""
    tiny = ALL["dit"]()
    quantized, calls = quantized_twin(tiny), itertools.count()

    def die(*_: Any) -> None:
        if next(calls) == 2 * 3 + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    with hooked(quantized, die):
        distributed_record(tiny, quantized, resume=folder)


def worker(folder: str, out: str) -> None:
    """Under torchrun: calibrate together and save what this process got."""
    torch.set_num_threads(1)
    tiny = ALL["dit"]()
    record = distributed_record(tiny, quantized_twin(tiny), resume=folder)
    record.save(f"{out}-{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()


def child(tmp_path: Path, *launcher: str, code: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "child.py"
    script.write_text(f"import test_calibration as t\n{code}\n")
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]
    path = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launcher, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_after_kill_9_the_same_call_gives_the_record_of_an_uninterrupted_run(
    dit: TinyPipeline, twin: nn.Module, record: Record, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    died = child(tmp_path, code=f"t.killed_run({str(folder)!r})")
    assert died.returncode == -signal.SIGKILL, died.stderr
    finished = sorted(p.name for p in folder.glob("part-*"))
    assert finished == ["part-00000.safetensors", "part-00001.safetensors"]
    with inputs_of(twin) as calls:
        resumed = distributed_record(dit, twin, resume=folder)
    assert len(calls) == 3  # one batch of three steps: the finished ones were not run again
    assert differing(resumed, record) == []
    assert not folder.exists()


@pytest.mark.slow
def test_two_processes_give_the_record_of_one_to_the_bit(record: Record, tmp_path: Path) -> None:
    folder, out = str(tmp_path / "parts"), str(tmp_path / "record")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = child(tmp_path, *launcher, code=f"t.worker({folder!r}, {out!r})")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert differing(Record.load(f"{out}-{rank}"), record) == []
    assert not Path(folder).exists()


class _Stop(Exception):
    pass


def stopping(module: nn.Module, after: int, error: type[BaseException]) -> Any:
    calls = itertools.count()

    def hook(*_: Any) -> None:
        if next(calls) == after:
            raise error

    return hooked(module, hook)


def interrupted(tiny: TinyPipeline, quantized: nn.Module, folder: Path, **options: Any) -> None:
    with stopping(quantized, 4, _Stop), pytest.raises(_Stop):
        distributed_record(tiny, quantized, resume=folder, **options)
    assert [p.name for p in folder.glob("part-*")] == ["part-00000.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 2.0},
        {"num_inference_steps": 4},
        {"call": {}},
        {"histograms": False},
        {"trajectory": "quantized"},
        {"prompts": LABELS[:4]},
        {"seed": 11},
        {"batch_size": 1},
        {"scheduler": {"beta_schedule": "scaled_linear"}},
        {"correction": QDrift},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_folder_of_another_calibration_is_refused(
    dit: TinyPipeline, twin: nn.Module, record: Record, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "parts"
    start = {"correction": Identity(), "trajectory": "corrected"} if "correction" in change else {}
    changed = {k: v for k, v in change.items() if k not in ("scheduler", "correction")}
    correction = {"correction": QDrift(record.evidence)} if start else {}
    options = {"prompts": LABELS, "batch_size": 2, "seed": 10, "resume": folder, **start}
    interrupted(dit, twin, folder, **start)
    scheduler = dit.pipe.scheduler
    dit.pipe.scheduler = type(scheduler).from_config(
        scheduler.config, **change.get("scheduler", {})
    )
    with pytest.raises(StorageError, match="another calibration"):
        measure(dit, twin, **{**options, **changed, **correction})
    dit.pipe.scheduler = scheduler
    assert (folder / "part-00000.safetensors").exists()
    assert measure(dit, twin, **options).prompts == 5  # the rightful one goes on


def test_other_files_in_the_resume_folder_are_kept(
    dit: TinyPipeline, twin: nn.Module, tmp_path: Path
) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    measure(dit, twin, resume=tmp_path)
    assert list(tmp_path.iterdir()) == [precious]


@pytest.mark.parametrize("error", [None, _Stop, KeyboardInterrupt])
@pytest.mark.parametrize("corrected_before", [False, True])
def test_the_pipeline_is_as_before_whatever_happens(
    dit: TinyPipeline,
    twin: nn.Module,
    record: Record,
    error: type[BaseException] | None,
    corrected_before: bool,
) -> None:
    correction = QDrift(record.evidence, min_explained=0.0)
    pipe, reference = dit.pipe, dit.model
    before = contextlib.ExitStack()
    with before:
        if corrected_before:
            before.enter_context(evenkeel.applied(pipe, correction, allow=("denoiser",)))
        scheduler, interceptors = pipe.scheduler, installed(pipe.scheduler)
        sampled = generate(dit, steps=3)
        progress = dict(pipe._progress_bar_config)
        stop = stopping(twin, 4, error) if error else contextlib.nullcontext()
        with stop, pytest.raises(error) if error else contextlib.nullcontext():
            distributed_record(dit, twin)
        assert pipe.scheduler is scheduler and dit.model is reference
        assert installed(scheduler) == interceptors
        assert (type(scheduler) is plain_class(scheduler)) == (not corrected_before)
        assert pipe._progress_bar_config == progress
        assert torch.equal(generate(dit, steps=3), sampled)


# ---- what is refused


def test_no_prompts_and_a_bare_text_are_refused(dit: TinyPipeline, twin: nn.Module) -> None:
    for prompts in ([], (), "a cat"):
        with pytest.raises(CalibrationError, match="non-empty list of prompts"):
            measure(dit, twin, prompts=prompts)
    with pytest.raises(CalibrationError, match="batch_size"):
        measure(dit, twin, batch_size=0)


def test_the_same_object_and_an_identical_twin_are_refused(dit: TinyPipeline) -> None:
    with pytest.raises(CalibrationError, match="own denoiser object"):
        measure(dit, dit.model)
    with pytest.raises(CalibrationError, match="identical to the full-precision one"):
        measure(dit, copy.deepcopy(dit.model))


def test_a_twin_that_differs_in_name_only_is_refused(dit: TinyPipeline) -> None:
    renamed = copy.deepcopy(dit.model)
    renamed.evenkeel_quantizer = "w8a16"  # another fingerprint, the same outputs
    with pytest.raises(CalibrationError, match="exactly the full-precision outputs"):
        measure(dit, renamed)


@pytest.mark.parametrize("which", ["quantized", "full-precision"])
@pytest.mark.parametrize("trajectory", ["quantized", "full-precision"])
def test_a_denoiser_that_overflows_is_named(which: str, trajectory: str) -> None:
    tiny = ALL["dit"]()
    twins = {"full-precision": tiny.model, "quantized": quantized_twin(tiny)}
    twins[which].proj_out_2.bias.data[0] = float("inf")
    with pytest.raises(CalibrationError, match=f"the {which} denoiser gave a non-finite"):
        measure(tiny, twins["quantized"], trajectory=trajectory)
    assert type(tiny.pipe.scheduler) is plain_class(tiny.pipe.scheduler)


def test_a_denoiser_that_changes_the_shape_is_refused(dit: TinyPipeline, twin: nn.Module) -> None:
    def crop(module: nn.Module, args: Any, output: Any) -> Any:
        return (
            type(output)(sample=output[0][..., :-1])
            if hasattr(output, "sample")
            else (output[0][..., :-1],)
        )

    with hooked(twin, crop), pytest.raises(CalibrationError, match="different shape"):
        measure(dit, twin)


def test_dropout_left_on_is_found_and_can_be_accepted() -> None:
    tiny = ALL["pixart_sigma"]()
    quantized = quantized_twin(tiny)
    tiny.pipe.text_encoder.train()
    with pytest.raises(CalibrationError, match="same input differ"):
        measure(tiny, quantized)
    accepted = measure(tiny, quantized, noise_floor_limit=float("inf"))
    assert (accepted.noise_floor > 0).all()


def test_a_sampler_that_remembers_the_last_run_is_not_repeatable(
    dit: TinyPipeline, twin: nn.Module
) -> None:
    calls = itertools.count()

    def drift(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args[0] + 1e-3 * next(calls), *args[1:]), kwargs

    handle = dit.model.register_forward_pre_hook(drift, with_kwargs=True)
    with pytest.raises(CalibrationError, match="same input differ"):
        measure(dit, twin, noise_floor_limit=1e-9)
    handle.remove()


@pytest.mark.parametrize(
    ("trajectory", "correction"),
    [("corrected", None), ("full-precision", Identity()), ("quantized", Identity())],
)
def test_a_correction_goes_with_the_corrected_trajectory_only(
    dit: TinyPipeline, twin: nn.Module, trajectory: str, correction: Any
) -> None:
    with pytest.raises(CalibrationError, match="pass a correction for, and only for"):
        measure(dit, twin, trajectory=trajectory, correction=correction)


def test_an_unknown_trajectory_and_an_unknown_argument_are_named(
    dit: TinyPipeline, twin: nn.Module
) -> None:
    with pytest.raises(CalibrationError, match="'driven'"):
        measure(dit, twin, trajectory="driven")
    with pytest.raises(UnsupportedPipeline, match="does not take hieght"):
        measure(dit, twin, call={"hieght": 32})


def test_several_processes_need_a_folder(
    dit: TinyPipeline, twin: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Processes(0, 2, store=torch.distributed.HashStore())
    monkeypatch.setattr("evenkeel.fitting.calibration.calibrate.processes", lambda: two)
    with pytest.raises(CalibrationError, match="resume=<folder>"):
        measure(dit, twin)


def test_pipelines_with_two_or_no_denoisers_are_refused() -> None:
    with pytest.raises(UnsupportedPipeline, match="two denoisers"):
        denoiser_name(SimpleNamespace(transformer=nn.Linear(1, 1), transformer_2=nn.Linear(1, 1)))
    with pytest.raises(UnsupportedPipeline, match="no component called transformer or unet"):
        denoiser_name(SimpleNamespace(components={"prior": None}))


def test_fingerprints_tell_networks_apart(dit: TinyPipeline, twin: nn.Module) -> None:
    other = copy.deepcopy(dit.model)
    assert fingerprint(other) == fingerprint(dit.model) != fingerprint(twin)
    other.proj_out_2.bias.data[0] += 1e-6
    assert fingerprint(other) != fingerprint(dit.model)
    assert fingerprint(torch.compile(dit.model, backend="eager")) == fingerprint(dit.model)
    with pytest.raises(UnsupportedPipeline, match="meta device"):
        fingerprint(nn.Linear(2, 2, device="meta"))


# ---- layouts


def test_a_layout_takes_channels_apart_and_puts_them_back() -> None:
    packed = torch.arange(2 * 5 * 8.0).reshape(2, 5, 8)  # 2 channels of 2 x 2 pixels, 5 tokens
    layout = LatentLayout(3, 2, 2, 4)
    channels = layout.as_channels(packed)
    assert channels.shape == (2, 2, 20)
    assert channels[0, 1].tolist() == packed[0, :, 4:].T.flatten().tolist()
    weights = layout.broadcast(torch.tensor([1.0, 10.0]))
    scaled = layout.as_channels(packed * weights)
    assert torch.equal(scaled, channels * torch.tensor([1.0, 10.0])[:, None])
    assert layout.broadcast(torch.tensor([3.0])).shape == (1, 1, 1)


def test_unknown_layouts_and_foreign_latents_are_refused(dit: TinyPipeline) -> None:
    with pytest.raises(UnsupportedPipeline, match="Pass layout="):
        find_layout(dit.pipe, torch.zeros(2, 7))
    with pytest.raises(UnsupportedPipeline, match="4 features on axis 1"):
        LatentLayout(4, 1, 4, 1).as_channels(torch.zeros(2, 3, 8, 8))
    assert replace(find_layout(dit.pipe, torch.zeros(1, 4, 8, 8)), channels=2, patch=2).axis == 1


def test_what_json_cannot_hold_is_written_as_its_type() -> None:
    found = json_safe({"a": (1, 2), "generator": torch.Generator(), "f": 0.1})
    assert found == {"a": [1, 2], "generator": "Generator", "f": 0.1}
