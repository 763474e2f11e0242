"""QUANTIZERS.md from the results on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INTRODUCTION = """# Quantization methods on the embedded pipeline

Made by `python experiments/quantizers.py`; setting and seeds there. {images} images an arm, the same
prompts and noise in all. FD-FP: Fréchet distance to the full-precision images; ± is one standard error.
Size: the file as stored, codes packed and everything else in the model's float32, and what it would be
with everything else in 16 bits (full precision in 16 bits: {full:.2f} MB). Bit operations: of linear and
convolution layers, in percent of those with 16 x 16 bits; attention left out, branches at 16 x 16.
Seconds: processor time of quantizing, calibration calls included. Memory: the most that the process held
beyond the loaded pipeline (10.5 MB of weights), all of it: the copy and the calibration tensors. The
reconstruction methods ran {iterations} iterations a block, not the paper's 20,000.
"""


def write_table(names: Sequence[str], results: Path, out: Path) -> None:
    """All finished jobs, then what corrections add to some of them."""
    found = {
        n: json.loads((results / f"{n}.json").read_text())
        for n in names
        if (results / f"{n}.json").exists()
    }
    if not found:
        return
    first = next(iter(found.values()))
    head = INTRODUCTION.format(
        images=first["arms"][1]["psnr"]["n"],
        full=first["report"]["full_precision_bytes"] / 1e6,
        iterations=max(f["method"].get("iterations", 0) for f in found.values()),
    )
    lines = [
        "| quantizer | FD-FP | PSNR dB | alignment | file MB | in 16 bits | bit operations | seconds "
        "| memory MB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(name, f) for name, f in found.items()),
        "",
        "## Do corrections still matter?",
        "",
        "Differences to the quantized arm, paired, with 95 % intervals; **bold** excludes zero. The",
        "published correction is the one that the marginal check ranks first among all of them.",
        "",
        "| quantizer | arm | FD-FP | difference | PSNR dB | difference |",
        "|---|---|---|---|---|---|",
        *(line for name, f in found.items() for line in _corrected(name, f)),
    ]
    out.write_text("\n".join([head, *lines]) + "\n")


def _row(name: str, found: dict[str, Any]) -> str:
    arm, cost, operations = found["arms"][1], found["cost"], found["bit_operations"]
    distance, alignment = arm["frechet_full_precision"], arm["alignment"]
    cells = [
        name,
        f"{distance['value']:.3f} ± {distance['stderr']:.3f}",
        f"{arm['psnr']['value']:.2f}",
        f"{alignment['value']:.3f}",
        f"{found['file_bytes'] / 1e6:.2f}",
        f"{found['report']['stored_bytes'] / 1e6:.2f}",
        f"{operations['quantized'] / operations['full_precision']:.1%}",
        f"{cost['seconds']:.0f}",
        f"{cost['more_memory_bytes'] / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _corrected(name: str, found: dict[str, Any]) -> list[str]:
    lines = []
    for arm in found["arms"][2:]:
        change = arm["difference_to_quantized"]
        cells = [name, arm["name"], f"{arm['frechet_full_precision']['value']:.3f}"]
        cells += [_interval(change["frechet_full_precision"], 3), f"{arm['psnr']['value']:.2f}"]
        cells += [_interval(change["psnr"], 2)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _interval(estimate: dict[str, float], digits: int) -> str:
    low, high = estimate["low"], estimate["high"]
    text = f"{estimate['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return text if low <= 0 <= high else f"**{text}**"
