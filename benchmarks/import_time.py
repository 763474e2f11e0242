"""How long importing evenkeel and commands that only tell something take beyond starting Python.

Each is a fresh process; files are in the operating system's cache after the warm-up.
Run: python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from timing import Spread, children_seconds, interleaved, report

REPEATS = 20
COMMANDS = {
    "python": ["-c", "pass"],
    "import": ["-c", "import evenkeel"],
    "help": ["-m", "evenkeel", "--help"],
    "help of one": ["-m", "evenkeel", "compare", "--help"],
    "zoo list": ["-m", "evenkeel", "zoo", "list"],
}
HEAVY = ("torch", "diffusers", "transformers", "numpy", "scipy", "matplotlib")
LOADED = """
import sys, contextlib, io, evenkeel
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    if sys.argv[1:]:
        import evenkeel.cli
        evenkeel.cli.main(sys.argv[1:])
print(*sys.modules)
"""


def run(arguments: list[str]) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def prepared(arguments: list[str]) -> Callable[[], str]:
    return partial(run, arguments)


def main() -> None:
    variants = {name: partial(prepared, arguments) for name, arguments in COMMANDS.items()}
    cpu = interleaved(variants, repeats=REPEATS, clock=children_seconds)
    wall = interleaved(variants, repeats=REPEATS, clock=time.perf_counter)
    for name in list(COMMANDS)[1:]:
        words = ["-c", LOADED, *COMMANDS[name][2:]]
        modules = {module.partition(".")[0] for module in run(words).split()}
        beyond = [a - b for a, b in zip(cpu[name], cpu["python"], strict=True)]
        beyond_ms, cpu_ms, wall_ms = Spread.of(beyond), Spread.of(cpu[name]), Spread.of(wall[name])
        heavy = [h for h in HEAVY if h in modules]
        report(
            {
                "benchmark": "import_time",
                "case": " ".join(["python", *COMMANDS[name]]),
                "beyond_python_cpu_ms": beyond_ms.as_dict(1),
                "cpu_ms": cpu_ms.as_dict(1),
                "wall_ms": wall_ms.as_dict(1),
                "heavy_modules": heavy,
            },
            f"{' '.join(COMMANDS[name])}: {beyond_ms} ms beyond Python's start ({cpu_ms} ms in "
            f"all, {wall_ms} ms by the clock on the wall); heavy modules loaded: {heavy or 'none'}",
        )


if __name__ == "__main__":
    main()
