"""Recovery adapters against every other way of spending the same bytes.

Frozen: embedded pipeline, DPM-Solver++ 2M, 20 steps, guidance 4.5; fitted on 32 prompts (seed 0); 500 images
(seed 1) of other prompts, the same noise in every arm. Budgets are bytes of the adapters over bytes of the
quantized denoiser. Baselines get the same rows, sharing out of bytes and rounding of factors:
plain SVD (LoftQ: S = G = 1), diagonal (LQER: diagonal of S), local (QERA, EoRA: S); 16-bit factors in
the output's metric; and the same weights with one more bit each.

Every cell is a file in experiments/recovery/; the command resumes.

    python experiments/recovery.py [CELL ...]     # default: all; writes RECOVERY.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evenkeel import zoo
from evenkeel.comparing.comparison import Arm, compare, standard_arms
from evenkeel.corrections import RecoveryAdapters
from evenkeel.fitting.adapters.collect import collect
from evenkeel.fitting.adapters.fit_adapters import PROBED, sites_of, stored_size
from evenkeel.fitting.adapters.solve import LayerProblem, Measured, solve
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.low_rank.metric import OutputMetric
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.storage import write_atomically
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "recovery"
TWIN, PROMPTS, IMAGES = "pixart-sigma", 32, 500
# cell -> (specification, the same with one more bit for every weight, budgets)
CELLS = {
    "w4a16": ("w4a16-g32", "w5a16-g32", (0.04, 0.11, 0.22)),
    "w3a16": ("w3a16-g32", "w4a16-g32", (0.11,)),
    "w4a8": ("w4a8-g32", "w5a8-g32", (0.11,)),
    "w4a4-r16": ("w4a4-g32-r16", "w5a4-g32-r16", (0.11,)),
}


def metrics(m: Measured) -> dict[str, Callable[[], LayerProblem | None]]:
    """A layer's problem as each method sees it."""

    def in_metric(s: torch.Tensor) -> LayerProblem:
        metric = OutputMetric(s, None)
        limit = min(128, *m.change.shape)
        return LayerProblem(
            m.name, m.kernel, m.change, metric, metric, metric.components(m.change, limit)
        )

    return {
        "plain SVD": lambda: in_metric(torch.eye(m.change.shape[1], dtype=torch.float64)),
        "diagonal (LQER)": lambda: in_metric(m.inputs[0].diagonal().diag()),
        "local (QERA, EoRA)": lambda: m.problem(local=True),
        "output (ours)": lambda: m.problem(local=False),
    }


def measure(cell: str, work: Path) -> dict[str, Any]:
    """Every arm of a cell against the same full-precision images."""
    spec, higher, budgets = CELLS[cell]
    twin, kind = zoo.twin(TWIN), KINDS[zoo.twin(TWIN).pictures]
    pipe = zoo.load(TWIN)
    full = denoiser_of(pipe)
    quantized, finer = (quantize_module(full, QuantizerSpec.parse(s))[0] for s in (spec, higher))
    settings: dict[str, Any] = {"guidance_scale": twin.guidance_scale, "batch_size": 32}
    run = Run(
        pipe, kind.prompts(PROMPTS, 0), twin.num_inference_steps, quantized=quantized, **settings
    )
    sites = sites_of(run, 4096)
    found = collect(run, sites, probed=PROBED, progress=True)
    made_for = run.provenance(found.law, found.first[:1, None])
    measured = [m for n, site in sites.items() if (m := Measured.of(n, site)) is not None]
    size = stored_size(quantized)
    arms: list[Arm] = standard_arms(pipe, quantized, {})
    bytes_of: dict[str, int] = {"quantized": 0, "one more bit": stored_size(finer) - size}
    arms.append(Arm("one more bit", finer))
    for budget in budgets:
        for name in metrics(measured[0]):
            problems = [p for m in measured if (p := metrics(m)[name]()) is not None]
            for bits in (3, 4, 16) if name == "output (ours)" else (3, 4):
                layers = solve(problems, bits, int(budget * size), None)
                adapters = RecoveryAdapters(made_for, "output", bits, layers)
                label = f"{name}, {bits} bits, +{100 * budget:.0f} %"
                arms.append(Arm(label, quantized, adapters))
                bytes_of[label] = adapters.stored_bytes
    prompts = kind.prompts(IMAGES, 1)
    comparison = compare(
        pipe,
        arms,
        prompts=prompts,
        num_inference_steps=twin.num_inference_steps,
        evaluator=kind.evaluator(zoo.path_of(TWIN)),
        folder=work / cell,
        guidance_scale=twin.guidance_scale,
        batch_size=50,
    )
    rows = [{**arm.as_dict(), "share": bytes_of.get(arm.name, 0) / size} for arm in comparison.arms]
    return {"cell": cell, "quantizer": spec, "bytes": size, "images": IMAGES, "arms": rows}


def table(cells: list[dict[str, Any]]) -> str:
    """RECOVERY.md."""
    lines = ["# Recovery adapters", "", *(__doc__ or "").splitlines()[2:11], ""]
    missing = [c for c in CELLS if c not in {cell["cell"] for cell in cells}]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines.append("| cell | arm | more bytes | FD to full precision | PSNR, dB | change [95 %] |")
    lines.append("|---|---|---|---|---|---|")
    for cell in cells:
        for arm in cell["arms"][1:]:
            fd, psnr = arm["frechet_full_precision"], arm["psnr"]
            change = arm.get("difference_to_quantized", {}).get("psnr")
            said = "" if change is None else (
                f"{change['value']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"
            )  # fmt: skip
            lines.append(
                f"| {cell['quantizer']} | {arm['name']} | {100 * arm['share']:+.1f} % | "
                f"{fd['value']:.3f} ± {fd['stderr']:.3f} | {psnr['value']:.2f} | {said} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", default=list(CELLS), metavar="CELL")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/recovery"))
    options = parser.parse_args()
    for cell in options.cells:
        place = RESULTS / f"{cell}.json"
        if not place.exists():
            write_atomically(place, json.dumps(measure(cell, options.work), indent=1) + "\n")
    cells = [json.loads(p.read_text()) for c in CELLS if (p := RESULTS / f"{c}.json").exists()]
    write_atomically(HERE / "RECOVERY.md", table(cells))


if __name__ == "__main__":
    main()
