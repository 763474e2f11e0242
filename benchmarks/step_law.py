"""How long it takes to read a sampler's step law.

Once per schedule: a copy of the scheduler makes one run on scalars.
Run: OMP_NUM_THREADS=1 python benchmarks/step_law.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from timing import Spread, interleaved, report

from evenkeel.hosts.scheduler.probing import probe_scheduler

REPEATS = 40
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DPM-Solver++": DPMSolverMultistepScheduler,
    # Its default ends at noise level zero, where the solver divides by it.
    "UniPC": partial(UniPCMultistepScheduler, final_sigmas_type="sigma_min"),
    "Euler": EulerDiscreteScheduler,
    "flow-matching Euler": FlowMatchEulerDiscreteScheduler,
}


def prepared(make: Callable[[], Any], steps: int) -> Callable[[], object]:
    scheduler = make()
    scheduler.set_timesteps(steps)
    return partial(probe_scheduler, scheduler)


def main() -> None:
    torch.set_num_threads(1)
    for steps in (20, 50):
        variants = {name: partial(prepared, make, steps) for name, make in SCHEDULERS.items()}
        cpu = interleaved(variants, repeats=REPEATS)
        wall = interleaved(variants, repeats=REPEATS, clock=time.perf_counter)
        for name in SCHEDULERS:
            cpu_ms, wall_ms = Spread.of(cpu[name]), Spread.of(wall[name])
            report(
                {
                    "benchmark": "step_law",
                    "case": name,
                    "steps": steps,
                    "cpu_ms": cpu_ms.as_dict(2),
                    "wall_ms": wall_ms.as_dict(2),
                },
                f"{name}, {steps} steps: {cpu_ms} ms ({wall_ms} ms by the clock on the wall)",
            )


if __name__ == "__main__":
    main()
