"""Time several variants of the same work in turn and compare them repeat by repeat.

Every repeat runs all variants once, one after the other, starting with another one each time: what
slows the machine down for a while slows all of them. The clock is the processor time of this
process, which stands still while other processes have the core; run with ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of n repeats."""

    n: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(len(values), median, low, high)

    def as_dict(self, digits: int = 4) -> dict[str, float]:
        """For a JSON line: median and quartiles, rounded."""
        return {
            "n": self.n,
            "median": round(self.median, digits),
            "q1": round(self.low, digits),
            "q3": round(self.high, digits),
        }

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleaved(
    variants: Mapping[str, Callable[[], Callable[[], object]]],
    *,
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Milliseconds of every variant, one per repeat.

    A variant is called to prepare and returns the work to be timed.
    """
    laps: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for repeat in range(-warmup, repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            work = variants[name]()
            start = clock()
            work()
            elapsed = 1e3 * (clock() - start)
            if repeat >= 0:
                laps[name].append(elapsed)
    return laps


def children_seconds() -> float:
    """Processor time of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ratio(laps: dict[str, list[float]], name: str, base: str) -> Spread:
    """How many times the base's time a variant takes, repeat by repeat."""
    return Spread.of([a / b for a, b in zip(laps[name], laps[base], strict=True)])


def report(case: Mapping[str, Any], line: str) -> None:
    """Print one case as JSON, then the same for people."""
    machine = f"{os.cpu_count()}-core {platform.machine()} CPU"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    print(json.dumps({**case, "machine": machine, "python": platform.python_version(), **versions}))
    print(f"# {line}", flush=True)
