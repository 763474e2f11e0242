"""Several processes: what they exchange, and that whatever takes prompts gives what one process gives."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from several_processes import torchrun, unwatched

import evenkeel
import evenkeel.comparing.generation as generation
from evenkeel import zoo
from evenkeel.cli import main
from evenkeel.comparing.comparison import standard_arms
from evenkeel.errors import ProcessError
from evenkeel.hosts.processes import Processes, processes
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.storage import Kind, read_tensors, write_tensors

SAMPLING = ["zoo:pixart-sigma", "--quantized", "w3a4-g32-r16", "--steps", "2", "--batch-size", "2"]
PROMPTS = ["digit 1", "digit 2", "digit 3", "digit 4", "digit 5"]  # three batches of two
FOUND = Kind("found", 1, "run the test again")


def twins():
    pipeline = zoo.load("pixart-sigma")
    return pipeline, quantize_module(pipeline.transformer, QuantizerSpec.parse("w3a4-g32-r16"))[0]


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


def working(out: str) -> None:
    """Under torchrun: everything in turn; what it gave is written down by both."""
    torch.set_num_threads(1)
    us, place = processes(), Path(out)
    exchange(us)
    pipeline, quantized = twins()
    comparison = compared(pipeline, quantized, place / "kept")
    if us.main:
        write_tensors(place / "images", FOUND, {"header": ""}, comparison.images)
    else:
        assert comparison.images == {}
    numbers = [arm.as_dict() for arm in comparison.arms]
    (place / f"measures-{us.rank}.json").write_text(json.dumps(numbers))
    words = ["--prompts", str(place / "prompts.txt"), "--out", str(place / "sampled"), "--json"]
    assert main(["sample", *SAMPLING, *words]) == 0
    killed(us, pipeline, quantized, place)


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
def place(tmp_path_factory):
    """The folder in which two processes left what they found."""
    place = tmp_path_factory.mktemp("two")
    write_prompts(place)
    code = f"import test_processes as t; t.working({str(place)!r})"
    first, second = unwatched(Path(__file__).parent, code)
    assert first.returncode == 0, first.stderr
    assert second.returncode == -signal.SIGKILL, second.stderr
    (place / "stdout").write_text(first.stdout + second.stdout)
    return place


@pytest.fixture(scope="module")
def pair():
    return twins()


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
