"""What recovery adapters cost: beside a layer of FLUX's width, and to fit at real widths.

Random weights, float32. ``beside``: a layer of 3,072 x 3,072 over 4,608 tokens, 4 bits, unpacked per call,
alone and with an adapter of 4 or 16 bits; ratios of repeats taken in turn. ``fit``: one prompt, two steps;
seconds of the quantized run, of the run that collects rows, and of the solve, with what each holds
beyond the models (rows in files apart).
Run: OMP_NUM_THREADS=1 python benchmarks/adapters.py beside | fit SIZE [--metric local]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from full_size import PROMPTS, STEPS, Bench, resident
from full_size_models import Packed
from timing import Spread, interleaved, report
from torch import nn

from evenkeel.fitting.adapters.collect import collect
from evenkeel.fitting.adapters.fit_adapters import PROBED, stored_size
from evenkeel.fitting.adapters.sites import opened, sites_of
from evenkeel.fitting.adapters.solve import solve
from evenkeel.hosts.actuators.beside import attach
from evenkeel.hosts.run import Run
from evenkeel.low_rank.factors import LayerAdapter, rounded

WIDTH, TOKENS, BUDGET = 3072, 4608, 0.05


def beside(repeats: int) -> None:
    """Time a layer with adapters over the layer alone."""
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH)

    def layer(rank: int, bits: int) -> Callable[[], Callable[[], object]]:
        found = Packed(nn.Linear(WIDTH, WIDTH))
        if rank:
            factors = (rounded(torch.randn(rank, WIDTH) / 100, bits) for _ in range(2))
            attach(nn.ModuleDict({"l": found}), [LayerAdapter("l", *factors)])
        return lambda: lambda: found(x)

    variants = {"alone": layer(0, 4)} | {
        f"rank {rank}, {bits} bits": layer(rank, bits) for rank in (16, 32, 64) for bits in (4, 16)
    }
    with torch.no_grad():
        times = interleaved(variants, repeats=repeats, warmup=1)
    ratios = {
        name: str(Spread.of([a / b for a, b in zip(found, times["alone"], strict=True)]))
        for name, found in times.items()
    }
    report({"beside": ratios}, "; ".join(f"{name} {ratio}" for name, ratio in ratios.items()))


def fit(size: str, metric: str, device: str) -> None:
    """Time every stage of a fit and say what it holds."""
    bench = Bench(size, "calibrate", device)
    run = Run(
        bench.pipeline,
        list(PROMPTS[:1]),
        STEPS,
        guidance_scale=bench.guidance,
        batch_size=1,
        call=bench.call,
        quantized=bench.quantized,
    )

    def plain() -> None:
        with run.undisturbed(bench.quantized):
            for batch in run.share():
                run.sample(batch)

    run.pair  # noqa: B018 - fingerprints are counted elsewhere
    stages: dict[str, Any] = {"run": stage(plain)[1]}
    with opened(sites_of(run), 4096, 2e9, gradients=metric != "local") as sites:
        probed = 0 if metric == "local" else PROBED
        _, stages["collect"] = stage(lambda: collect(run, sites, probed=probed, progress=False))
        budget = int(BUDGET * stored_size(bench.quantized))
        found, stages["solve"] = stage(
            lambda: solve(sites, [(metric, "difference")], (4,), budget, None)
        )
        solution = found[1][metric, "difference"]
        largest = max(s.head.features * s.head.targets for s in sites.values())
    case = {
        "size": size,
        "metric": metric,
        "layers": found[0],
        "largest_layer_mb": round(4 * largest / 1e6),
        "adapters_mb": round(solution.stored_bytes / 1e6, 2),
        "predicted_error": round(solution.predicted, 3),
        **stages,
    }
    spent = ", ".join(f"{k} {v['processor_s']} s {v['beyond_mb']} MB" for k, v in stages.items())
    report(case, f"{size} {metric}: {spent}")


def stage(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Its result, processor seconds, and MB beyond what was there, pages of files apart."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before, start = resident("RssAnon"), time.process_time()
    found = work()
    peak = resident("VmHWM") - resident("RssFile")
    return found, {
        "processor_s": round(time.process_time() - start, 1),
        "beyond_mb": round((peak - before) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("beside", "fit"))
    parser.add_argument("size", nargs="?", default="flux")
    parser.add_argument("--metric", choices=("output", "local"), default="output")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if not os.environ.get("OMP_NUM_THREADS"):
        print("set OMP_NUM_THREADS=1 for times of one core")
    if options.what == "beside":
        beside(options.repeats)
    else:
        fit(options.size, options.metric, options.device)


if __name__ == "__main__":
    main()
