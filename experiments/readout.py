"""Readout, branch refit and what others do, on the embedded pipeline.

Frozen: calibration captions of seed s (0, 1, 2), evaluation captions of seed s + 1, the same noise in
every arm, DPM-Solver++ 2M, guidance 4.5. Arms of one JOB are measured together, paired by prompt and
noise. Finished arms are kept in --work, so an interrupted run continues. Writes readout/JOB.json and
READOUT.md beside this file.

    python experiments/readout.py --list            # the jobs, in the order of their worth
    python experiments/readout.py JOB [JOB ...]     # run some of them
    python experiments/readout.py --table           # READOUT.md from the results on disk
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, Arm, compare
from evenkeel.corrections import ExactDrift, QDrift
from evenkeel.fitting import calibrate, fit_readout, refit_branches
from evenkeel.fitting.closed_loop.fit_tac import fit_tac
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.zoo.evaluation import HandwritingEvaluator, reference_images, sample_prompts

HERE = Path(__file__).parent
RESULTS = HERE / "readout"
GUIDANCE = 4.5


@dataclass(frozen=True)
class Job:
    """One table: a quantizer, a number of steps, seeds, and which arms beside the quantized one."""

    quantizer: str
    steps: int
    images: int
    seed: int
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.quantizer}-{self.steps}steps-seed{self.seed}-{self.images}"


MAIN = (
    "q-drift",
    "exact-drift",
    "input-bias@32",
    "readout@32",
    "readout+drift@32",
    "readout+input-bias@32",
    "refit@32",
    "refit+readout@32",
    "refit+readout+drift@32",
)
SHORT = ("q-drift", "input-bias@32", "readout@8", "readout@32", "refit@32", "refit+readout@32")
PROMPTS = (
    *("readout@1", "readout+drift@1", "refit@2", "refit+readout@2"),
    *(f"{a}@{n}" for n in (4, 8, 256) for a in ("readout", "readout+drift", "refit+readout")),
)
JOBS = [
    *(Job(q, 20, 2000, s, MAIN) for s in (0, 1, 2) for q in ("w3a4-g32-r16", "w4a8-g32")),
    Job("w4a4-g32-r16", 20, 2000, 0, MAIN),
    *(Job(q, 20, 1001, 0, PROMPTS) for q in ("w3a4-g32-r16", "w4a8-g32")),
    *(Job(q, n, 1000, 0, SHORT) for n in (8, 4) for q in ("w3a4-g32-r16", "w4a8-g32")),
    Job("w8a8", 20, 1000, 0, SHORT),
    *(Job(q, n, 1000, 0, SHORT) for n in (8, 4) for q in ("w4a4-g32-r16", "w8a8")),
    *(Job(q, 20, 1001, 0, PROMPTS) for q in ("w4a4-g32-r16", "w8a8")),
]


class Fits:
    """What the arms of a job are made of; every fit is made once and timed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pipe = zoo.load("pixart-sigma")
        spec = QuantizerSpec.parse(job.quantizer)
        self.quantized = quantize_module(self.pipe.transformer, spec)[0]
        self.seconds: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        self._made: dict[Any, Any] = {}

    def arm(self, text: str) -> Arm:
        """``METHOD@PROMPTS``, with ``refit+`` in front where the denoiser is refitted first."""
        method, _, count = text.partition("@")
        n = int(count or 32)
        denoiser = self.quantized
        if method.startswith("refit"):
            denoiser = self._once("refit", n, self._refit)
            method = method.removeprefix("refit").removeprefix("+")
        correction = self._correction(method, n, denoiser) if method else None
        return Arm(text, denoiser, correction)

    def _correction(self, method: str, n: int, denoiser: Any) -> Any:
        if method in ("q-drift", "exact-drift"):
            evidence = self._once("calibrate", n, self._calibrate).evidence
            return QDrift(evidence) if method == "q-drift" else ExactDrift(evidence)
        if method == "input-bias":
            return self._once("input-bias", n, self._input_bias)
        key = "readout" if denoiser is self.quantized else "refit+readout"
        readout = self._once(key, n, lambda k: self._readout(k, denoiser))
        self.notes[f"{key}@{n}"] = [[f.penalty, f.held_out, f.bound] for f in readout.fits]
        if method == "readout+drift":
            return readout.with_drift()
        if method == "readout+input-bias":
            bias = self._once("readout+input-bias", n, lambda k: self._input_bias(k, readout))
            return type(readout)(**{**vars(readout), "then": bias})
        return readout

    def _once(self, what: str, n: int, make: Any) -> Any:
        if (what, n) not in self._made:
            began = time.perf_counter()
            self._made[what, n] = make(n)
            self.seconds[f"{what}@{n}"] = time.perf_counter() - began
        return self._made[what, n]

    def _common(self, n: int) -> dict[str, Any]:
        prompts = sample_prompts(n, self.job.seed)
        return {
            "prompts": prompts,
            "num_inference_steps": self.job.steps,
            "guidance_scale": GUIDANCE,
            "seed": 10_000 * self.job.seed,
        }

    def _calibrate(self, n: int) -> Any:
        common = self._common(n)
        return calibrate(
            self.pipe, quantized=self.quantized, batch_size=32, progress=False, **common
        )

    def _input_bias(self, n: int, correction: Any = None) -> Any:
        common = self._common(n)
        return fit_tac(
            self.pipe,
            quantized=self.quantized,
            batch_size=32,
            reconstruction=None,
            correction=correction,
            progress=False,
            **common,
        )

    def _readout(self, n: int, denoiser: Any) -> Any:
        common = self._common(n)
        return fit_readout(self.pipe, quantized=denoiser, batch_size=32, progress=False, **common)

    def _refit(self, n: int) -> Any:
        common = self._common(n)
        model, report = refit_branches(
            self.pipe, quantized=self.quantized, batch_size=32, progress=False, **common
        )
        self.notes[f"refit@{n}"] = f"{len(report.changed)} of {len(report.layers)} layers changed"
        return model


def run(job: Job, work: Path) -> None:
    fits = Fits(job)
    prompts = sample_prompts(job.images, job.seed + 1)
    arms = [Arm(FULL_PRECISION, fits.pipe.transformer), Arm(QUANTIZED, fits.quantized)]
    arms += [fits.arm(text) for text in job.arms]
    folder = work / job.name
    shared = work / f"{job.steps}steps-seed{job.seed}-{job.images}" / FULL_PRECISION
    shared.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / FULL_PRECISION
    if not link.exists():
        link.symlink_to(shared.resolve())
    comparison = compare(
        fits.pipe,
        arms,
        prompts=prompts,
        num_inference_steps=job.steps,
        guidance_scale=GUIDANCE,
        batch_size=100,
        evaluator=HandwritingEvaluator(zoo.path_of("pixart-sigma")),
        reference_images=reference_images(prompts, job.seed + 1),
        folder=folder,
        progress=False,
    )
    results = {
        "job": vars(job),
        "arms": [a.as_dict() for a in comparison.arms],
        "fit_seconds": fits.seconds,
        "notes": fits.notes,
        "torch_threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{job.name}.json").write_text(json.dumps(results) + "\n")


def closed(arm: dict[str, Any], quantized: dict[str, Any]) -> float:
    """Share of the Frechet distance between quantized and full precision that an arm takes away."""
    return 1 - arm["frechet_full_precision"]["value"] / quantized["frechet_full_precision"]["value"]


def write_table() -> None:
    lines = ["# Readout and branch refit on the embedded pipeline", ""]
    lines += [*(__doc__ or "").splitlines()[2:7], ""]
    lines += [
        "FD-FP: Frechet distance to the full-precision images, with its difference to the quantized "
        "arm (95 % paired interval). Closed: share of the quantized arm's FD-FP taken away. `@n`: "
        "calibration prompts.",
        "",
    ]
    for job in JOBS:
        path = RESULTS / f"{job.name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        lines += [
            f"## {job.quantizer}, {job.steps} steps, seed {job.seed}, {job.images} images",
            "",
        ]
        lines += [
            "| arm | FD-FP | difference | closed | PSNR dB | difference | FD to real |",
            "|---|---|---|---|---|---|---|",
        ]
        by_name = {a["name"]: a for a in results["arms"]}
        for arm in results["arms"][1:]:
            fd, psnr = arm["frechet_full_precision"], arm["psnr"]
            row = [arm["name"], f"{fd['value']:.3f}"]
            change = arm.get("difference_to_quantized", {})
            share = closed(arm, by_name[QUANTIZED])
            row += [_interval(change.get("frechet_full_precision"), 3)]
            row += [f"{100 * share:.0f} %" if change else "", f"{psnr['value']:.2f}"]
            row += [_interval(change.get("psnr"), 2), f"{arm['frechet_reference']['value']:.3f}"]
            lines.append("| " + " | ".join(row) + " |")
        seconds = ", ".join(f"{k} {v:.1f} s" for k, v in results["fit_seconds"].items())
        lines += ["", f"Fits (one thread): {seconds}.", ""]
    (HERE / "READOUT.md").write_text("\n".join(lines))


def _interval(estimate: dict[str, float] | None, digits: int) -> str:
    if not estimate:
        return ""
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", help="names, or their beginnings; all without")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/readout"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join(j.name for j in JOBS))
        return
    if not options.table:
        chosen = [j for j in JOBS if not options.jobs or j.name.startswith(tuple(options.jobs))]
        for job in chosen:
            if not (RESULTS / f"{job.name}.json").exists():
                run(job, options.work)
                write_table()
    write_table()


if __name__ == "__main__":
    main()
