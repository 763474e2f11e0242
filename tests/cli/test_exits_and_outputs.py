"""How a command ends: exit codes, one line, JSON that is JSON, and nothing of anybody's overwritten."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fuzzing import command_line
from fuzzing.sandbox import refuse_outside, sandbox

from evenkeel.cli import calling, main
from evenkeel.errors import EvenkeelError
from evenkeel.storage import valid_json

PIXART = ["zoo:pixart-sigma", "--quantized", "w4a16-g32", "--steps", "2"]
WRITING = {
    "demo": [],
    "calibrate": PIXART,
    "readout": PIXART,
    "refit": PIXART,
    "restore": PIXART,
    "sample": PIXART,
    "compare": [*PIXART, "--record", "none"],
    "fold": [*PIXART[:3], "--record", "none"],
    "quantize": ["zoo:pixart-sigma", "--method", "rtn"],
    "export": ["none"],
}
FILES = ("calibrate", "readout", "export")


def run(capsys, *arguments):
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", WRITING)
def test_every_command_that_writes_refuses_what_is_not_its_own_before_it_begins(
    command, capsys, tmp_path, monkeypatch
):
    for begun in ("evenkeel.cli.sources.load", "evenkeel.zoo.load", "evenkeel.record.load"):
        monkeypatch.setattr(begun, pytest.fail)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    names = ("results.json", "00000.png", "quantized.safetensors", "README.md", "letter")
    for name in names:
        (tmp_path / "folder" / name).write_text("somebody's")
    ask = [command, *WRITING[command], "--out"]
    place = tmp_path / "folder" / ("letter" if command in FILES else "")
    code, _, err = run(capsys, *ask, place)
    assert code == 1 and "--force" in err and str(place) in err and err.count("\n") == 1
    for there in ("pipe", "pipe/below", "folder" if command in FILES else "folder/letter"):
        code, _, err = run(capsys, *ask, tmp_path / there, "--force")
        assert code == 1 and "--force" not in err and str(tmp_path) in err, there
    assert {(tmp_path / "folder" / n).read_text() for n in names} == {"somebody's"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--seed", "-1"], "whole number from 0"),
        (["--seed", "9" * 30], "whole number from 0"),
        (["--steps", "1e12"], "whole number from 1"),
        (["--steps", str(10**12)], "whole number from 1"),
        (["--batch-size", "9" * 5000], "whole number from 1"),
        (["--guidance-scale", "nan"], "expected a number"),
        (["--colour"], "unrecognized"),
    ],
)
def test_wrong_usage_is_exit_code_2(asked, says, capsys, tmp_path):
    code, out, err = run(capsys, "readout", *PIXART, *asked, "--out", tmp_path / "r")
    assert (code, out) == (2, "") and says in err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("device", ["nope", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here_is_named(device, capsys, tmp_path):
    code, _, err = run(capsys, "readout", *PIXART, "--device", device, "--out", tmp_path / "r")
    assert code == 1 and f"--device {device!r}" in err


@pytest.mark.parametrize("command", ["demo", "compare"])
def test_two_images_are_refused_at_once(command, capsys, tmp_path):
    ask = [command, *WRITING[command], "--images", "2", "--out", tmp_path / "o"]
    began = time.monotonic()
    code, _, err = run(capsys, *ask)
    assert code == 1 and "at least 3" in err and time.monotonic() - began < 2


def pipeline_that_takes(**annotations):
    class Pipeline:
        def __call__(self, **_):
            pass

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=a)
        for n, a in annotations.items()
    ]
    Pipeline.__call__.__signature__ = inspect.Signature(parameters)
    return Pipeline()


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("height=tall", "expected int | None, got 'tall'"),
        ("height=true", "got True"),
        ("height=0", "above 0"),
        (f"height={'9' * 30}", "numbers up to"),
        (f"height={'9' * 5000}", "expected int | None, got"),
        ("height=[8]", "got [8]"),
        ("sizes=[1, 2, 3]", "got [1, 2, 3]"),
        ("sizes=[1, 1e999]", "got [1, inf]"),
        ("latents=[[1.0]]", "expected torch.Tensor | None"),
        ("words=3", "expected str | list[str]"),
        ("prompt=a cat", "--prompts sets"),
        ("num_inference_steps=3", "--steps sets"),
        ("generator=3", "--seed sets"),
        ("output_type=pil", "evenkeel's own"),
        ("self=3", "expected NAME=VALUE"),
        ("height", "expected NAME=VALUE"),
        (f"words={'[' * 100_000}", "nested too deep"),
    ],
)
def test_a_value_that_the_pipeline_does_not_take_is_refused_by_its_signature(pair, says):
    names = dict.fromkeys(("prompt", "num_inference_steps", "generator", "output_type"), str)
    pipeline = pipeline_that_takes(
        height=int | None,
        sizes=tuple[float, float],
        latents=torch.Tensor | None,
        words=str | list[str],
        **names,
    )
    with pytest.raises(EvenkeelError) as caught:
        calling.parse_call([pair], pipeline)
    assert says in str(caught.value) and len(str(caught.value)) < 300
    right = ["height=8", "sizes=[1, 2.5]", 'words=["a", "b"]', "latents=null"]
    assert calling.parse_call(right, pipeline) == {
        "height": 8,
        "sizes": [1, 2.5],
        "words": ["a", "b"],
        "latents": None,
    }


def test_what_nobody_expected_is_one_line_that_names_the_stage(capsys, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise LookupError("first line\nsecond line")

    monkeypatch.setattr("evenkeel.cli.sources.load_pipeline", broken)
    ask = ["readout", *PIXART, "--out", tmp_path / "r"]
    code, out, err = run(capsys, *ask)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "loading the pipeline failed: LookupError: first line (--traceback shows all)" in err
    code, _, err = run(capsys, *ask, "--traceback")
    assert code == 1 and "Traceback" in err and "second line" in err


def test_numbers_that_json_does_not_have_are_null_with_the_reason_beside():
    found = {"a": [1.0, -math.inf], "b": {"c": math.nan, "d": 1}, "e": math.inf, "f": "NaN"}
    read = json.loads(valid_json(found), parse_constant=pytest.fail)
    assert read == {
        "a": [1.0, None],
        "b": {"c": None, "d": 1, "not_finite": {"c": "not a number"}},
        "e": None,
        "f": "NaN",
        "not_finite": {"a.1": "minus infinity", "e": "infinite"},
    }


STOPPED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from evenkeel import cli
from evenkeel.cli import fitting
def stopped(options):
    options.kept = "this and that is kept"
    if sys.argv[1] == "while importing":
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as e:
            raise ImportError("half") from e
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
fitting._run_inspect = stopped
sys.exit(cli.main(["inspect", "none"]))
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "while importing"])
def test_sigterm_is_ctrl_c_and_what_is_said_is_what_the_command_kept(how):
    ran = subprocess.run([sys.executable, "-c", STOPPED, how], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (130, "interrupted; this and that is kept\n")


def test_handlers_are_given_back(capsys):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert run(capsys, "inspect", "none")[0] == 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from evenkeel.__main__ import run; sys.argv[1:] = ['zoo', 'list']; sys.exit(run())"
    ran = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    ran.stdout.close()
    assert ran.stderr.read() == "" and ran.wait() in (0, 1)
    ran.stderr.close()


def test_a_fuzzer_refuses_to_pass_on_a_place_outside_of_its_folder():
    with pytest.raises(AssertionError, match="not a fuzzer's folder"):
        refuse_outside([])
    with sandbox() as place:
        (place / "out").symlink_to("/nowhere")
        refuse_outside(["sample", "--out=in/side", "a\0b"])
        for word in (
            "/dev/null",
            "--out=/dev/null",
            "a/../../b",
            "--out=..",
            "~/x",
            "out",
            "out/x",
        ):
            with pytest.raises(AssertionError, match="lead"):
                refuse_outside([word])


def test_abusive_calls_are_refused_in_a_line():
    """A seeded part of ``scripts/fuzz --kind cli``: no traceback, nothing slow, no stray file."""
    with sandbox():
        command_line.prepare()
        found = [(seed, command_line.call(command_line.generated(seed))) for seed in range(30)]
        # Right calls print what their schemas say.
        for base in (
            x for x in command_line.bases() if x[0] in ("sample", "quantize", "plan", "zoo")
        ):
            place = [] if base[0] in ("plan", "zoo") else ["--out", f"right-{len(found)}"]
            found.append((str(base), command_line.call([*base, *place, "--json"])))
            assert found[-1][1].word == "done", found[-1]
        for file in ("calibrate", "readout"):
            found.append((file, command_line.call(["inspect", f"{file}.safetensors", "--json"])))
            assert found[-1][1].word == "done", found[-1]
    faults = [(seed, x) for seed, x in found if x.word.isupper()]
    assert faults == []
    assert {x.word for _, x in found} >= {"refused", "usage"}


def test_the_judge_sees_faults():
    def judged(monkeypatch, result):
        monkeypatch.setattr(command_line, "main", result)
        return command_line.call(["inspect", "x", "--json"]).word

    def stray(_):
        with open("stray", "w") as file:
            file.write("x")
        return 0

    with sandbox(), pytest.MonkeyPatch.context() as patch:
        assert judged(patch, lambda _: 1 / 0) == "TRACEBACK"
        assert judged(patch, lambda _: print('{"a": NaN}') or 0) == "NOT JSON"
        assert judged(patch, lambda _: 1) == "WITHOUT A WORD"
        assert judged(patch, stray) == "STRAY FILES"
        patch.setattr(command_line, "LIMIT", -1.0)
        assert judged(patch, lambda _: 1) == "SLOW"
