"""Trained quantizers: what changes and what does not, which state is kept, kills, files, aligned calls."""

from __future__ import annotations

import copy
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import ALL
from torch import Tensor, nn

import evenkeel
from evenkeel.errors import CalibrationError, QuantizationError, StorageError
from evenkeel.fitting.quantize import quantize
from evenkeel.fitting.training import train_quantized as training
from evenkeel.fitting.training import trainer
from evenkeel.fitting.training.aligned_call import AlignedCall, calls_of
from evenkeel.fitting.training.losses import Loss
from evenkeel.fitting.training.same_state import SameState
from evenkeel.fitting.training.trainer import Stage, train
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.run import Run
from evenkeel.quantizers.layers.timed_inputs import TimedInput
from evenkeel.quantizers.methods.efficientdm import EfficientDM
from evenkeel.quantizers.methods.merged_training import Student
from evenkeel.quantizers.methods.sa_qlora import SAQLoRA
from evenkeel.quantizers.saved.folder import load_quantized, save_quantized
from evenkeel.quantizers.workspace.calibration_set import DenoiserCall
from evenkeel.quantizers.workspace.workspace import Workspace

STEPS = 4
QUICK = {
    "rank": 4,
    "steps": (STEPS,),
    "optimizer_steps": 16,
    "calibration_runs": 1,
    "evaluations": 2,
    "adapter_rate": 0.02,
}


def run_of(name: str = "dit", **changed: Any) -> Run:
    tiny = ALL[name]()
    given = {"guidance_scale": tiny.guidance_scale, "call": tiny.call, "batch_size": 2} | changed
    return Run(tiny.pipe, list(tiny.prompts), STEPS, **given)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Judge:
    """Says in turn what held-out samples would; the trainer must do as it is told."""

    start = 1.0

    def __init__(self, gains: list[float], bound: float = 1.0) -> None:
        self.gains, self.bound = list(gains), bound

    def chosen_by(self, denoiser: nn.Module) -> float:
        return self.gains.pop(0)

    def confirmed(self, denoiser: nn.Module) -> tuple[float, float]:
        return self.bound + 1, self.bound


@functools.cache
def start_of(run: Run, method: EfficientDM) -> tuple[Any, Any]:
    chosen = training.trajectories_of(run, method)
    workspace = Workspace(run.denoiser)
    workspace.keep_matching(method.skip)
    levels = chosen[0].levels
    inputs = training.inputs_by_level(run.denoiser, workspace, chosen, levels, 1)
    return method.starts(workspace, levels, inputs), chosen


def student_of(run: Run, method: EfficientDM) -> tuple[Student, list[Any]]:
    layers, chosen = start_of(run, method)
    return Student(run.denoiser, copy.deepcopy(layers)), chosen


def trained(run: Run, method: EfficientDM, judge: Any, **options: Any) -> tuple[Student, Any]:
    student, chosen = student_of(run, method)
    epochs = method.optimizer_steps // chosen[0].calls
    report = train(
        student,
        student.groups(method),
        [Stage(chosen[0], epochs)],
        Loss(),
        judge,
        progress=False,
        **{"evaluations": method.evaluations, **options},
    )
    return student, report


@pytest.fixture(scope="module")
def run() -> Run:
    return run_of()


# ---------------------------------------------------------------- aligned calls


def test_calls_are_the_pipelines_own_and_targets_full_precision(run: Run):
    source = SameState(run)
    assert source.calls == STEPS
    seen: list[Any] = []
    hook = run.denoiser.register_forward_hook(
        lambda _, given, named, out: seen.append((given, named, out[0])), with_kwargs=True
    )
    calls = list(source.epoch(3))
    hook.remove()
    g = run.guidance_scale
    assert calls[0].shares == pytest.approx((g, 1 - g))  # DiT: the null class comes last
    for call, (given, _, out) in zip(calls, seen, strict=True):
        assert torch.equal(call.student.arguments[0], given[0])
        assert torch.equal(call.target, out[:, : call.target.shape[1]])
        assert call.target.shape == given[0].shape  # no learned variance
        assert float(call.student.keywords["timestep"].flatten()[0]) in source.levels
    again = list(source.epoch(3))
    assert all(torch.equal(a.target, b.target) for a, b in zip(calls, again, strict=True))
    assert not torch.equal(next(source.epoch(4)).target, calls[0].target)
    assert not torch.equal(calls[1].student.arguments[0], calls[0].student.arguments[0])


def test_a_closed_loop_goes_on_with_what_is_sent(run: Run):
    closed = SameState(run, "student")
    with pytest.raises(CalibrationError, match="send it back"):
        list(closed.epoch(0))
    open_loop = [call.student.arguments[0].clone() for call in SameState(run).epoch(0)]
    for factor, equal in ((1.0, True), (1.5, False)):
        states = []
        for call, answer in calls_of(closed, 0):
            states.append(call.student.arguments[0].clone())
            answer.append(factor * call.student.make(run.denoiser)[0])
        assert torch.equal(states[0], open_loop[0])
        assert all(map(torch.equal, states, open_loop)) is equal


def test_eta_draws_noise_from_the_seed_and_is_refused_where_there_is_none():
    flow = run_of("flux")
    with pytest.raises(CalibrationError, match="takes none"):
        SameState(flow, eta=1.0)
    run = run_of()
    from diffusers import DDIMScheduler

    run.pipeline.scheduler = DDIMScheduler.from_config(run.pipeline.scheduler.config)
    plain, noisy = SameState(run), SameState(run, eta=1.0)
    last = [list(source.epoch(0))[-1].student.arguments[0] for source in (plain, noisy, noisy)]
    assert torch.equal(last[1], last[2]) and not torch.equal(last[0], last[1])


def test_the_loss_compares_what_guidance_makes_of_the_branches():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    call = AlignedCall(DenoiserCall((), {}), target, (3.0, -2.0))
    moved = target + torch.tensor([[2.0, 2.0], [3.0, 3.0]])  # 3 * 2 - 2 * 3 = 0
    assert Loss()(call, moved).item() == pytest.approx(0)
    assert Loss(guided=False)(call, moved).item() == pytest.approx(6.5)
    assert Loss(reduction="sum", guided=False)(call, moved).item() == pytest.approx(26)
    assert Loss(cosine=2.0)(call, -target).item() == pytest.approx((6**2 + 4**2) / 2 + 2 * 2)
    with pytest.raises(QuantizationError, match="reduction"):
        Loss(reduction="max")


# ---------------------------------------------------------------- what changes


def test_only_adapters_scales_and_zeros_change(run: Run):
    before = state(run.denoiser)
    student, report = trained(run, EfficientDM(**QUICK), Judge([1.0, 2.0]))
    assert report.confirmed and report.chosen == 1 and report.optimizer_steps == 16
    fresh, _ = student_of(run, EfficientDM(**QUICK))
    assert same(state(run.denoiser), before)
    after, start = state(student.network), state(fresh.network)
    changed = {n for n in after if not torch.equal(after[n], start[n])}
    ends = ("down", "up", "scale", "activation.scale", "activation.zero")
    learned = {n for n in after if any(n == f"{m}.{e}" for m in student.layers for e in ends)}
    assert changed <= learned
    for end in ends:
        assert any(n.endswith(end) for n in changed), end
    finished = student.finished()
    assert all(p.requires_grad is False for p in finished.parameters())
    call = next(SameState(run).epoch(9)).student
    assert torch.equal(call.make(finished)[0], call.make(student.network)[0])


def test_nothing_to_learn_leaves_everything_at_its_start():
    """Weights that lie on the grid and inputs as they are: the loss is 0, and so is every gradient."""
    run = run_of()
    method = EfficientDM(weight_bits=8, activation_bits=16, **QUICK)
    student, chosen = student_of(run, method)
    for name, layer in student.layers.items():
        run.denoiser.get_submodule(name).weight.data = layer.weight.detach()
    start = state(student.network)
    options = {"weight_decay": 0.0, "progress": False}
    judge: Any = Judge([1.0])
    report = train(
        student,
        student.groups(method),
        [Stage(chosen[0], 2)],
        Loss(),
        judge,
        evaluations=1,
        **options,
    )
    assert report.losses == (0.0, 0.0) and same(state(student.network), start)


# ---------------------------------------------------------------- which state is kept


@pytest.mark.parametrize(
    ("gains", "bound", "chosen"),
    [([2.0, 1.0], 0.5, 0), ([1.0, 2.0], 0.5, 1), ([-1.0, -2.0], 0.5, -1), ([1.0, 2.0], -0.1, -1)],
)
def test_held_out_samples_decide_and_not_the_loss(
    run: Run, gains: list[float], bound: float, chosen: int
):
    method = EfficientDM(**QUICK)
    start = state(student_of(run, method)[0].network)
    student, report = trained(run, method, Judge(gains, bound))
    assert report.chosen == chosen and report.confirmed is (chosen >= 0)
    assert same(state(student.network), start) is (chosen < 0)
    assert ("nothing helped" in report.text()) is (chosen < 0)
    if chosen >= 0:
        assert f"after {report.evaluated[chosen]} of 4 runs" in report.text()


def test_a_loss_that_is_not_finite_stops(run: Run):
    method = EfficientDM(**{**QUICK, "adapter_rate": 1e30})
    with pytest.raises(QuantizationError, match="training diverges"):
        trained(run, method, Judge([1.0, 1.0]))


# ---------------------------------------------------------------- kills


class Killed(BaseException):
    """Stands for a kill at a moment that the test chooses."""


@pytest.mark.parametrize("at", [1, 6, 13])
def test_an_interrupted_training_ends_in_the_same_bits(
    run: Run, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "KEPT_EVERY", 0.0)
    method = EfficientDM(**QUICK)
    whole, said = trained(run, method, Judge([1.0, 2.0]))
    real, count = Student.settle, [0]

    def settle(self: Student) -> None:
        count[0] += 1
        if count[0] == at:
            raise Killed
        real(self)

    monkeypatch.setattr(Student, "settle", settle)
    with pytest.raises(Killed):
        trained(run, method, Judge([1.0, 2.0]), folder=tmp_path, identity={"run": "a"})
    judge = Judge([2.0] if at == 13 else [1.0, 2.0])  # evaluations are not repeated either
    again, found = trained(run, method, judge, folder=tmp_path, identity={"run": "a"})
    assert judge.gains == [] and found == said
    assert same(state(again.network), state(whole.network))
    with pytest.raises(StorageError, match="another training run"):
        trained(run, method, Judge([1.0, 2.0]), folder=tmp_path, identity={"run": "b"})


KILLED = """
import sys, torch
from pathlib import Path
import test_training as t
from evenkeel.fitting.training import trainer
trainer.KEPT_EVERY = 0.0
method = t.EfficientDM(**{**t.QUICK, "optimizer_steps": 200, "evaluations": 5})
print("ready", flush=True)
module, report, said = t.training.train_quantized(
    t.run_of(), method, folder=Path(sys.argv[1]) / "kept", progress=False)
t.save_quantized(module, Path(sys.argv[1]) / "out")
print(said.as_dict())
"""


@pytest.mark.rarely
def test_a_killed_process_ends_in_the_same_bits(tmp_path: Path):
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found = []
    for name, waits in (("whole", (None,)), ("killed", (0.7, 1.9, 0.2, None))):
        place = tmp_path / name
        place.mkdir()
        for wait in waits:
            process = subprocess.Popen(
                [sys.executable, "-c", KILLED, str(place)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": here},
                text=True,
            )
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            if wait is None:
                said = process.communicate()[0]
                assert process.returncode == 0
            else:
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                process.wait()
                process.stdout.close()
        found.append((said, (place / "out" / "quantized.safetensors").read_bytes()))
    assert found[0] == found[1]


# ---------------------------------------------------------------- from the pipeline to a folder


@pytest.mark.parametrize("kind", [EfficientDM, SAQLoRA])
def test_quantize_trains_saves_and_loads_bit_for_bit(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of()
    monkeypatch.setattr(training, "HeldOut", lambda *_: Judge([1.0, 2.0, 3.0, 4.0]))
    method = kind(**QUICK)
    made, report = quantize(
        run.pipeline,
        method,
        prompts=run.prompts.values,
        num_inference_steps=STEPS,
        guidance_scale=run.guidance_scale,
        call=run.call,
        out=tmp_path / "out",
        progress=False,
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "quantized.json",
        "quantized.safetensors",
    ]
    again, told = load_quantized(tmp_path / "out")
    assert told == report and fingerprint(again) == fingerprint(made)
    timed = [m for m in again.modules() if isinstance(m, TimedInput)]
    assert timed and all(len(m.levels) >= STEPS for m in timed)
    assert {layer.weight_bits for layer in report.quantized} == {4, 8}
    assert "trained: final samples +2.00 dB (95 % bound +1.00)" in str(report)
    other = copy.deepcopy(again)
    for denoiser in (again, other):
        with run.undisturbed(denoiser):
            found = run.sample(run.batches()[0])
        with run.undisturbed(made):
            assert torch.equal(
                torch.as_tensor(found), torch.as_tensor(run.sample(run.batches()[0]))
            )
    record = evenkeel.calibrate(
        run.pipeline,
        quantized=again,
        prompts=list(run.prompts.values),
        num_inference_steps=STEPS,
        guidance_scale=run.guidance_scale,
        call=run.call,
        progress=False,
    )
    assert record.provenance.quantized == fingerprint(made)
    save_quantized(again, tmp_path / "again")
    written = [(tmp_path / n / "quantized.safetensors").read_bytes() for n in ("out", "again")]
    assert written[0] == written[1]


def test_convolutions_of_a_unet_train_too(monkeypatch: pytest.MonkeyPatch):
    run = run_of("sdxl")
    monkeypatch.setattr(training, "HeldOut", lambda *_: Judge([1.0]))
    few = ("*.attn?.*", "*.ff.*", *EfficientDM().skip)
    method = EfficientDM(**{**QUICK, "optimizer_steps": 4, "advance": "student", "skip": few})
    made, report, said = training.train_quantized(run, method, progress=False)
    assert said.confirmed and {layer.kind for layer in report.quantized} == {"Linear", "Conv2d"}
    assert any("skip pattern" in layer.reason for layer in report.kept)
    assert len(made.conv_in.activation.levels) == STEPS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_bits", 16),
        ("activation_bits", 2),
        ("base", "rounded"),
        ("rank", -1),
        ("steps", (0,)),
        ("optimizer_steps", 1.5),
        ("adapter_rate", float("nan")),
        ("advance", "teacher"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any):
    with pytest.raises(QuantizationError):
        EfficientDM(**{field: value})


def test_methods_that_train_ask_for_runs(run: Run):
    with pytest.raises(QuantizationError, match="give prompts and num_inference_steps"):
        quantize(run.pipeline, EfficientDM(), progress=False)
    with pytest.raises(QuantizationError, match="trained on runs of a pipeline"):
        EfficientDM().quantize(Workspace(nn.Linear(2, 2)))


def test_a_denoiser_in_few_bits_is_refused():
    run = run_of()
    run.denoiser.to(torch.bfloat16)
    with pytest.raises(
        QuantizationError, match=r"found torch\.bfloat16.*torch_dtype=torch\.float32"
    ):
        training.train_quantized(run, EfficientDM(**QUICK), progress=False)
