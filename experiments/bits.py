"""Bits shared out over layers against the same bits everywhere, at equal bytes.

Frozen: embedded pipeline, DPM-Solver++ 2M, 20 steps, guidance 4.5, weights alone; bits chosen with 32 prompts
(seed 0), 32 images (seed 1) of other prompts, the same noise in every arm. Uniform arms have groups of 32:
3, 4 and 5 bits and a scale of 16 bits are 3.5, 4.5 and 5.5 bits per weight, the budgets of the mixes.
GPTQ has the inputs' second moments along the quantized trajectory as its Hessian. A mix is shown as it was
chosen; the last column says whether held-out pairs (8, of other prompts) confirmed it, without which
`evenkeel quantize --budget` returns the uniform quantization.

Every cell is a file in experiments/bits/; the command resumes.

    python experiments/bits.py [3.5 4.5 5.5]     # default: all; writes BITS.md
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import evenkeel
from evenkeel import zoo
from evenkeel.comparing.comparison import compare, standard_arms
from evenkeel.comparing.generation import Arm
from evenkeel.fitting.adapters.collect import collect
from evenkeel.fitting.adapters.pairs import Pairs
from evenkeel.fitting.adapters.sites import opened, sites_of
from evenkeel.fitting.bits.families import Own
from evenkeel.fitting.bits.quantize_to_budget import WEIGHT_ONLY, built
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers.rounding.gptq import hessian_of
from evenkeel.storage import write_atomically
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "bits"
TWIN, PROMPTS, IMAGES = "pixart-sigma", 32, 32
CELLS = {"3.5": "w3-g32", "4.5": "w4-g32", "5.5": "w5-g32"}


def measure(cell: str) -> dict[str, Any]:
    """Every arm of a cell against the same full-precision images."""
    twin, kind = zoo.twin(TWIN), KINDS[zoo.twin(TWIN).pictures]
    pipe, prompts = zoo.load(TWIN), kind.prompts(PROMPTS, 0)
    full, by_gptq = denoiser_of(pipe), replace(WEIGHT_ONLY, rounding="gptq")
    family = Own(by_gptq)
    everywhere = dict.fromkeys(family.layers(full), CELLS[cell])
    uniform = built(Own(WEIGHT_ONLY), full, everywhere)
    asked: dict[str, Any] = {"guidance_scale": twin.guidance_scale}
    run = Run(pipe, prompts, twin.num_inference_steps, quantized=uniform, **asked)
    with opened(sites_of(run), 4096, 2e9, gradients=False) as sites:
        collect(Pairs.of(run).fit, sites, probed=0, progress=True)
        for name, site in sites.items():
            family.hessians[name] = hessian_of(site.inputs.sorted()[1])
    arms: list[Arm] = standard_arms(pipe, uniform, {})
    arms.append(Arm("uniform, GPTQ", built(family, full, everywhere)))
    reports = {}
    for name, method in (("mix", WEIGHT_ONLY), ("mix, GPTQ", by_gptq)):
        found, reports[name] = evenkeel.quantize_to_budget(
            pipe,
            float(cell),
            prompts=prompts,
            num_inference_steps=twin.num_inference_steps,
            method=method,
            guard=False,
            **asked,
        )
        arms.append(Arm(name, found))
    comparison = compare(
        pipe,
        arms,
        prompts=kind.prompts(IMAGES, 1),
        num_inference_steps=twin.num_inference_steps,
        **asked,
    )
    rows = [
        {"name": a.name, **({"report": reports[a.name].as_dict()} if a.name in reports else {})}
        | {"psnr": a.measures["psnr"].as_dict()}
        | {"change": {k: v.as_dict() for k, v in a.difference_to_quantized.items() if k == "psnr"}}
        for a in comparison.arms[1:]
    ]
    return {"cell": cell, "uniform": CELLS[cell], "images": IMAGES, "arms": rows}


def table(cells: list[dict[str, Any]]) -> str:
    """BITS.md."""
    lines = ["# Bits per layer", "", *(__doc__ or "").splitlines()[2:9], ""]
    missing = [c for c in CELLS if c not in {cell["cell"] for cell in cells}]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines.append(
        "| bits per weight | arm | PSNR, dB | change [95 %] | on held-out pairs, dB [bound] |"
    )
    lines.append("|---|---|---|---|---|")
    for cell in cells:
        for arm in cell["arms"]:
            change, report = arm["change"].get("psnr"), arm.get("report")
            name = f"uniform ({cell['uniform']})" if arm["name"] == "quantized" else arm["name"]
            said = "" if change is None else (
                f"{change['value']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"
            )  # fmt: skip
            kept = "" if report is None else (
                f"{report['gain']:+.2f} [{report['bound']:+.2f}] "
                f"{'kept' if report['confirmed'] else 'refused'}"
            )  # fmt: skip
            lines.append(
                f"| {cell['cell']} | {name} | {arm['psnr']['value']:.2f} | {said} | {kept} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", default=list(CELLS), metavar="CELL")
    options = parser.parse_args()
    for cell in options.cells:
        place = RESULTS / f"{cell}.json"
        if not place.exists():
            write_atomically(place, json.dumps(measure(cell)) + "\n")
    cells = [json.loads(p.read_text()) for c in CELLS if (p := RESULTS / f"{c}.json").exists()]
    write_atomically(HERE / "BITS.md", table(cells))


if __name__ == "__main__":
    main()
