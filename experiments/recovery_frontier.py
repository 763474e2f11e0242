"""Quality against total bytes: weights of 2 to 8 bits and real formats, alone and with recovery adapters.

Frozen: embedded pipeline, DPM-Solver++ 2M, 20 steps, guidance 4.5; everything fitted on 32 prompts (seed 0),
200 images of other prompts (seed 1), the same noise in every arm. Our weights have groups of 32 with a scale
of 16 bits. An adapter that held-out pairs did not confirm is not there (`fit_adapters` returns none).

Every base is a file in experiments/recovery_frontier/; the command resumes.

    python experiments/recovery_frontier.py [BASE ...]   # default: all; writes RECOVERY_FRONTIER.md and .svg
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

from measured_cells import Cells, change_of, decibels, finish, known, not_run
from torch import nn

import evenkeel
from evenkeel import zoo
from evenkeel.comparing.comparison import Arm, compare, standard_arms
from evenkeel.fitting.adapters.fit_adapters import stored_size
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.storage import write_atomically
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "recovery_frontier"
TWIN, PROMPTS, IMAGES = "pixart-sigma", 32, 200
BUDGETS = (0.04, 0.11, 0.22)
BASES = (
    *(f"w{bits}a16-g32" for bits in (3, 4, 5, 2, 6, 8)),
    *("gptq w4a16-g32", "gptq w3a16-g32", "gguf Q4_0", "bitsandbytes nf4", "gguf Q5_0"),
    *("w4a16-g16", "w4a16-g64", "w3a16-g16", "gguf Q8_0"),
)


def quantized_as(base: str, pipe: Any, asked: dict[str, Any]) -> nn.Module:
    """The embedded denoiser in this form."""
    if base.startswith("gptq "):
        method = RoundToNearest.of_bits(
            "w4a16" if "w4" in base else "w3a16", rounding="gptq", group=32
        )
        return evenkeel.quantize(pipe, method, **asked)[0]
    if base.startswith("w"):
        return quantize_module(pipe.transformer, QuantizerSpec.parse(base))[0]
    sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
    from quantized_by import BACKENDS

    made: nn.Module = BACKENDS[base][1](copy.deepcopy(pipe.transformer))
    return made


def measure(base: str, work: Path) -> dict[str, Any]:
    """A base alone and with adapters of every budget, against the full-precision images."""
    twin, pipe = zoo.twin(TWIN), zoo.load(TWIN)
    kind = KINDS[twin.pictures]
    asked: dict[str, Any] = {
        "prompts": kind.prompts(PROMPTS, 0),
        "num_inference_steps": twin.num_inference_steps,
        "guidance_scale": twin.guidance_scale,
        "batch_size": 32,
        "progress": False,
    }
    module = quantized_as(base, pipe, asked)
    size = stored_size(module)
    arms: list[Arm] = standard_arms(pipe, module, {})
    bytes_of = {arm.name: size for arm in arms}
    for budget in BUDGETS:
        adapters, _ = evenkeel.fit_adapters(pipe, quantized=module, budget=budget, **asked)
        name = f"+{100 * budget:.0f} %"
        bytes_of[name] = size + adapters.stored_bytes
        if adapters.layers:
            arms.append(Arm(name, module, adapters))
    found = compare(
        pipe,
        arms,
        prompts=kind.prompts(IMAGES, 1),
        num_inference_steps=twin.num_inference_steps,
        evaluator=kind.evaluator(zoo.path_of(TWIN)),
        folder=work,
        guidance_scale=twin.guidance_scale,
        batch_size=50,
    )
    rows = [{**arm.as_dict(), "bytes": bytes_of.get(arm.name, 0)} for arm in found.arms]
    return {"base": base, "bytes": size, "arms": rows}


def table(cells: Cells) -> str:
    """RECOVERY_FRONTIER.md."""
    lines = [
        "# Quality against total bytes",
        "",
        *(__doc__ or "").splitlines()[2:6],
        "",
        *not_run(BASES, cells),
        "![frontier](recovery_frontier.svg)",
        "",
        "| base | adapters | kB in all | PSNR, dB | FD to full precision | change, dB [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells.values():
        for arm in cell["arms"][1:]:
            fd, name = arm["frechet_full_precision"], arm["name"]
            lines.append(
                f"| {cell['base']} | {'none' if name == 'quantized' else name} | "
                f"{arm['bytes'] / 1e3:.0f} | {decibels(arm['psnr'])} | "
                f"{fd['value']:.3f} ± {fd['stderr']:.3f} | {change_of(arm)} |"
            )
    return "\n".join(lines) + "\n"


def figure(cells: Cells, place: Path) -> None:
    """PSNR with its interval against bytes: bases alone in grey, each with its adapters as a line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "frontier", "svg.fonttype": "none"}
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(8, 5))
    for cell in cells.values():
        points = sorted(
            (a["bytes"] / 1e3, a["psnr"]["value"], a["psnr"]["low"], a["psnr"]["high"])
            for a in cell["arms"][1:]
            if a["psnr"]["value"] is not None
        )
        x, y, low, high = zip(*points, strict=True)
        bars = (
            [v - b for v, b in zip(y, low, strict=True)],
            [t - v for v, t in zip(y, high, strict=True)],
        )
        axes.errorbar(x, y, bars, marker=".", color="#1b6ca8", linewidth=1, capsize=2)
        axes.plot(x[0], y[0], "o", color="#555555")
        axes.annotate(cell["base"], (x[0], y[0]), (4, -9), textcoords="offset points", fontsize=7)
    axes.set_xlabel("kB of the quantized denoiser, adapters included")
    axes.set_ylabel("PSNR to full precision, dB [95 %]")
    axes.set_title("Grey: weights alone. Blue: with recovery adapters of 4, 11 and 22 % more bytes")
    picture.tight_layout()
    picture.savefig(place, metadata={"Date": None})


def publish() -> None:
    """The page and its figure."""
    cells = known(RESULTS, BASES)
    write_atomically(HERE / "RECOVERY_FRONTIER.md", table(cells))
    figure(cells, HERE / "recovery_frontier.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bases", nargs="*", default=list(BASES), metavar="BASE")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/recovery_frontier"))
    options = parser.parse_args()
    finish(
        options.bases,
        RESULTS,
        lambda base: measure(base, options.work / base.replace(" ", "-")),
        publish,
    )


if __name__ == "__main__":
    main()
