"""What calibrations and fits cost at real widths, over plain runs of both denoisers.

Random weights, float32. Every cell is a process of its own that builds the pipeline and its twin, does
one thing, and adds a line to the result file; cells that are there are not done again.
Run: OMP_NUM_THREADS=1 python benchmarks/full_size.py RESULTS [sdxl pixart flux wan] [--device cuda]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from full_size_models import SIZES
from timing import report
from torch import nn

import evenkeel
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.pipelines import denoiser_name, quiet, run_pipeline

PROMPTS, STEPS = ("red 3 on blue", "green 5 on white"), 2
# In the order in which they tell most.
CELLS = (
    "full", "quantized", "calibrate", "readout", "fingerprint", "apply", "tac", "stepbaq",
    "refit-full", "refit-quantized", "refit",
)  # fmt: skip


class Bench:
    """A pipeline, its twin, and what is asked of them."""

    def __init__(self, name: str, cell: str, device: str) -> None:
        size = SIZES[name]
        make = size.refitted if cell.startswith("refit") else size.twin
        assert make is not None
        torch.manual_seed(0)
        self.pipeline = size.pipeline()
        self.name = denoiser_name(self.pipeline)
        self.denoiser: nn.Module = getattr(self.pipeline, self.name)
        self.quantized = make(self.denoiser)
        self.call, self.guidance = size.call, size.guidance
        self.pipeline.to(device)
        self.quantized.to(device)

    @property
    def asked(self) -> dict[str, Any]:
        """Of every fit."""
        return {
            "quantized": self.quantized,
            "prompts": list(PROMPTS),
            "num_inference_steps": STEPS,
            "guidance_scale": self.guidance,
            "batch_size": 1,
            "call": self.call,
            "progress": False,
        }

    def plain(self, denoiser: nn.Module) -> None:
        """One run over all prompts."""
        setattr(self.pipeline, self.name, denoiser)
        with quiet(self.pipeline):
            for seed, prompt in enumerate(PROMPTS):
                run_pipeline(
                    self.pipeline,
                    [prompt],
                    [seed],
                    num_inference_steps=STEPS,
                    guidance_scale=self.guidance,
                    output_type="latent",
                    call=self.call,
                )

    def work(self, cell: str, folder: Path, readout: Path) -> Callable[[], Path | None]:
        """What the cell measures; it returns the file that it writes, if any.

        The cell "readout" keeps its file at ``readout``, where "apply" looks for it.
        """
        if cell.endswith(("full", "quantized")):
            denoiser = self.denoiser if cell.endswith("full") else self.quantized
            return lambda: self.plain(denoiser)
        if cell == "calibrate":
            return lambda: evenkeel.calibrate(self.pipeline, **self.asked).save(folder / cell)
        if cell == "fingerprint":  # once per calibration or fit: both denoisers are read whole
            return lambda: _nothing([fingerprint(d) for d in (self.denoiser, self.quantized)])
        if cell == "refit":
            return lambda: _nothing(evenkeel.refit_branches(self.pipeline, **self.asked))
        fits = {
            "tac": evenkeel.fit_tac,
            "stepbaq": evenkeel.fit_stepbaq,
        }
        if cell in fits:  # kept in a record
            return lambda: _nothing(fits[cell](self.pipeline, **self.asked))

        def fitted() -> Path:
            return evenkeel.save(evenkeel.fit_readout(self.pipeline, **self.asked), readout)

        if cell == "readout":
            return fitted
        made = evenkeel.load(readout if readout.exists() else fitted())
        setattr(self.pipeline, self.name, self.quantized)
        evenkeel.apply(self.pipeline, made)
        return lambda: self.plain(self.quantized)


def measured(name: str, cell: str, device: str, results: Path) -> dict[str, Any]:
    """Seconds, MB beyond the models, and MB of the file."""
    bench = Bench(name, cell, device)
    on_cuda = device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        readout = results.with_name(f"{results.stem}-{name}-readout.safetensors")
        work = bench.work(cell, Path(folder), readout)
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(
                0
            )  # what making the models has left would hide the work's own
            Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        before = torch.cuda.memory_allocated() if on_cuda else resident("VmRSS")
        wall, processor = time.perf_counter(), time.process_time()
        file = work()
        if on_cuda:
            torch.cuda.synchronize()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak = torch.cuda.max_memory_allocated() if on_cuda else resident("VmHWM")
        size = file.stat().st_size / 1e6 if file else None
    return {
        "size": name,
        "cell": cell,
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "wall_s": round(wall, 2),
        "processor_s": round(processor, 2),
        "beyond_models_mb": round((peak - before) / 1e6, 1),
        "models_mb": round(before / 1e6),
        "file_mb": size and round(size, 3),
    }


def resident(field: str) -> float:
    """Bytes of this process (Linux): VmRSS now, VmHWM at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _nothing(_: object) -> None:
    """What is returned is not written."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cells", nargs="*", default=list(CELLS))
    parser.add_argument("--one", action="store_true", help="in this process")
    given = parser.parse_args()
    if given.one:
        found = measured(given.sizes[0], given.cells[0], given.device, given.results)
        report(found, json.dumps(found))
        with given.results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        return
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    done = {(row["size"], row["cell"]) for row in map(json.loads, lines)}
    for size in given.sizes:
        for cell in given.cells:
            if (size, cell) in done or (cell.startswith("refit") and not SIZES[size].refitted):
                continue
            command = [sys.executable, __file__, str(given.results), size, "--one"]
            subprocess.run(
                [*command, "--device", given.device, "--cells", cell], check=False, env=os.environ
            )


if __name__ == "__main__":
    main()
