"""Time several variants of the same work in turn and compare them repeat by repeat.

Every repeat runs all variants once, one after the other, starting with another one each time: what
slows the machine down for a while slows all of them. The clock is the processor time of this
process, which stands still while other processes have the core; run with ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import json
import platform
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

    def to_dict(self, digits: int = 4) -> dict[str, float]:
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
    variants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of processor time of every variant, one per repeat.

    A variant may return a callable: only that one is timed, so that it can prepare first.
    """
    laps: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for repeat in range(-warmup, repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            work = variants[name]()
            assert callable(work)
            start = time.process_time_ns()
            work()
            elapsed = (time.process_time_ns() - start) / 1e6
            if repeat >= 0:
                laps[name].append(elapsed)
    return laps


def ratio(laps: dict[str, list[float]], name: str, base: str) -> Spread:
    """How many times the base's time a variant takes, repeat by repeat."""
    return Spread.of([a / b for a, b in zip(laps[name], laps[base], strict=True)])


def report(case: Mapping[str, Any], line: str) -> None:
    """Print one case as JSON, then the same for people."""
    print(json.dumps({**case, "machine": machine()}))
    print(f"# {line}", flush=True)


def machine() -> str:
    """Where this ran, as far as it matters."""
    import torch

    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
