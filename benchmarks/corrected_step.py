"""How much slower a corrected ``scheduler.step`` is than a plain one.

Whole runs of 20 steps at the latent sizes of SDXL, PixArt and FLUX, without the denoiser; a run before
the first measured one makes the plan. ``identity`` is a correction that changes nothing.
Run: OMP_NUM_THREADS=1 python benchmarks/corrected_step.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from timing import Spread, interleaved, ratio, report

from evenkeel.corrections import DCNC, DNS, Composite, Identity, QDrift, applicable
from evenkeel.corrections.base import Correction
from evenkeel.corrections.catalogue import available
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.scheduler.interception import install
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import step_gram
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import PairedMoments

STEPS, REPEATS = 20, 300
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
IMAGE, PACKED = LatentLayout(4, 1, 4, 1), LatentLayout(3, 2, 16, 4)


def euler() -> Any:
    return EulerDiscreteScheduler(**SD_BETAS)


def dpm_solver() -> Any:
    return DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)


def flow_euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


CASES: list[tuple[str, Callable[[], Any], tuple[int, ...], LatentLayout]] = [
    ("SDXL Euler", euler, (1, 4, 128, 128), IMAGE),
    ("PixArt DPM-Solver++", dpm_solver, (1, 4, 128, 128), IMAGE),
    ("FLUX flow-matching Euler", flow_euler, (1, 4096, 64), PACKED),
    ("16 numbers, Euler", euler, (1, 4, 2, 2), IMAGE),  # what is left is overhead
]


class Pipeline:
    """Stands for a pipeline where only the scheduler matters."""


class CountedDrift:
    """Q-Drift that counts how often a plan was asked of it."""

    name, references = "q-drift", ()

    def __init__(self, inner: QDrift) -> None:
        self.inner, self.plans = inner, 0

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> Any:
        """As Q-Drift does."""
        self.plans += 1
        return self.inner.plan(law, allow_range=allow_range)


def synthetic_evidence(law: StepLaw, channels: int) -> Evidence:
    """An error of 5 percent at every level of the law, uncorrelated with the output."""
    generator = torch.Generator().manual_seed(0)
    e, d, x = torch.randn(3, 2, law.steps, channels, 256, generator=generator)
    sizes = torch.linspace(0.04, 0.06, channels)[:, None]
    moments = PairedMoments.of(e, sizes * d, x)
    gram = step_gram(sizes[None, None] * d.double())
    return Evidence(law.prediction, law.alpha[:-1], law.sigma[:-1], moments, gram=gram)


def ready(make: Callable[[], Any]) -> Any:
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    return scheduler


class Runs:
    """Whole runs of one scheduler; calling it prepares one and returns the timed part."""

    def __init__(self, scheduler: Any, outputs: list[torch.Tensor], start: torch.Tensor) -> None:
        self.scheduler, self.outputs, self.start = scheduler, outputs, start
        self.result = start

    def __call__(self) -> Callable[[], None]:
        """Begin a run; its steps remain to be done."""
        self.scheduler.set_timesteps(STEPS)
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(self.start, self.scheduler.timesteps[0])
        return self._steps

    def _steps(self) -> None:
        sample = self.start
        for t, output in zip(self.scheduler.timesteps, self.outputs, strict=True):
            sample = self.scheduler.step(output, t, sample, return_dict=False)[0]
        self.result = sample


def measure(
    name: str,
    make: Callable[[], Any],
    shape: tuple[int, ...],
    layout: LatentLayout,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator).to(dtype)
    outputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(STEPS)]
    law = probe_scheduler(ready(make))
    drift = CountedDrift(QDrift(synthetic_evidence(law, layout.channels)))
    pipeline = Pipeline()
    corrections: dict[str, Correction | None] = {
        "plain": None,
        "identity": Identity(),
        "corrected": drift,
    }
    runs = {}
    for variant, correction in corrections.items():
        scheduler = ready(make)
        if correction is not None:
            install(scheduler, Corrector(correction, pipeline, layout=layout))
        runs[variant] = Runs(scheduler, outputs, start)
    laps = interleaved(runs, repeats=REPEATS)
    assert drift.plans == 1, f"{drift.plans} plans were made where one serves all runs"
    assert torch.equal(runs["identity"].result, runs["plain"].result)
    assert not torch.equal(runs["corrected"].result, runs["plain"].result)
    ratios = {v: ratio(laps, v, "plain") for v in ("corrected", "identity")}
    microseconds = Spread.of([1e3 * t / STEPS for t in laps["plain"]])
    added = {
        v: Spread.of([1e3 * (a - b) / STEPS for a, b in zip(laps[v], laps["plain"], strict=True)])
        for v in ratios
    }
    kind = str(dtype).removeprefix("torch.")
    report(
        {
            "benchmark": "corrected_step",
            "case": name,
            "shape": shape,
            "dtype": kind,
            "plain_us_per_step": microseconds.as_dict(1),
            **{f"{v}_over_plain": r.as_dict() for v, r in ratios.items()},
            **{f"{v}_added_us_per_step": a.as_dict(1) for v, a in added.items()},
        },
        f"{name}, {kind}: corrected {ratios['corrected']} x plain, identity "
        f"{ratios['identity']} x plain; us per step: plain {microseconds.median:.1f}, "
        f"corrected +{added['corrected'].median:.1f}, identity +{added['identity'].median:.1f}",
    )


def every_correction(
    name: str, make: Callable[[], Any], shape: tuple[int, ...], layout: LatentLayout
) -> None:
    """All corrections of the catalogue on one scheduler, float32: scheduler.step over the plain one."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    outputs = [torch.randn(shape, generator=generator) for _ in range(STEPS)]
    law = probe_scheduler(ready(make))
    evidence = synthetic_evidence(law, layout.channels)
    made = available(evidence, {})[0]
    # No histogram was drawn, so the plain variance; the step does not know the difference.
    made["dcnc"] = DCNC(evidence, estimator="std")
    made["dcnc+dns"] = Composite((made["dcnc"], DNS(evidence)))
    found, _ = applicable({n: c for n, c in made.items() if n != "qncd"}, law)
    pipeline = Pipeline()
    runs = {"plain": Runs(ready(make), outputs, start)}
    for variant, correction in found.items():
        scheduler = ready(make)
        install(scheduler, Corrector(correction, pipeline, layout=layout))
        runs[variant] = Runs(scheduler, outputs, start)
    laps = interleaved(runs, repeats=REPEATS // 5)
    ratios = {v: ratio(laps, v, "plain") for v in found}
    report(
        {
            "benchmark": "corrected_step, every correction",
            "case": name,
            "shape": shape,
            **{f"{v}_over_plain": r.as_dict() for v, r in ratios.items()},
        },
        f"{name}, float32, over the plain scheduler.step: "
        + ", ".join(f"{v} {r}" for v, r in ratios.items()),
    )


def main() -> None:
    torch.set_num_threads(1)
    for case in CASES[:2]:
        every_correction(*case)
    for name, make, shape, layout in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            measure(name, make, shape, layout, dtype)


if __name__ == "__main__":
    main()
