"""``scripts/kills``: stop every command that writes at random moments, start it again, and compare.

A parent imports everything once and forks a child for each run. What is compared is every file that an
undisturbed run leaves, without times; what is judged: the exit code, what was said, files under their
final names while the job lay dead, the result of the second run, and leftovers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from evenkeel.cli import main as evenkeel
from evenkeel.errors import EvenkeelError
from evenkeel.reproduction.cells import Paper
from evenkeel.storage import kind_of
from fuzzing.sandbox import refuse_outside, sandbox

_PIXART = ["pixart", "--quantized", "w4a16-g16-r2", "--prompts", "prompts.txt", "--steps", "2"]
_ASKED = [*_PIXART, "--batch-size", "1", "--json"]
_KEPT = ["--resume", "out/unfinished"]
JOBS = {
    "calibrate": ["calibrate", *_ASKED, "--check", "0", "--out", "out/r.safetensors", *_KEPT],
    "readout": ["readout", *_ASKED, "--out", "out/r.safetensors"],
    "refit": ["refit", *_ASKED, "--out", "out"],
    "restore": ["restore", *_ASKED, "--budget", "50%", "--images", "0", "--out", "out"],
    "sample": ["sample", *_ASKED, "--out", "out"],
    "compare": ["compare", *_ASKED, "--record", "record.safetensors", "--out", "out"],
    "quantize": [
        *("quantize", "pixart", "--method", "svdquant", "--set", "rank=2", "--set", "group=16"),
        *(
            "--prompts",
            "prompts.txt",
            "--steps",
            "2",
            "--batch-size",
            "1",
            "--json",
            "--out",
            "out",
        ),
    ],
    "fold": [
        *("fold", *_PIXART[:3], "--record", "shared.safetensors", "--json", "--out", "out"),
    ],
    "export": ["export", "fitted", "--layout", "kohya", "--json", "--out", "out/lora.safetensors"],
    "demo": [
        *("demo", "--images", "3", "--calibration-prompts", "2", "--json", "--out", "out"),
    ],
    "reproduce": ["reproduce", "tiny", "--images", "3", "--json", "--out", "out"],
    "training": ["ldm-8", "--work", "out/work", "--out", "out/zoo"],
}
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
WAYS = (*SIGNALS, "vanish", "twice", "full")


def start(job: str) -> int:
    """A child that runs the job; its words go to ``said``. Returns its process id."""
    arguments = JOBS[job]
    refuse_outside(arguments)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open("said", "w") as said:
            os.dup2(said.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        sys.stdout = os.fdopen(1, "w")
        try:
            code = (_trained if job == "training" else evenkeel)(arguments)
        except BaseException:
            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _trained(arguments: Sequence[str]) -> int:
    """The training of a twin of the zoo, whose denoiser sees five batches of two small pictures."""
    from evenkeel import zoo
    from evenkeel.zoo.making import train
    from evenkeel.zoo.making.loop import Recipe
    from evenkeel.zoo.making.twins import ldm

    def tiny(name: str, work: Path) -> Path:
        pipe = zoo.load(name)
        ldm.PICTURES, ldm.BATCH = 16, 2
        ldm.RECIPES_8 = (Recipe(steps=5, learning_rate=1e-3, seed=1, save_every=2),)
        ldm.train_denoiser(8, pipe.vae, work / name).save_pretrained(work / name / "pipeline")
        return work / name / "pipeline"

    train.train = tiny
    return train.main(arguments)


def _tiny_paper() -> None:
    """What ``reproduce tiny`` finds: one cell, with what takes seconds."""
    from evenkeel import reproduction

    numbers = {
        name: {"FID": 10.0 + i} for i, name in enumerate(("full precision", "Q", "quantized"))
    }
    quantizer = {"method": "rtn", "weight_bits": 3, "activation_bits": 4, "group": 32}
    cell = reproduction.Cell("pixart-sigma", quantizer, 2, 3, {"Q": "q-drift:published"})
    row = reproduction.Row("1", "1", "a model", numbers, ("Q", "FID"), cell)
    found = Paper("tiny", "Tiny", "a source", "data", (row,))
    reproduction.paper = lambda name: found


def ended(child: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def snapshot() -> dict[str, str]:
    """Every file below ``out`` and what it says, without times and without a cell's own work."""
    found = {}
    for path in sorted(Path("out").rglob("*")):
        if path.is_file() and "1-bits" not in path.parts:
            found[path.relative_to("out").as_posix()] = _said_by(path)
    return found


_TIMES = ("seconds", "digest", "files")  # digests of what holds times change with them


def _said_by(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):
            content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
    elif path.suffix == ".html":
        content = b""
    elif path.suffix == ".jsonl":
        content = repr([_timeless(json.loads(line)) for line in content.splitlines()]).encode()
    elif kind_of(path) in ("images", "training of the zoo"):  # their headers hold times
        from safetensors.torch import load

        content = repr([(n, t.tolist()) for n, t in sorted(load(content).items())]).encode()
    return hashlib.sha256(content).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not k.startswith(_TIMES)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def broken() -> list[str]:
    """Files under their final names that cannot be read."""
    import evenkeel as library
    from evenkeel.quantizers import load_quantized

    found = []
    for path in sorted(Path("out").rglob("*")):
        try:
            if path.suffix == ".json" and path.is_file():
                json.loads(path.read_bytes())
            if path.name == "quantized.json":
                load_quantized(path.parent)
            if path.suffix == ".safetensors" and kind_of(path) in ("record", "readout", "adapters"):
                library.load(path)
            if path.suffix == ".png":
                from PIL import Image

                Image.open(path).load()
        except (EvenkeelError, ValueError, OSError) as e:
            found.append(f"{path}: {e}")
    return found


def tried(job: str, way: str, moment: float, good: dict[str, str]) -> str:
    """Disturb one run at this moment (seconds), run it again; "" or what is wrong."""
    shutil.rmtree("out", ignore_errors=True)
    child = start(job)
    time.sleep(moment)
    codes = {0, 1}
    if way in SIGNALS:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, SIGNALS[way])
        codes = {0, -9 if way == "kill" else 130}
    elif way == "vanish":
        shutil.rmtree("out", ignore_errors=True)
    elif way == "twice":
        Path("said").rename("said-first") if Path("said").exists() else None
        second = start(job)
        code, words = ended(second), Path("said").read_text()
        if code not in codes or "Traceback" in words:
            return f"EXIT {code} of the second: {words[-300:]}"
    code, words = ended(child), _words(way)
    if code not in codes:
        return f"EXIT {code}: {words[-300:]}"
    if "Traceback" in words or "traceback shows all" in words:
        return f"TRACEBACK: {words[-300:]}"
    if code == 130 and "interrupted; " not in words:
        return f"NOT SAID: {words[-300:]}"
    if bad := broken():
        return f"BROKEN: {bad}"
    return again(job, good)


def _words(way: str) -> str:
    first = Path("said-first")
    path = first if way == "twice" and first.exists() else Path("said")
    return path.read_text()


def again(job: str, good: dict[str, str]) -> str:
    """Run the job to its end and compare."""
    code = ended(start(job))
    if code:
        return f"AGAIN {code}: {Path('said').read_text()[-300:]}"
    found = snapshot()
    if found.keys() != good.keys():
        return f"OTHER FILES: {sorted(found.keys() ^ good.keys())}"
    different = [n for n in good if good[n] != found[n]]
    return f"OTHER CONTENT: {different}" if different else ""


def full(job: str, size: int, good: dict[str, str]) -> str:
    """The same on a disk of so many bytes, which is larger when it is run again."""
    shutil.rmtree("out", ignore_errors=True)
    Path("out").mkdir()
    with _disk(size):
        code = ended(start(job))
        words = Path("said").read_text()
        if code == 0:
            return ""
        if code != 1 or "Traceback" in words or "No space left" not in words or "out" not in words:
            return f"FULL {code}: {words[-300:]}"
        if bad := broken():
            return f"BROKEN: {bad}"
        subprocess.run(["mount", "-o", "remount,size=100m", "out"], check=True)
        return again(job, good)


@contextlib.contextmanager
def _disk(size: int) -> Iterator[None]:
    size = max(4096, size // 4096 * 4096)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "out"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "out"], check=True)


def prepare(jobs: Collection[str]) -> None:
    """What these jobs read."""
    import tiny_pipelines

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        tiny_pipelines.pixart_sigma().pipe.save_pretrained("pixart")
        Path("prompts.txt").write_text("a cat\na dog\na kite\n")
        for name, reader, arguments in (
            ("record", "compare", ["calibrate", *_ASKED, "--check", "0"]),
            ("shared", "fold", ["readout", *_ASKED, "--form", "shared"]),
        ):
            if reader in jobs:
                assert evenkeel([*arguments, "--out", f"{name}.safetensors"]) == 0
        if "export" in jobs:
            fitted = ["--budget", "50%", "--images", "0", "--out", "fitted"]
            assert evenkeel(["restore", *_ASKED, *fitted]) == 0
    _tiny_paper()


def main() -> int:
    """Every job, every way, so many moments; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="scripts/kills", description=__doc__)
    parser.add_argument("--job", choices=("all", *JOBS), action="append")
    parser.add_argument("--way", choices=("all", *WAYS), action="append")
    parser.add_argument("--moments", type=int, default=20, help="of every job and way")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jobs = [*JOBS] if not options.job or "all" in options.job else options.job
    ways = [*WAYS] if not options.way or "all" in options.way else options.way
    return handful([(job, way) for job in jobs for way in ways], options.moments, options.seed)


def handful(pairs: Sequence[tuple[str, str]], moments: int = 1, seed: int = 0) -> int:
    """These jobs disturbed in these ways, at so many moments each; 1 if anything is wrong."""
    runs = faults = 0
    with sandbox():
        prepare([job for job, _ in pairs])
        for job in dict.fromkeys(job for job, _ in pairs):
            shutil.rmtree("out", ignore_errors=True)
            began = time.monotonic()
            if code := ended(start(job)):
                print(f"{job} cannot run: {code}: {Path('said').read_text()}")
                return 1
            lasted, good = time.monotonic() - began, snapshot()
            size = sum(p.stat().st_size for p in Path("out").rglob("*") if p.is_file())
            for way in (way for name, way in pairs if name == job):
                if way == "full" and not _may_mount():
                    print("no tmpfs can be mounted here: left out")
                    continue
                rng, wrong = random.Random(f"{seed} {job} {way}"), 0
                for _ in range(moments):
                    share = rng.random()
                    if way == "full":
                        found = full(job, int(share * size), good)
                    else:
                        found = tried(job, way, share * lasted, good)
                    if found:
                        wrong += 1
                        print(f"  {job}, {way} at {share:.3f}: {found!a}", flush=True)
                runs, faults = runs + moments, faults + wrong
                print(f"{job}, {way}: {moments} runs, {wrong} wrong", flush=True)
    print(f"{runs} runs, {faults} faults")
    return int(faults > 0)


def _may_mount() -> bool:
    Path("out").mkdir(exist_ok=True)
    try:
        with _disk(4096):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


if __name__ == "__main__":
    sys.exit(main())
