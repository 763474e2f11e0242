"""How calibration, readout and comparison grow with prompts, steps, pixels and width.

On the embedded pipeline's denoiser, untrained. One quantity is doubled at a time; the exponent is the
slope of processor time in log-log. Width is judged beside the two plain runs, which grow with it, too.
Then one step's sums and solves of a readout alone, wider and wider.
Run: OMP_NUM_THREADS=1 python benchmarks/growth.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accumulation import untrained_pipeline
from timing import report

import evenkeel
from evenkeel.comparing.comparison import Arm, compare
from evenkeel.fitting.readout.solve import CallFit, new_folds, take_in, units_of
from evenkeel.hosts.pipeline.pipelines import quiet, run_pipeline
from evenkeel.zoo.making.twins import pixart_sigma as networks

BASE = {"prompts": 8, "steps": 4, "side": 64, "width": 96}
GRID = {
    "prompts": (4, 8, 16),
    "steps": (2, 4, 8),
    "side": (32, 64, 128),
    "width": (96, 192, 384),
}
REPEATS = 2  # of which the faster counts
FEATURES, ROWS, PROMPTS = (192, 384, 768, 1536), 1024, 4


def pipeline_of(width: int) -> tuple[Any, Any]:
    """The pipeline with a denoiser of that width, and its quantized twin."""
    torch.manual_seed(0)
    pipeline = untrained_pipeline()
    denoiser = networks.build_denoiser(width).eval()
    torch.nn.init.normal_(denoiser.proj_out.weight, std=0.1)
    pipeline.transformer = denoiser
    quantized, _ = evenkeel.quantize_module(denoiser, evenkeel.QuantizerSpec(4))
    return pipeline, quantized


def works(prompts: int, steps: int, side: int, width: int) -> dict[str, Callable[[], object]]:
    """What is measured at one point."""
    pipeline, quantized = pipeline_of(width)
    texts = [f"a {i}" for i in range(prompts)]
    call = {"use_resolution_binning": False, "height": side, "width": side}
    asked: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.5}

    def paired() -> None:
        for denoiser in (pipeline.transformer, quantized):
            full, pipeline.transformer = pipeline.transformer, denoiser
            with quiet(pipeline):
                for i in range(0, prompts, 4):
                    seeds = range(i, i + len(texts[i : i + 4]))
                    run_pipeline(
                        pipeline, texts[i : i + 4], seeds, output_type="latent", call=call, **asked
                    )
            pipeline.transformer = full

    def fit(function: Callable[..., Any]) -> Callable[[], object]:
        return lambda: function(
            pipeline,
            quantized=quantized,
            prompts=texts,
            batch_size=4,
            call=call,
            progress=False,
            **asked,
        )

    arms = [Arm("full-precision", pipeline.transformer), Arm("quantized", quantized)]
    return {
        "paired runs": paired,
        "calibrate": fit(evenkeel.calibrate),
        "readout": fit(evenkeel.fit_readout),
        "compare": lambda: compare(
            pipeline, arms, prompts=texts, batch_size=4, call=call, progress=False, **asked
        ),
    }


def seconds(work: Callable[[], object]) -> float:
    """Processor time, the least of a few."""
    laps = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        laps.append(time.process_time() - start)
    return min(laps)


def exponent(sizes: Any, times: Any) -> float:
    """Slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def grow(quantity: str) -> None:
    """One quantity, all works."""
    laps: dict[str, list[float]] = {}
    for value in GRID[quantity]:
        for name, work in works(**{**BASE, quantity: value}).items():
            laps.setdefault(name, []).append(seconds(work))
    sizes = np.array(GRID[quantity], float)
    if quantity == "side":
        quantity, sizes = "pixels", sizes**2
    paired = laps["paired runs"]
    for name, times in laps.items():
        over = [t / p for t, p in zip(times, paired, strict=True)]
        report(
            {
                "benchmark": "growth",
                "quantity": quantity,
                "work": name,
                "sizes": sizes.tolist(),
                "seconds": [round(t, 3) for t in times],
                "exponent": round(exponent(sizes, times), 2),
                "over_paired": [round(x, 3) for x in over],
                "exponent_over_paired": round(exponent(sizes, over), 2),
            },
            f"{name} against {quantity}: exponent {exponent(sizes, times):.2f}; over the paired runs "
            f"{', '.join(f'{x:.2f}' for x in over)} (exponent {exponent(sizes, over):.2f})",
        )


def solves() -> None:
    """One step of a readout, without denoisers."""
    laps: dict[str, list[float]] = {"sums": [], "solves": []}
    for features in FEATURES:
        units = units_of(PROMPTS, ROWS, features)
        rows = [(torch.randn(ROWS, features), torch.randn(ROWS, 16)) for _ in range(PROMPTS)]
        start = time.process_time()
        folds = new_folds(units, features, 16, True)
        take_in(folds, ((u, h, t) for u, (h, t) in zip(units, rows, strict=True)))
        summed = time.process_time()
        CallFit.of(folds)
        laps["sums"].append(summed - start)
        laps["solves"].append(time.process_time() - summed)
    for name, times in laps.items():
        report(
            {
                "benchmark": "growth",
                "quantity": "width",
                "work": f"readout, {name} of a step",
                "sizes": list(FEATURES),
                "seconds": [round(t, 3) for t in times],
                "exponent": round(exponent(FEATURES, times), 2),
            },
            f"{name} of a step of {PROMPTS} prompts of {ROWS} positions, {FEATURES} features: "
            f"{', '.join(f'{t:.3f}' for t in times)} s, exponent {exponent(FEATURES, times):.2f}",
        )


def main() -> None:
    torch.set_num_threads(1)
    solves()
    for quantity in GRID:
        grow(quantity)


if __name__ == "__main__":
    main()
