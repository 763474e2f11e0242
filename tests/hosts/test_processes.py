"""Several processes: what they exchange, and that whatever takes prompts gives what one process gives."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from several_processes import forked, torchrun

import evenkeel
import evenkeel.comparing.generation as generation
from evenkeel import zoo
from evenkeel.cli import main
from evenkeel.comparing.comparison import standard_arms
from evenkeel.comparing.generation import Arm
from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import plain_plan
from evenkeel.errors import CalibrationError, ProcessError, UnsupportedSampler
from evenkeel.hosts.processes import Processes, processes
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.statistics.normal_equations import NormalEquations
from evenkeel.storage import Kind, read_tensors, write_tensors

SAMPLING = ["zoo:pixart-sigma", "--quantized", "w3a4-g32-r16", "--steps", "2", "--batch-size", "2"]
PROMPTS = ["digit 1", "digit 2", "digit 3", "digit 4", "digit 5"]  # three batches of two
FOUND = Kind("found", 1, "run the test again")


def twins():
    pipeline = zoo.load("pixart-sigma")
    some = QuantizerSpec.parse("w3a4-g32-r16", only=("transformer_blocks.0",))
    return pipeline, quantize_module(pipeline.transformer, some)[0]


def asked(quantized=None):
    found = {"prompts": PROMPTS, "num_inference_steps": 2, "batch_size": 2, "progress": False}
    return found if quantized is None else {**found, "quantized": quantized}


def compared(pipeline, quantized, folder):
    arms = standard_arms(pipeline, quantized, [evenkeel.Identity()])
    return evenkeel.compare(pipeline, arms, folder=folder, **asked())


# ---- what the processes do


def exchange(us: Processes) -> None:
    """What is given arrives to the bit, in order; sums are those of all."""
    own = torch.arange(us.rank + 1) / 3
    for rank, (header, tensors) in enumerate(us.gathered({"rank": us.rank}, {"x": own})):
        assert header == {"rank": rank}
        assert torch.equal(tensors["x"], torch.arange(rank + 1) / 3)
    assert len(us.gathered(us.rank, main_only=True)) == (us.count if us.main else 0)
    assert us.summed(torch.tensor([1.0, us.rank])).tolist() == [2.0, 1.0]
    assert us.share(range(5)) == ([0, 1], [2, 3, 4])[us.rank]
    us.agree("question", {"same": 1})
    with pytest.raises(
        ProcessError, match=r"process 1 was asked for another question.*differ in b"
    ):
        us.agree("question", {"a": 1, "b": us.rank})


def working(place: Path, pipeline, quantized) -> None:
    """Everything in turn; what it gave is written down by both."""
    us = processes()
    exchange(us)
    comparison = compared(pipeline, quantized, place / "kept")
    if us.main:
        write_tensors(place / "images", FOUND, {"header": ""}, comparison.images)
    else:
        assert comparison.images == {}
    numbers = [arm.as_dict() for arm in comparison.arms]
    (place / f"measures-{us.rank}.json").write_text(json.dumps(numbers))
    (place / f"check-{us.rank}.json").write_text(json.dumps(checked(pipeline, quantized)))
    write_tensors(place / f"fits-{us.rank}", FOUND, {"header": ""}, fitted(pipeline, quantized))
    words = ["--prompts", str(place / "prompts.txt"), "--out", str(place / "sampled"), "--json"]
    assert main(["sample", *SAMPLING, *words]) == 0
    killed(us, pipeline, quantized, place)


def fitted(pipeline, quantized) -> dict[str, torch.Tensor]:
    """Every fit's numbers."""
    readout = evenkeel.fit_readout(pipeline, **asked(quantized))
    refitted, report = evenkeel.refit_branches(pipeline, penalty=1e-2, **asked(quantized))
    tac = evenkeel.fit_tac(pipeline, **asked(quantized))
    stepbaq = evenkeel.fit_stepbaq(pipeline, fence=1.7, **asked(quantized))
    layers = [layer for layer in report.layers if layer.after is not None]
    return {
        **{f"readout.{k}": v for k, v in readout.tables().tensors.items()},
        **{f"refit.{k}": v for k, v in refitted.named_buffers() if k.endswith((".up", ".down"))},
        "refit.before": torch.tensor([layer.before for layer in layers]),
        "refit.after": torch.tensor([layer.after for layer in layers]),
        "tac.gain": tac.gain,
        "tac.bias": tac.bias,
        "stepbaq.mean": stepbaq.mean,
        "stepbaq.variance": stepbaq.variance,
    }


@dataclass(frozen=True)
class Half(Correction):
    """Every process but the main one refuses it."""

    name = "half"
    references = ()
    stages = ("output",)
    made_for = None

    def plan(self, law, *, allow_range=False):
        if not processes().main:
            raise UnsupportedSampler("not here.")
        return plain_plan(law)


def checked(pipeline, quantized) -> dict[str, Any]:
    """As JSON, without what the clock says."""
    arms = standard_arms(pipeline, quantized, [evenkeel.Identity(), Half()])
    arms.append(Arm("oracle", pipeline.transformer))
    found = evenkeel.marginal_check(pipeline, arms, **asked()).as_dict()
    for arm in found["arms"]:
        assert arm.pop("extra_seconds_per_step")["n"] == 3  # batches
    return json.loads(json.dumps(found))


def killed(us: Processes, pipeline, quantized, place: Path) -> None:
    """The second process dies in its second batch; the first one hears of it."""
    if us.rank == 1:
        honest, calls = generation._timed, []

        def fatal(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*arguments)

        generation._timed = fatal
    with pytest.raises(ProcessError, match="another process is gone: it was killed"):
        compared(pipeline, quantized, place / "killed")


def write_prompts(place: Path) -> None:
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


@pytest.fixture(scope="module")
def pair():
    return twins()


@pytest.fixture(scope="module")
def place(tmp_path_factory, pair):
    """The folder in which two processes left what they found."""
    place = tmp_path_factory.mktemp("two")
    write_prompts(place)
    first, second = forked(lambda: working(place, *pair), place)
    assert first.code == 0, first.stderr
    assert second.code == -signal.SIGKILL, second.stderr
    (place / "stdout").write_text(first.stdout + second.stdout)
    return place


# ---- that it is what one process does


def test_compare_gives_the_images_and_measures_of_one_process(place, pair):
    one = compared(*pair, None)
    _, images = read_tensors(place / "images", FOUND)
    assert set(images) == {arm.name for arm in one.arms}
    for name, expected in one.images.items():
        assert torch.equal(images[name], expected)
    first, second = (json.loads((place / f"measures-{r}.json").read_text()) for r in (0, 1))
    assert first == second
    for arm, said in zip(one.arms, first, strict=True):
        expected = json.loads(json.dumps(arm.as_dict()))
        for key in ("psnr", "ssim"):
            assert said[key] == expected[key]
    assert not torch.equal(one.images["quantized"], one.images["full-precision"])


def test_the_check_is_that_of_one_process(place, pair):
    one = checked(*pair)
    first, second = (json.loads((place / f"check-{r}.json").read_text()) for r in (0, 1))
    assert first == second
    assert first.pop("not_applicable") == {"half": "not here."}
    assert one.pop("not_applicable") == {}
    assert [arm["name"] for arm in one["arms"]] == ["identity", "half", "oracle"]
    one["arms"] = [arm for arm in one["arms"] if arm["name"] != "half"]
    for ranking in one["ranking"].values():
        ranking.remove("half")
    assert first == one
    assert one["arms"][0]["curves"] != one["arms"][1]["curves"]


def test_fits_are_those_of_one_process_up_to_the_order_of_sums(place, pair):
    one = fitted(*pair)
    (_, first), (_, second) = (read_tensors(place / f"fits-{r}", FOUND) for r in (0, 1))
    assert set(first) == set(one)
    for name, expected in one.items():
        assert torch.equal(first[name], second[name]), name
        difference = (first[name].double() - expected.double()).norm()
        assert difference <= 1e-5 * expected.double().norm(), name
    assert one["readout.table.active"].any()
    assert (one["refit.after"] < one["refit.before"]).any()


def test_finished_batches_of_two_processes_serve_one(place, pair):
    kept = {p: p.stat().st_mtime_ns for p in (place / "kept").rglob("*.safetensors")}
    assert len(kept) == 9  # three batches of three arms
    compared(*pair, place / "kept")
    assert {p: p.stat().st_mtime_ns for p in (place / "kept").rglob("*.safetensors")} == kept


def test_a_command_prints_once_and_samples_what_one_process_samples(place, tmp_path, capsys):
    said = json.loads(
        (place / "stdout").read_text()
    )  # one object: the other process prints nothing
    assert len(said["images"]) == len(PROMPTS)
    words = ["--prompts", str(place / "prompts.txt"), "--out", str(tmp_path), "--json"]
    assert main(["sample", *SAMPLING, *words]) == 0
    capsys.readouterr()
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes() == (place / "sampled" / path.name).read_bytes()


# ---- what goes wrong


def test_what_a_killed_run_finished_serves_the_next_one(place, pair):
    kept = {p: p.stat().st_mtime_ns for p in (place / "killed").rglob("*.safetensors")}
    assert len(kept) == 2  # one batch of each process
    continued = compared(*pair, place / "killed")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    _, images = read_tensors(place / "images", FOUND)
    assert all(torch.equal(images[name], continued.images[name]) for name in images)


def test_torchrun_of_a_command_for_one_process_is_refused_once(tmp_path):
    done = torchrun(tmp_path, "-m", "evenkeel", "zoo", "list")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("evenkeel zoo: this command runs in one process") == 1


def failing() -> None:
    us = processes()
    if us.main:
        with pytest.raises(ProcessError, match="process 1 of 2 failed: ValueError: no such thing"):
            us.barrier()
    else:
        with pytest.raises(ValueError, match="no such"), us.telling():
            raise ValueError("no such thing")
        time.sleep(1)  # it lives on: no broken connection tells the other one


def test_a_failing_process_tells_the_other_why(tmp_path):
    for ended in forked(failing, tmp_path):
        assert ended.code == 0, ended.stderr


def test_one_that_waits_too_long_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr("evenkeel.hosts.processes._PATIENCE", 0.5)

    def waiting() -> None:
        us = processes()
        if us.main:
            with pytest.raises(ProcessError, match="make the same call"):
                us.barrier()
        else:
            time.sleep(1.5)

    for ended in forked(waiting, tmp_path):
        assert ended.code == 0, ended.stderr


def test_fits_need_a_batch_for_every_process(pair, tmp_path):
    def asking() -> None:
        with pytest.raises(CalibrationError, match="1 batches are not enough for 2 processes"):
            evenkeel.fit_readout(pair[0], **{**asked(pair[1]), "batch_size": 8})

    for ended in forked(asking, tmp_path):
        assert ended.code == 0, ended.stderr


def test_sums_about_another_mean_add():
    h, t = torch.randn(40, 5), torch.randn(40, 2)
    whole, parts = NormalEquations(5, 2), [NormalEquations(5, 2) for _ in range(2)]
    whole.add(h, t)
    for part, rows in zip(parts, (slice(0, 7), slice(7, 40)), strict=True):
        part.add(h[rows], t[rows])
        part.move_to(whole.mean_h, whole.mean_t)
    for name in ("hh", "ht", "tt"):
        total = sum(getattr(part, name) for part in parts)
        assert total == pytest.approx(getattr(whole, name), rel=1e-12)
