"""Abusive calls of the command line, made from the parser's own options."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evenkeel.cli import build_parser, main
from evenkeel.hosts.scheduler.schedulers import scheduler_names
from evenkeel.storage import check_json
from fuzzing.sandbox import listing, refuse_outside
from fuzzing.schemas import SCHEMAS

LIMIT = 10.0  # seconds of the processor, to refuse
DEEP = "[" * 100_000 + "]" * 100_000
WORDS = (
    "",
    " ",
    "nope",
    "a\nb",
    "a\0b",
    "\x1b[2J",
    "ä" * 100,
    "x" * 300,
    "-",
    "--",
    "{}",
    "[",
    DEEP,
)
NUMBERS = (
    "0",
    "-1",
    "-0.5",
    "1e12",
    "9" * 30,
    "-" + "9" * 30,
    "9" * 5000,
    "nan",
    "inf",
    "1e309",
    "2",
    "0x10",
)
PLACES = (
    "file.txt",
    "folder",
    "pipe",
    "link",
    "dangling",
    "file.txt/below",
    "missing/deep",
    "deep.json",
    "empty",
    "photo.safetensors",
)
CALLED = (
    "height",
    "width",
    "prompt",
    "negative_prompt",
    "latents",
    "generator",
    "prompt_embeds",
    "output_type",
    "return_dict",
    "timesteps",
    "sigmas",
    "eta",
    "num_images_per_prompt",
    "callback_on_step_end",
    "max_sequence_length",
    "use_resolution_binning",
    "num_inference_steps",
    "guidance_scale",
    "self",
    "kwargs",
    "colour",
    "",
)
VALUES = (
    *WORDS,
    *NUMBERS,
    "7",
    "-8",
    "null",
    "true",
    "[]",
    "[1, 2]",
    '["a", "b"]',
    '{"a": 1}',
    "1e400",
    "[1e400]",
    "NaN",
    "100000",
    "[999, 0]",
)
PATHS = {"out", "resume", "record", "prompts", "quantized", "pipeline", "folder"}
SAMPLING = ["--steps", "2", "--batch-size", "2"]


def prepare(folder: Path = Path(".")) -> None:
    """Files and tiny pipelines for the calls, in the working directory."""
    import tiny_pipelines

    with contextlib.redirect_stderr(io.StringIO()):
        tiny_pipelines.pixart_sigma().pipe.save_pretrained(folder / "pixart")
        tiny_pipelines.dit().pipe.save_pretrained(folder / "dit")
    (folder / "prompts.txt").write_text("a cat\na dog\na kite\n")
    (folder / "labels.txt").write_text("0\n1\n2\n")
    for name, text in {
        "file.txt": "somebody's letter",
        "deep.json": DEEP,
        "empty": "",
        "photo.safetensors": "somebody's photo",
        "far-labels.txt": "0\n999999999\n-5\n" + "9" * 40 + "\n",
        "bytes.txt": "\udcff\udcfe",
    }.items():
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    (folder / "folder").mkdir()
    (folder / "folder" / "results.json").write_text("somebody's results")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "target").write_text("somebody's")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(Path("elsewhere", "target"))
    (folder / "dangling").symlink_to(Path("elsewhere", "nothing"))
    made = ["pixart", "--quantized", "w4a16-g16", "--prompts", "prompts.txt", *SAMPLING, "--json"]
    for command, extra in (("calibrate", ["--check", "0"]), ("readout", [])):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([command, *made, *extra, "--out", f"{command}.safetensors"]) == 0


def bases() -> list[list[str]]:
    """Calls that are right, and take about a second."""
    pixart = ["pixart", "--quantized", "w4a16-g16", "--prompts", "prompts.txt", *SAMPLING]
    dit = ["dit", "--quantized", "w4a16-g16", "--prompts", "labels.txt", *SAMPLING]
    record = ["--record", "calibrate.safetensors"]
    return [
        ["calibrate", *pixart, "--check", "0"],
        ["readout", *pixart],
        ["refit", *pixart],
        ["restore", *pixart, "--images", "0"],
        ["sample", *pixart],
        ["sample", *dit],
        ["calibrate", *dit, "--check", "0"],
        ["compare", *pixart, *record],
        ["quantize", "pixart", "--method", "rtn"],
        ["quantize", "pixart", "--method", "svdquant", "--prompts", "prompts.txt", *SAMPLING],
        ["fold", "pixart", "--quantized", "w4a16-g16", "--record", "readout.safetensors"],
        ["inspect", "calibrate.safetensors"],
        ["export", "folder"],
        ["plan", "zoo:pixart-sigma", "--quantized", "w4a16-g16"],
        ["demo", "--images", "2"],
        ["zoo", "card", "pixart-sigma"],
        ["recommend", "calibrate.safetensors"],
        ["reproduce", "q-drift", "--list"],
        ["pull", "nobody/nothing"],
    ]


def generated(seed: int) -> list[str]:
    """One call: a right one, a few of its options changed to what nobody should pass."""
    rng = random.Random(seed)
    call = list(rng.choice(bases()))
    wrong = [_wrong(call[0], rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if call[0] not in ("inspect", "plan", "zoo", "demo") or rng.random() < 0.3:
        call += ["--out", f"out-{seed}"]
    for words in wrong:
        call += words
    if call[0] == "demo":
        call += ["--images", rng.choice(("1", "2", "0", "x"))]  # a real demo takes minutes
    elif rng.random() < 0.15 and len(call) > 1:
        call[1] = rng.choice((*WORDS, *PLACES, "zoo:nope", "dit", "nobody/nothing", "w4a8"))
    if rng.random() < 0.5:
        call.append("--json")
    refuse_outside(call)
    return call


def _wrong(command: str, rng: random.Random) -> list[str]:
    action = rng.choice(_options(command))
    name = rng.choice(action.option_strings)
    if action.nargs == 0:
        return [name]
    if action.dest == "call":
        return [name, f"{rng.choice(CALLED)}={rng.choice(VALUES)}"]
    if action.dest == "set":
        return [name, f"{rng.choice(('rank', 'group', 'bits', ''))}={rng.choice(VALUES)}"]
    if action.dest == "scheduler":
        return [name, rng.choice((*scheduler_names(), *WORDS))]
    if action.dest == "device":
        return [name, rng.choice(("cuda", "cuda:99", "nope", "meta", "mps", *WORDS))]
    pool = (*WORDS, *NUMBERS)
    if action.dest in PATHS:
        pool = (*WORDS[:-1], *PLACES, "far-labels.txt", "bytes.txt")
        pool = tuple(p for p in pool if action.dest != "prompts" or p not in ("pipe", "-"))
    if action.choices:
        pool = (*pool, *action.choices)
    # As one word: argparse takes a value that begins with a minus for an option of its own.
    return [f"{name}={rng.choice(pool)}"]


def _options(command: str) -> list[argparse.Action]:
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    left_out = {"help", "json", "traceback"}
    chosen = commands.choices[command]
    return [a for a in chosen._actions if a.option_strings and a.dest not in left_out] or [
        argparse.Action(["--colour"], "colour")
    ]


@dataclass(frozen=True)
class Outcome:
    """What a call came to: ``word`` is ``done``, ``refused``, ``usage``, or a fault in capitals."""

    word: str
    said: str
    seconds: float


def call(arguments: Sequence[str]) -> Outcome:
    """Run it in this process and judge it."""
    refuse_outside(arguments)
    before = listing()
    out, err = io.StringIO(), io.StringIO()
    began, state = time.process_time(), torch.random.get_rng_state()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            code = main(list(arguments))
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException as e:
        return Outcome("TRACEBACK", repr(e)[:300], time.process_time() - began)
    seconds = time.process_time() - began
    torch.random.set_rng_state(state)
    said = err.getvalue()
    strays = sorted(_strays(before, arguments))
    if strays:
        return Outcome("STRAY FILES", ", ".join(strays[:5]), seconds)
    if "Traceback" in said:
        return Outcome("TRACEBACK", said[-300:], seconds)
    if code and seconds > LIMIT:
        return Outcome("SLOW", said[-300:], seconds)
    if code == 0:
        if "--json" in arguments:
            try:
                found = json.loads(out.getvalue(), parse_constant=_refuse_constant)
                if arguments[0] in SCHEMAS:
                    check_json(found, SCHEMAS[arguments[0]], arguments[0])
            except ValueError as e:
                return Outcome("NOT JSON", f"{e}: {out.getvalue()[:200]}", seconds)
        return Outcome("done", "", seconds)
    if code == 1 and out.getvalue().strip() and "--json" in arguments:
        return Outcome("OUTPUT OF A FAILURE", out.getvalue()[:200], seconds)
    last = said.strip().splitlines()[-1:] or [""]
    word = {1: "refused", 2: "usage"}.get(code, f"EXIT CODE {code}")
    if not last[0]:
        word = "WITHOUT A WORD"
    elif "--traceback shows all" in last[0]:
        word = "unexpected"
    return Outcome(word, last[0][:300], seconds)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _strays(before: dict[str, tuple[int, int]], arguments: Sequence[str]) -> set[str]:
    """Files that are new or changed and not below a place that the call names for its output."""
    after = listing()
    changed = {n for n in after.keys() | before.keys() if after.get(n) != before.get(n)}
    given = [
        value
        for i, word in enumerate(arguments)
        for name, _, rest in [word.partition("=")]
        if name in ("--out", "--resume")
        for value in [rest or (arguments[i + 1] if i + 1 < len(arguments) else "")]
    ]
    default = {"demo": "evenkeel-demo"}.get(arguments[0], "")
    places = [str(Path(p)) for p in (*given, default) if p]
    return {n for n in changed if not any(n == p or n.startswith(f"{p}/") for p in places)}
