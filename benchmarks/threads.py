"""What a user who sets no environment variable waits, over what the best setting would have taken.

Every command of COMMANDS in fresh processes, by the clock on the wall: with nothing set, with one
thread for every library, and with as many as there are processors; the settings in turn, and another
one first in every repeat. ``--busy N`` runs N processes beside it that do nothing but compute. A finished
run is one file in the folder; the same command later goes on from there, and prints the table.
Run: python benchmarks/threads.py runs/threads
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from timing import Spread, children_seconds, report

REPEATS, LIMIT = 3, 1.2
VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
SETTINGS = {"default": None, "one": 1, "all": os.cpu_count() or 1}
TWIN = ["zoo:pixart-sigma", "--json"]
FITTED = [*TWIN, "--quantized", "w3a4-g32-r16", "--count", "4"]
COMMANDS = {
    "demo": ["demo", "--json", "--images", "32", "--calibration-prompts", "4"],
    "calibrate": ["calibrate", *FITTED, "--check", "4"],
    "readout": ["readout", *FITTED],
    "refit": ["refit", *FITTED],
    "quantize": ["quantize", *TWIN, "--method", "svdquant", "--count", "4"],
}
BUSY = "while True: sum(range(1000))"


def seconds_of(command: str, setting: str) -> tuple[float, float]:
    """One fresh process from its start to its end: by the clock on the wall, and on the processors."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    threads = SETTINGS[setting]
    if threads is not None:
        environment |= dict.fromkeys(VARIABLES, str(threads))
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "evenkeel", *COMMANDS[command]]
        began, used = time.perf_counter(), children_seconds()
        subprocess.run(
            [*words, "--out", str(Path(folder) / "out")],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - began, children_seconds() - used


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Inside, so many other processes compute."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(folder: Path, chosen: list[str], repeats: int, beside: int) -> None:
    """Every run that the folder does not hold yet."""
    names = list(SETTINGS)
    seconds_of("readout", "one")  # whose files, compiled and in the system's cache, the others find
    for repeat in range(repeats):
        for command in chosen:
            turn = repeat % len(names)
            for setting in names[turn:] + names[:turn]:
                file = folder / f"{command.replace(' ', '-')}-{setting}-{beside}-{repeat}.json"
                if file.exists():
                    continue
                before = os.getloadavg()[0]
                wall, processors = seconds_of(command, setting)
                cell = {
                    "command": command,
                    "setting": setting,
                    "busy": beside,
                    "seconds": wall,
                    "processor_seconds": processors,
                    "load_before": before,
                }
                whole = file.with_suffix(".part")
                whole.write_text(json.dumps(cell) + "\n")
                whole.replace(file)
                print(json.dumps(cell), file=sys.stderr, flush=True)


def table(folder: Path) -> None:
    """Per command: seconds by setting, and the default over the better of the others; by both clocks."""
    cells = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    for command, beside in dict.fromkeys((c["command"], c["busy"]) for c in cells):
        mine = [c for c in cells if (c["command"], c["busy"]) == (command, beside)]
        if min(sum(c["setting"] == s for c in mine) for s in SETTINGS) < 2:
            continue
        found, said = {}, []
        for clock in ("seconds", "processor_seconds"):
            laps = {s: [c[clock] for c in mine if c["setting"] == s] for s in SETTINGS}
            spreads = {s: Spread.of(values) for s, values in laps.items()}
            best = min(("one", "all"), key=lambda s: spreads[s].median)
            over = Spread.of([a / b for a, b in zip(laps["default"], laps[best], strict=False)])
            found |= {f"{s}_{clock}": spread.as_dict(1) for s, spread in spreads.items()}
            found[f"default_over_better_{clock}"] = over.as_dict(2)
            said.append(
                f"{clock}: default {over} x the better ({best}); "
                + ", ".join(f"{s} {spread}" for s, spread in spreads.items())
                + ("" if over.median <= LIMIT else f"; OVER the limit of {LIMIT}")
            )
        report(
            {"benchmark": "threads", "case": command, "busy": beside, **found},
            f"{command}, {beside} busy processes; " + "; ".join(said),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Default threads against one and all.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute")
    parser.add_argument("--only", action="append", choices=tuple(COMMANDS), help="these commands")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with busy(options.busy):
        measure(options.folder, options.only or list(COMMANDS), options.repeats, options.busy)
    table(options.folder)


if __name__ == "__main__":
    main()
