"""Recovery adapters against every other way of spending the same bytes.

Frozen: each pipeline with its original's sampler, steps and guidance; fitted on 32 prompts (seed 0); images
of other prompts (seed 1), the same noise in every arm. Budgets are bytes of the adapters over bytes of the
quantized denoiser. Baselines get the same rows, the same sharing out of bytes and the same rounding of
factors: plain SVD (LoftQ: S = G = 1), diagonal (LQER: diagonal of S), local (QERA, EoRA: S); besides,
16-bit factors in the output's metric, and the same weights with one more bit each. `chosen` is what
`fit_adapters` gives, held-out pairs included. Where layers have branches, `refit` is refit_branches as
it comes, `refit in the metric` that with metric="output".

Every cell is a file in experiments/recovery/; the command resumes.

    python experiments/recovery.py [CELL ...]     # default: all; writes RECOVERY.md
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from measured_cells import Cells, change_of, decibels, finish, known, not_run
from recovery_frontier import BASES
from recovery_frontier import RESULTS as FRONTIER
from safetensors.torch import load_file
from torch import nn

import evenkeel
from evenkeel import zoo
from evenkeel.comparing.comparison import Arm, compare, standard_arms
from evenkeel.corrections import RecoveryAdapters
from evenkeel.fitting.adapters.collect import collect
from evenkeel.fitting.adapters.fit_adapters import PROBED, fitted, stored_size
from evenkeel.fitting.adapters.sites import opened, sites_of
from evenkeel.fitting.adapters.solve import LayerProblem, Measured, Solution
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.low_rank.budget import share_out
from evenkeel.low_rank.metric import OutputMetric
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.storage import write_atomically
from evenkeel.zoo.making.twins import pixart_sigma
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "recovery"
TRAINED = Path("runs/experiments/widths")  # by widths.py
PROMPTS = 32


@dataclass(frozen=True)
class Cell:
    """A twin, how it is quantized, the same with one more bit, budgets, and how many images.

    ``rivals`` says whether the baselines are fitted, too. ``width``: of a denoiser that widths.py trained for
    1,000 steps, in place of the twin's. ``backend``: one of those in tests/helpers, in place of ``spec``.
    ``seed``: of the calibration prompts and their noise; those of the images are other ones in any case.
    """

    spec: str
    higher: str
    budgets: tuple[float, ...] = (0.11,)
    twin: str = "pixart-sigma"
    images: int = 200
    rivals: bool = True
    prompts: int = PROMPTS
    width: int | None = None
    backend: str | None = None
    seed: int = 0


TWINS = (
    *("sd-v2.1", "flux-schnell", "flux-dev", "sana", "sdxl", "sd-v1.4"),
    *("sdxl-turbo", "dit-xl", "ldm-4", "ldm-8", "ddim-cifar"),
)
NAMES = (
    *("bitsandbytes nf4", "gguf Q4_0", "torchao int4", "quanto qint4", "sdnq int4"),
    *("sdnq uint4 svd", "gguf Q5_0", "bitsandbytes int8"),
)
CELLS = {
    "w4a16": Cell("w4a16-g32", "w5a16-g32", (0.04, 0.11, 0.22)),
    "w4a8": Cell("w4a8-g32", "w5a8-g32"),
    "w3a16": Cell("w3a16-g32", "w4a16-g32"),
    "w3a4-r16": Cell("w3a4-g32-r16", "w4a4-g32-r16"),
    "w3a4-r16-refits": Cell("w3a4-g32-r16", "w4a4-g32-r16", rivals=False),
    "w4a4-r16": Cell("w4a4-g32-r16", "w5a4-g32-r16"),
    **{
        f"prompts-{n}": Cell("w4a16-g32", "", rivals=False, prompts=n, images=200)
        for n in (1, 2, 4, 8, 128)
    },
    **{
        f"width-{w}": Cell(
            "w4a16-g32", "w5a16-g32", (0.11, 0.22), images=100, rivals=False, width=w
        )
        for w in (48, 96, 192, 384)
    },
    **{
        f"backend-{b.replace(' ', '-')}": Cell("", "", images=100, rivals=False, backend=b)
        for b in NAMES
    },
    **{f"{t}-w4a16": Cell("w4a16-g32", "", twin=t, images=100, rivals=False) for t in TWINS},
    **{f"seed-{n}": Cell("w4a16-g32", "", rivals=False, seed=n) for n in (2, 3)},
    **{f"{t}-w4a8": Cell("w4a8-g32", "", twin=t, images=60, rivals=False) for t in TWINS},
    **{f"{t}-w3a4-r16": Cell("w3a4-g32-r16", "", twin=t, images=60, rivals=False) for t in TWINS},
}


def rivals(measured: Measured) -> Iterator[tuple[str, LayerProblem]]:
    """A layer's problem as each method sees it."""
    inputs, _ = measured.inputs
    assert isinstance(inputs, torch.Tensor)
    diagonal = {"plain SVD": torch.ones(len(inputs)), "diagonal (LQER)": inputs.diagonal()}
    for name, values in diagonal.items():
        metric = OutputMetric(values.double().diag(), None)
        change = metric.working(measured.difference)
        yield name, LayerProblem(measured.name, measured.kernel, change, metric, metric)
    for name, kind in (("local (QERA, EoRA)", "local"), ("output (ours)", "output")):
        if (problem := measured.problem(kind)) is not None:
            yield name, problem


def measure(cell: Cell, work: Path) -> dict[str, Any]:
    """Every arm of a cell against the same full-precision images."""
    twin, pipe = zoo.twin(cell.twin), zoo.load(cell.twin)
    if cell.width is not None:
        weights = load_file(TRAINED / f"{cell.width}-1000" / "denoiser" / "step-1000.safetensors")
        pipe.transformer = pixart_sigma.build_denoiser(cell.width).eval()
        pipe.transformer.load_state_dict(weights)
    kind, full = KINDS[twin.pictures], denoiser_of(pipe)
    if cell.backend is None:
        quantized, _ = quantize_module(full, QuantizerSpec.parse(cell.spec))
    else:
        sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
        from quantized_by import BACKENDS

        quantized = BACKENDS[cell.backend][1](copy.deepcopy(full))
    size = stored_size(quantized)
    settings: dict[str, Any] = {"guidance_scale": twin.guidance_scale, "batch_size": 32}
    steps = twin.num_inference_steps
    chosen_on = kind.prompts(cell.prompts, cell.seed)
    settings["seed"] = 1000 * cell.seed
    run = Run(pipe, chosen_on, steps, quantized=quantized, **settings)
    arms: list[Arm] = standard_arms(pipe, quantized, {})
    bytes_of: dict[str, int] = {"quantized": 0}
    said: dict[str, str] = {}
    if cell.higher:
        finer, _ = quantize_module(full, QuantizerSpec.parse(cell.higher))
        arms.append(Arm("one more bit", finer))
        bytes_of["one more bit"] = stored_size(finer) - size
    for budget in cell.budgets:
        found = fitted(run, budget)
        label = f"chosen, +{100 * budget:.0f} %"
        if found.adapters.layers:
            arms.append(Arm(label, quantized, found.adapters))
        bytes_of[label], said[label] = found.adapters.stored_bytes, found.report.text()
        print(found.report.text(), flush=True)
    if "-r" in cell.spec:
        arms += refitted(run, cell, bytes_of, said)
    if cell.rivals:
        arms += fitted_by_rivals(run, quantized, cell.budgets, size, bytes_of)
    prompts = kind.prompts(cell.images, 1)
    comparison = compare(
        pipe,
        arms,
        prompts=prompts,
        num_inference_steps=steps,
        evaluator=kind.evaluator(zoo.path_of(cell.twin)),
        folder=work,
        guidance_scale=twin.guidance_scale,
        batch_size=50,
    )
    rows = [{**arm.as_dict(), "share": bytes_of.get(arm.name, 0) / size} for arm in comparison.arms]
    return {
        "twin": cell.twin if cell.width is None else f"width {cell.width}",
        "quantizer": cell.backend or cell.spec,
        "bytes": size,
        "images": cell.images,
        "prompts": cell.prompts,
        "arms": rows,
        "fits": said,
    }


def refitted(run: Run, cell: Cell, bytes_of: dict[str, int], said: dict[str, str]) -> list[Arm]:
    """Branches refitted, each way, and adapters beside the refitted layers."""
    asked: dict[str, Any] = {
        "prompts": run.prompts.values,
        "num_inference_steps": run.num_inference_steps,
        "guidance_scale": run.guidance_scale,
        "batch_size": run.batch_size,
    }
    budget, arms = cell.budgets[0], []
    for name, metric in (("refit", None), ("refit in the metric", "output")):
        module, _ = evenkeel.refit_branches(
            run.pipeline, quantized=run.pair[1], metric=metric, progress=False, **asked
        )
        adapters, report = evenkeel.fit_adapters(
            run.pipeline, quantized=module, budget=budget, seed=1000, progress=False, **asked
        )
        label = f"{name}, chosen, +{100 * budget:.0f} %"
        arms.append(Arm(name, module))
        arms += [Arm(label, module, adapters)] if adapters.layers else []
        bytes_of |= {name: 0, label: adapters.stored_bytes}
        said[label] = report.text()
        print(report.text(), flush=True)
    return arms


def fitted_by_rivals(
    run: Run, quantized: nn.Module, budgets: Sequence[float], size: int, bytes_of: dict[str, int]
) -> list[Arm]:
    """Adapters of every method, budget and precision; all from the same rows."""
    arms = []
    with opened(sites_of(run), 4096, 8e9, gradients=True) as sites:
        found = collect(run, sites, probed=PROBED, progress=True)
        made_for = run.provenance(found.law, found.first[:1, None])
        problems: dict[str, list[LayerProblem]] = {}
        for name, site in sites.items():
            measured = Measured.of(name, site, {"output", "local"})
            for method, problem in rivals(measured) if measured is not None else ():
                problems.setdefault(method, []).append(problem)
        for budget in budgets:
            for method, some in problems.items():
                precisions = (3, 4, 16) if method == "output (ours)" else (3, 4)
                for bits in precisions:
                    solution = solved(some, bits, int(budget * size))
                    adapters = RecoveryAdapters(made_for, "output", bits, tuple(solution.layers))
                    label = f"{method}, {bits} bits, +{100 * budget:.0f} %"
                    arms.append(Arm(label, quantized, adapters))
                    bytes_of[label] = adapters.stored_bytes
    return arms


def solved(problems: Sequence[LayerProblem], bits: int, budget: int) -> Solution:
    """Bytes shared out, factors rounded."""
    components = {p.name: p.components() for p in problems}
    options = {p.name: p.options(components[p.name].left(), bits) for p in problems}
    chosen, solution = share_out(options, budget), Solution(bits)
    for p in problems:
        solution.add(p, components[p.name], int(str(chosen[p.name].choice)))
    return solution


def none_worse(cells: Cells) -> str:
    """Of every combination's adapters (those that were given out) the change of PSNR, Holm-corrected."""
    found = []
    for name, cell in cells.items():
        chosen = [a for a in cell["arms"] if a["name"].startswith("chosen")]
        # Those of recovery_frontier.py, by their bytes.
        chosen += [a for a in cell["arms"] if "base" in cell and a["name"].startswith("+")]
        for arm in chosen:
            # Without PSNR where some image is its reference to the bit, and infinitely near.
            changes = arm["difference_to_quantized"]
            change = changes.get("psnr", changes["ssim"])
            worse = scipy.stats.t.cdf(change["value"] / change["stderr"], change["n"] - 1)
            gain = change["value"] if "psnr" in changes else math.inf
            found.append((worse, gain, f"{name}, {arm['name']}", name))
    found.sort()
    count = len(found)
    holm = count * found[0][0]  # of the smallest p; where it is above 5 %, nothing is rejected
    finite = [f for f in found if math.isfinite(f[1])]
    lowest, highest = min(finite, key=lambda f: f[1]), max(finite, key=lambda f: f[1])
    nothing = sorted({*cells} - {f[3] for f in found})
    none = (
        f" Nothing was given out, and nothing changes, in {', '.join(nothing)}." if nothing else ""
    )
    return (
        f"{count} combinations of twin, weights, prompts, seed and bytes (recovery_frontier.py's included) "
        f"where adapters were given out: the change of PSNR lies between {lowest[1]:+.1f} ({lowest[2]}) and "
        f"{highest[1]:+.1f} dB ({highest[2]}). The smallest one-sided p of being worse, times its Holm "
        f"factor, is {min(holm, 1.0):.3g}.{none}"
    )


def table(cells: Cells) -> str:
    """RECOVERY.md."""
    lines = [
        "# Recovery adapters",
        "",
        *(__doc__ or "").splitlines()[2:12],
        "",
        none_worse(cells | known(FRONTIER, BASES)),
        "",
        *not_run(CELLS, cells),
        "| twin | weights | prompts | arm | more bytes | FD to full precision | PSNR, dB | change [95 %] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells.values():
        for arm in cell["arms"][1:]:
            fd = arm["frechet_full_precision"]
            lines.append(
                f"| {cell['twin']} | {cell['quantizer']} | {cell['prompts']} | {arm['name']} | "
                f"{100 * arm['share']:+.1f} % | {fd['value']:.3f} ± {fd['stderr']:.3f} | "
                f"{decibels(arm['psnr'])} | {change_of(arm)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", default=list(CELLS), metavar="CELL")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/recovery"))
    options = parser.parse_args()
    finish(
        options.cells,
        RESULTS,
        lambda name: measure(CELLS[name], options.work / name),
        lambda: write_atomically(HERE / "RECOVERY.md", table(known(RESULTS, CELLS))),
    )


if __name__ == "__main__":
    main()
