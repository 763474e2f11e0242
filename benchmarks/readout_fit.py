"""What fitting a readout costs: time, memory, and the size of the file.

Time: on the embedded pipeline, against one run of both denoisers over the same prompts. Memory: one
step's normal equations at FLUX's width, in a process of its own.
Run: OMP_NUM_THREADS=1 python benchmarks/readout_fit.py
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Spread, interleaved, ratio, report
from torch import Tensor

import evenkeel
from evenkeel import zoo
from evenkeel.corrections.head_table import HeadTable
from evenkeel.corrections.readout import HeadFit, Readout
from evenkeel.fitting.readout.fit_readout import fit_readout
from evenkeel.fitting.readout.solve import CallFit, new_folds, take_in, units_of
from evenkeel.hosts.pipeline.pipelines import quiet, run_pipeline
from evenkeel.quantizers.methods.spec import QuantizerSpec
from evenkeel.record import Provenance, save
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import PairedMoments

STEPS, PROMPTS, GUIDANCE, REPEATS = 20, 32, 4.5, 9
FLUX_PROMPTS, FLUX_TOKENS, PROCESSES = 4, 4096, 5
# Features and outputs of the head, steps, latent channels.
SIZES = {
    "FLUX, 20 steps": (3072, 64, 20, 16),
    "SDXL, 20 steps": (320 * 9, 4, 20, 4),
    "SDXL, 50 steps": (320 * 9, 4, 50, 4),
}


def measure_fit() -> None:
    """``fit_readout`` against one run of both denoisers over the same prompts."""
    pipeline = zoo.load("pixart-sigma")
    quantized, _ = evenkeel.quantize_module(pipeline.transformer, QuantizerSpec(3, 4))
    twin = copy.copy(pipeline)
    twin.transformer = quantized
    prompts = [f"a {i}" for i in range(PROMPTS)]
    call = {"use_resolution_binning": False, "height": 32, "width": 32}
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    fitted: list[Readout] = []

    def paired() -> None:
        with quiet(pipeline):
            for pipe in (pipeline, twin):
                run_pipeline(
                    pipe, prompts, range(PROMPTS), output_type="latent", call=call, **settings
                )

    def fit() -> None:
        fitted[:] = [
            fit_readout(
                pipeline,
                quantized=quantized,
                prompts=prompts,
                batch_size=PROMPTS,
                call=call,
                progress=False,
                **settings,
            )
        ]

    laps = interleaved({"paired": lambda: paired, "fit": lambda: fit}, repeats=REPEATS, warmup=1)
    assert fitted[0].accepted > 0
    share, base = ratio(laps, "fit", "paired"), Spread.of(laps["paired"])
    report(
        {
            "benchmark": "readout_fit",
            "case": "fit",
            "prompts": PROMPTS,
            "steps": STEPS,
            "paired_ms": base.as_dict(0),
            "fit_over_paired": share.as_dict(),
        },
        f"fitting takes {share} x the paired runs ({base.median / 1e3:.1f} s)",
    )


def resident(field: str) -> float:
    """MB of this process (Linux): VmRSS now, VmHWM at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6  # the kernel's kB are 1,024 bytes


def prompts_of_flux() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (FLUX_TOKENS, 3072), (FLUX_TOKENS, 64)
    return [
        (torch.randn(shapes[0], generator=generator), torch.randn(shapes[1], generator=generator))
        for _ in range(FLUX_PROMPTS)
    ]


def one_step() -> dict[str, float]:
    """Sums and solution of one step at FLUX's width; seconds and MB beyond the prompts' rows."""
    rows = prompts_of_flux()
    units = units_of(FLUX_PROMPTS, FLUX_TOKENS, 3072)
    folds = new_folds(units, 3072, 64, True)
    folds_mb = sum(f.hh.nbytes for f in folds) / 1e6
    warm = torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own buffers
    assert np.isfinite(np.linalg.norm(warm.numpy()))
    del folds
    tracemalloc.start()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = resident("VmRSS")
    folds = new_folds(units, 3072, 64, True)
    start = time.process_time()
    take_in(folds, ((u, h, t) for u, (h, t) in zip(units, rows, strict=True)))
    summed = time.process_time()
    fit = CallFit.of(folds)
    solved = time.process_time()
    assert all(bool(w.isfinite().all()) for w, _ in fit.without)
    return {
        "folds": len(folds),
        "folds_mb": folds_mb,
        "resident_mb": resident("VmHWM") - before,
        "traced_mb": tracemalloc.get_traced_memory()[1] / 1e6,
        "sums_s": summed - start,
        "solve_s": solved - summed,
    }


def measure_memory() -> None:
    """In fresh processes."""
    runs = []
    for _ in range(PROCESSES):
        command = [sys.executable, __file__, "one-step"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(out))
    found = {key: Spread.of([run[key] for run in runs]) for key in runs[0]}
    report(
        {
            "benchmark": "readout_fit",
            "case": "memory",
            "prompts": FLUX_PROMPTS,
            "tokens": FLUX_TOKENS,
            **{key: spread.as_dict(2) for key, spread in found.items()},
        },
        f"FLUX, one step of {FLUX_PROMPTS} prompts: "
        + ", ".join(f"{key} {spread}" for key, spread in found.items()),
    )


def measure_file(name: str) -> None:
    """Megabytes of the saved readout, without and with the evidence for a drift."""
    features, targets, steps, channels = SIZES[name]
    sigma = np.linspace(0.98, 0.02, steps)
    levels = 1 - sigma, sigma
    active = torch.ones(steps, 1, dtype=torch.bool)
    weight, constant = torch.randn(steps, 1, features, targets), torch.randn(steps, 1, targets)
    table = HeadTable.of(*levels, weight, constant, active)
    fits = tuple(HeadFit(k, 0, 0.1, 0.5, 0.6, "") for k in range(steps))
    moments = PairedMoments.of(*torch.randn(3, PROMPTS, steps, channels, 16))
    evidence = Evidence("flow", *levels, moments)
    made = provenance(*levels)
    megabytes = {}
    with tempfile.TemporaryDirectory() as folder:
        kept: Evidence | None
        for key, kept in (("heads", None), ("with_evidence", evidence)):
            readout = Readout(made, "proj_out", "per-step", table, fits, kept)
            megabytes[key] = save(readout, Path(folder) / key).stat().st_size / 1e6
    report(
        {
            "benchmark": "readout_fit",
            "case": "file",
            "size": name,
            "steps": steps,
            **{f"{key}_mb": round(value, 3) for key, value in megabytes.items()},
        },
        f"{name}: heads {megabytes['heads']:.2f} MB, with the evidence of {PROMPTS} prompts "
        f"{megabytes['with_evidence']:.2f} MB",
    )


def provenance(alpha: Any, sigma: Any) -> Provenance:
    """Of no pipeline in particular."""
    return Provenance(
        pipeline_class="FluxPipeline",
        denoiser="transformer",
        reference="0" * 64,
        quantized="1" * 64,
        quantizer="w4a4",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        scheduler_config={},
        prediction="flow",
        num_inference_steps=len(sigma),
        guidance_scale=3.5,
        timesteps=(1000 * sigma).tolist(),
        alpha=alpha.tolist(),
        sigma=sigma.tolist(),
        call={},
        trajectory="corrected",
        layout={},
        latent_shape=[4096, 64],
        dtype="float32",
        elements=16384,
        versions={},
    )


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["one-step"]:
        print(json.dumps(one_step()))
        return
    measure_fit()
    measure_memory()
    for name in SIZES:
        measure_file(name)


if __name__ == "__main__":
    main()
