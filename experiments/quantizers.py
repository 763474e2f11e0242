"""Quantization methods on the embedded pipeline, and whether corrections still matter after them.

Frozen: calibration on 32 captions of seed 0 (8 of 20 steps kept, all 20 for the methods that quantize
the time embedding), evaluation on captions of seed 1 with
the same noise in every arm, DPM-Solver++ 2M, 20 steps, guidance 4.5. Every quantized denoiser is saved,
loaded again and measured as loaded; a process of its own quantizes it, so that time and peak memory are
its own. Jobs marked with corrections also get the published correction that the marginal check (64 other
captions) ranks first, Readout + exact drift, and the refit. Finished work is kept in --work, so an
interrupted run continues. Writes quantizers/JOB.json and QUANTIZERS.md beside this file.

    python experiments/quantizers.py --list            # the jobs, in the order of their worth
    python experiments/quantizers.py JOB [JOB ...]     # run some of them
    python experiments/quantizers.py --table           # QUANTIZERS.md from the results on disk
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, Arm, compare
from evenkeel.comparing.marginal_check import marginal_check
from evenkeel.corrections import applicable
from evenkeel.corrections.catalogue import available
from evenkeel.fitting import calibrate, fit_readout, refit_branches
from evenkeel.fitting.quantize import quantize
from evenkeel.planning.bit_operations import bit_operations
from evenkeel.quantizers import DEFAULT_SKIP, RoundToNearest, load_quantized
from evenkeel.quantizers.methods.catalogue import method_from
from evenkeel.quantizers.saved.report import QuantizationReport
from evenkeel.zoo.evaluation import HandwritingEvaluator, reference_images, sample_prompts

HERE = Path(__file__).parent
RESULTS = HERE / "quantizers"
STEPS, GUIDANCE, IMAGES, PROMPTS = 20, 4.5, 1000, 32


@dataclass(frozen=True)
class Job:
    """One quantized denoiser; ``method`` as ``Method.as_dict`` writes it."""

    name: str
    method: dict[str, Any]
    corrections: bool = False
    calibration_steps: int = 8


def _job(
    name: str, method: str, bits: str, corrections: bool = False, steps: int = 8, **options: Any
) -> Job:
    weight, activation = (int(b) for b in bits[1:].split("a"))
    fields = {"weight_bits": weight, "activation_bits": activation, **options}
    return Job(f"{name}-{bits}", {"method": method, **fields}, corrections, steps)


CHANNEL: dict[str, Any] = {"group": None}
STATIC: dict[str, Any] = {"group": None, "activation": "static"}
ALL: dict[str, Any] = {"skip": []}
G32: dict[str, Any] = {"group": 32, "activation": "group"}
SVD: dict[str, Any] = {"group": 32, "rank": 16}  # ranks of a third of the width would not compare
# Of 20,000 iterations, what two cores can do; all steps, for the time embedding is quantized too.
FEW: dict[str, Any] = {"steps": STEPS, "iterations": 300, "rounding_rate": 0.02}
Q_DIFFUSION: dict[str, Any] = {"activation_iterations": 200, "activation_rate": 2e-3}
NEAREST: dict[str, Any] = {"steps": STEPS, "iterations": 0, "activation_iterations": 0}
JOBS = [
    *(_job("rtn-g32", "rtn", b, b == "w3a4", **G32) for b in ("w4a4", "w3a4")),
    *(_job("gptq-g32", "rtn", b, rounding="gptq", **G32) for b in ("w4a4", "w3a4")),
    *(_job("svdquant", "svdquant", b, True, **SVD) for b in ("w4a4", "w3a4")),
    _job("svdquant", "svdquant", "w8a8", rank=16),
    *(_job("rtn-channel", "rtn", b, **CHANNEL) for b in ("w8a8", "w4a8")),
    *(_job("gptq-channel", "rtn", b, rounding="gptq", **CHANNEL) for b in ("w4a8",)),
    # MixDQ's inputs are static and every layer is quantized: its baseline, then with the usual layers kept.
    *(_job(f"rtn-static{n}", "rtn", "w4a8", **STATIC, **s) for n, s in (("-all", ALL), ("", {}))),
    _job("mixdq", "mixdq", "w4a8", True),
    _job("mixdq-kept", "mixdq", "w4a8", skip=list(DEFAULT_SKIP)),
    *(_job("vidit-q", "vidit-q", b) for b in ("w8a8", "w4a8")),
    *(
        _job("q-diffusion-nearest", "q-diffusion", b, **NEAREST)
        for b in ("w8a8", "w4a8", "w3a8", "w2a8")
    ),
    *(
        _job("q-diffusion", "q-diffusion", b, b == "w3a8", **FEW, **Q_DIFFUSION)
        for b in ("w8a8", "w4a8", "w3a8", "w2a8")
    ),
    *(_job("ptq4dit", "ptq4dit", b, b == "w4a8", **FEW) for b in ("w8a8", "w4a8")),
    _job("nvfp4", "rtn", "w4a4", weight_format="nvfp4", activation_format="nvfp4"),
    _job("mxfp4", "rtn", "w4a4", weight_format="mxfp4", activation_format="mxfp4"),
    _job("fp8", "rtn", "w8a8", weight_format="fp8_e4m3", activation_format="fp8_e4m3", **CHANNEL),
    _job("nf4", "rtn", "w4a16", weight_format="nf4"),
]


class Memory:
    """The most memory that this process has had resident since the start, beyond what it had then."""

    def __enter__(self) -> Memory:
        self._done, self.most = threading.Event(), 0
        gc.collect()
        self._before = self._resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, self._resident() - self._before)

    def _resident(self) -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


def make(job: Job, folder: Path) -> None:
    """Quantize and save; run in a process of its own. Writes cost.json beside the denoiser."""
    pipe = zoo.load("pixart-sigma")
    asked = {"prompts": sample_prompts(2, 9), "num_inference_steps": 2, "progress": False}
    warm = RoundToNearest(activation="static")  # what libraries allocate once
    quantize(pipe, warm, **asked)
    began = time.process_time()
    with Memory() as memory:
        _quantize(job, pipe, folder)
    seconds = time.process_time() - began
    cost = {"seconds": seconds, "more_memory_bytes": memory.most}
    (folder / "cost.json").write_text(json.dumps(cost) + "\n")


def _quantize(job: Job, pipe: Any, folder: Path) -> None:
    quantize(
        pipe,
        method_from(job.method),
        prompts=sample_prompts(PROMPTS, 0),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        calibration_steps=job.calibration_steps,
        out=folder,
        progress=False,
    )


def run(job: Job, work: Path) -> None:
    folder = work / "denoisers" / job.name
    if not (folder / "cost.json").exists():
        _in_own_process(job, work)
    pipe = zoo.load("pixart-sigma")
    quantized, report = load_quantized(folder)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "progress": False}
    arms = [Arm(FULL_PRECISION, pipe.transformer), Arm(QUANTIZED, quantized)]
    chosen = ""
    if job.corrections:
        chosen, more = corrected(pipe, quantized, arms, options)
        arms += more
    prompts = sample_prompts(IMAGES, 1)
    comparison = compare(
        pipe,
        arms,
        prompts=prompts,
        batch_size=100,
        evaluator=HandwritingEvaluator(zoo.path_of("pixart-sigma")),
        reference_images=reference_images(prompts, 1),
        folder=_folder(job, work),
        **options,
    )
    results = {
        "method": job.method,
        "arms": [a.as_dict() for a in comparison.arms],
        "published": chosen,
        "report": {k: v for k, v in report.as_dict().items() if k.endswith("bytes")},
        "bit_operations": counted(report),
        "file_bytes": (folder / "quantized.safetensors").stat().st_size,
        "cost": json.loads((folder / "cost.json").read_text()),
        "torch_threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{job.name}.json").write_text(json.dumps(results) + "\n")


def counted(report: QuantizationReport) -> dict[str, int]:
    """Bit operations of one call with one row, and with 16 x 16 bits."""
    found = bit_operations("zoo:pixart-sigma", report)
    assert found is not None
    return found.as_dict()


def _in_own_process(job: Job, work: Path) -> None:
    # Freed tensors go back to the system at once, or the peak would be the allocator's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--make", job.name, "--work", str(work)]
    subprocess.run(command, check=True, env=environment)


def measure_again(job: Job, work: Path) -> None:
    """Time and memory of a job whose images are made already."""
    with tempfile.TemporaryDirectory() as folder:
        _in_own_process(job, Path(folder))
        cost = json.loads((Path(folder) / "denoisers" / job.name / "cost.json").read_text())
    path = RESULTS / f"{job.name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cost": cost}, indent=1) + "\n")


def corrected(
    pipe: Any, quantized: Any, arms: list[Arm], options: dict[str, Any]
) -> tuple[str, list[Arm]]:
    """The published correction that the marginal check ranks first, and ours."""
    asked = {"quantized": quantized, "prompts": sample_prompts(PROMPTS, 0), "batch_size": 32}
    record = calibrate(pipe, **asked, **options)
    made, _ = available(record.evidence, {})
    ours = ("exact-drift", "covariance-drift", "self-consistent")
    found, _ = applicable({k: v for k, v in made.items() if k not in ours}, record.law)
    trial = arms + [Arm(name, quantized, correction) for name, correction in found.items()]
    check = marginal_check(pipe, trial, prompts=sample_prompts(64, 2), batch_size=32, **options)
    best = min(check.arms, key=lambda a: a.scores["squared_error"].value)
    readout = fit_readout(pipe, **asked, **options)
    refitted, _ = refit_branches(pipe, **asked, **options)
    return best.name, [
        Arm(f"published: {best.name}", quantized, found[best.name]),
        Arm("readout + drift", quantized, readout.with_drift()),
        Arm("refit", refitted),
    ]


def _folder(job: Job, work: Path) -> Path:
    """Where a job keeps its images; full precision is shared."""
    folder, shared = work / "images" / job.name, work / "images" / FULL_PRECISION
    shared.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / FULL_PRECISION
    if not link.exists():
        link.symlink_to(shared.resolve())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", help="names, or their beginnings; all without")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/quantizers"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--costs", action="store_true", help="only time and memory, again")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(j.name for j in JOBS))
        return
    if options.make:
        job = next(j for j in JOBS if j.name == options.make)
        make(job, options.work / "denoisers" / job.name)
        return
    chosen = [j for j in JOBS if not options.jobs or j.name.startswith(tuple(options.jobs))]
    for job in [] if options.table else chosen:
        if options.costs and (RESULTS / f"{job.name}.json").exists():
            measure_again(job, options.work)
        elif not options.costs and not (RESULTS / f"{job.name}.json").exists():
            run(job, options.work)
    from quantizers_table import write_table

    write_table([j.name for j in JOBS], RESULTS, HERE / "QUANTIZERS.md")


if __name__ == "__main__":
    main()
