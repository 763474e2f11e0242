"""Real quantization backends on this CPU: time per image, bytes as stored, distance to full precision.

The embedded pipeline in float32 and bfloat16, and with its denoiser quantized by every backend that has
CPU kernels: uncorrected, with Q-Drift, and with a readout. Writes BACKENDS.md beside this file.
Run: OMP_NUM_THREADS=1 python benchmarks/backends.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Spread, interleaved, ratio
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel import Arm, QDrift, calibrate, fit_readout, zoo
from evenkeel.comparing.comparison import ArmResult, measure
from evenkeel.comparing.generation import corrected, generate
from evenkeel.corrections.base import Correction
from evenkeel.hosts.backends.catalogue import backend_text, bytes_of
from evenkeel.hosts.pipeline.pipelines import denoiser_swapped, quiet, run_pipeline
from evenkeel.zoo.evaluation import HandwritingEvaluator, sample_prompts

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from quantized_by import BACKENDS

CALIBRATION, BATCH, TIMED = 32, 32, 8
FULL, HALF = "float32", "bfloat16"
SHOWN = [
    n
    for n in BACKENDS
    if n not in ("bitsandbytes fp4", "gguf Q5_0", "sdnq int4", "torchao fake w3a4")
]
PACKAGES = ("torchao", "bitsandbytes", "gguf", "optimum-quanto", "sdnq", "nvidia-modelopt")


class Case:
    """One row: a pipeline, a denoiser in it, a correction or none."""

    def __init__(self, pipeline: Any, arm: Arm) -> None:
        self.pipeline, self.arm = pipeline, arm

    def prepared(self, prompts: list[str], options: dict[str, Any]) -> Callable[[], object]:
        """The work to be timed: one batch. Applying is not part of it; the first run plans."""

        def work() -> None:
            with (
                quiet(self.pipeline),
                denoiser_swapped(self.pipeline, self.arm.denoiser),
                corrected(self.pipeline, self.arm, options["guidance_scale"]),
            ):
                run_pipeline(
                    self.pipeline, prompts, range(len(prompts)), output_type="np", **options
                )

        return work


def quantized(pipeline: Any, name: str) -> nn.Module:
    """By one backend; ModelOpt needs a call of the denoiser, and one with the shapes of the pipeline."""
    package, build = BACKENDS[name]

    def run(model: nn.Module) -> None:
        with quiet(pipeline), denoiser_swapped(pipeline, model):
            options = {"num_inference_steps": 2, "guidance_scale": 4.5, "call": {}}
            run_pipeline(pipeline, sample_prompts(2, 0), range(2), output_type="latent", **options)

    return build(pipeline.transformer, **({"run": run} if package == "modelopt" else {}))


def corrections(pipeline: Any, model: nn.Module, settings: dict[str, Any]) -> dict[str, Correction]:
    """Q-Drift from a record and a readout, both from the same prompts."""
    fitting: dict[str, Any] = {
        "prompts": sample_prompts(CALIBRATION, 0),
        "batch_size": BATCH,
        "progress": False,
        **settings,
    }
    record = calibrate(pipeline, quantized=model, **fitting)
    readout = fit_readout(pipeline, quantized=model, **fitting)
    return {"q-drift": QDrift(record.evidence), "readout": readout}


def cases_of(names: list[str], settings: dict[str, Any]) -> dict[str, Case]:
    """Every row by its name, full precision first."""
    full, half = zoo.load("pixart-sigma"), zoo.load("pixart-sigma").to(torch.bfloat16)
    cases = {
        FULL: Case(full, Arm(FULL, full.transformer)),
        HALF: Case(half, Arm(HALF, half.transformer)),
    }
    for name in tqdm(names, desc="quantize, calibrate, fit"):
        model = quantized(full, name)
        cases[name] = Case(full, Arm(name, model))
        for label, correction in corrections(full, model, settings).items():
            row = f"{name} + {label}"
            cases[row] = Case(full, Arm(row, model, correction))
    return cases


def distances(cases: dict[str, Case], n: int, options: dict[str, Any]) -> dict[str, ArmResult]:
    """As ``evenkeel compare`` measures them; bfloat16 brings its own pipeline."""
    prompts = sample_prompts(n, 1)
    images: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {}
    for name, case in tqdm(cases.items(), desc="generate"):
        made = generate(case.pipeline, case.arm, prompts, 1_000_000, BATCH, options, None, int)
        images[name], seconds[name] = made
    evaluator = HandwritingEvaluator(zoo.path_of("pixart-sigma"))
    return {result.name: result for result in measure(images, seconds, prompts, evaluator, None)}


def table(cases: dict[str, Case], laps: dict[str, list[float]], found: dict[str, Any]) -> list[str]:
    rows = [
        "| denoiser | layers | MB as stored | ms per image | time / float32 | PSNR, dB | FD |",
        "|---|---|---|---|---|---|---|",
    ]
    size = None
    for name, case in cases.items():
        model, plain = case.arm.denoiser, case.arm.correction is None
        text = backend_text(model) if plain else ""
        simulated = "fake" in text or "modelopt" in text
        if plain:
            size = f"{bytes_of(model) / 1e6:.2f}{' (simulated)' if simulated else ''}"
        time = Spread.of([lap / TIMED for lap in laps[name]])
        psnr, distance = (found[name].measures[k] for k in ("psnr", "frechet_full_precision"))
        rows.append(
            f"| {name} | {text} | {size if plain else ''} | {time.median:.1f} | "
            f"{'1' if name == FULL else ratio(laps, name, FULL)} | "
            f"{'' if name == FULL else interval(psnr, 2)} | "
            f"{'' if name == FULL else interval(distance, 4)} |"
        )
    return rows


def interval(estimate: Any, digits: int) -> str:
    """Value and 95 % interval."""
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=SHOWN, choices=list(BACKENDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")
    twin = zoo.twin("pixart-sigma")
    settings = {
        "num_inference_steps": twin.num_inference_steps,
        "guidance_scale": twin.guidance_scale,
    }
    options = {**settings, "call": {}}
    cases = cases_of(given.only, settings)
    found = distances(cases, given.images, options)
    prompts = sample_prompts(TIMED, 2)
    variants = {n: partial(case.prepared, prompts, options) for n, case in cases.items()}
    laps = interleaved(variants, repeats=given.repeats, warmup=1)
    rows = table(cases, laps, found)
    print("\n".join(rows))
    write(rows, given, settings)


def write(rows: list[str], given: argparse.Namespace, settings: dict[str, Any]) -> None:
    """BACKENDS.md, with what it was measured on."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", *PACKAGES))
    machine = f"{os.cpu_count()}-core {platform.machine()} CPU, one thread"
    steps, guidance = settings["num_inference_steps"], settings["guidance_scale"]
    text = f"""# Quantization backends on a CPU

Written by `OMP_NUM_THREADS=1 python benchmarks/backends.py` ({given.images} images, {given.repeats} repeats).

The embedded pipeline (PixArt, 8 blocks of width 96, latents 4x8x8), {steps} steps, guidance {guidance}.
{machine}, shared with other work; {versions}.

- **The network is tiny**: its largest matrix has 384 x 96 entries, so the times show what each backend
  adds around a matrix product, not what it saves inside one. Nothing here ranks backends on a model of
  billions of weights.
- MB as stored: all tensors that the denoiser holds in memory, scales and what stays plain included.
  "Simulated" backends compute with full-precision weights rounded on the fly.
- Time: processor time of {TIMED} images in one batch, text encoder and decoder included, the rows in turn
  in every one of {given.repeats} repeats; ratio to float32 repeat by repeat, median [quartiles].
- PSNR and FD (Frechet distance of the handwriting evaluator's features) to the float32 images of the same
  {given.images} prompts and noise, with 95 % intervals. Corrections come from {CALIBRATION} other prompts.
- Every linear layer is quantized, the head included: harsher than what backends do by default. 4-bit
  bitsandbytes has blocks of 32, because its CPU kernel is wrong for 64 at width 96, and runs without its
  repacking for AVX512-BF16, which asserts on these widths.

{chr(10).join(rows)}
"""
    (Path(__file__).parent / "BACKENDS.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
