"""SAMPLING_AWARE.md: the paper's numbers beside ours, claim by claim."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenkeel.estimate import Estimate
from evenkeel.reproduction.verdict import Verdict, judged


@dataclass(frozen=True)
class Claim:
    """That one arm is better than another; FID of both in the paper, where it prints them."""

    cell: str
    solver: str
    better: str
    worse: str
    said: str
    paper: tuple[float, float] | None = None

    @property
    def relative(self) -> float | None:
        """Change of FID that the paper reports."""
        return None if self.paper is None else self.paper[0] / self.paper[1] - 1


SECOND = "dpm-solver-2"
CLAIMS = (
    Claim("ldm-4-w4a4", SECOND, "sa-qlora", "efficientdm", "SA-QLoRA: W4A4", (13.73, 17.28)),
    Claim("ldm-4-w4a8", SECOND, "sa-qlora", "efficientdm", "SA-QLoRA: W4A8", (8.55, 9.91)),
    Claim("ldm-4-w8a8", SECOND, "sa-ptq", "brecq + ptqd:published", "SA-PTQ: W8A8", (10.16, 10.76)),
    Claim("ldm-4-w8a8", SECOND, "sa-ptq", "brecq", "the pairs alone (FID -4.1)"),
    Claim("ldm-4-w4a4-parts", SECOND, "sa-qlora", "sa-qlora, no cosine", "L_COS (FID -.95)"),
    Claim("ldm-8-w4a4", SECOND, "sa-qlora", "efficientdm", "SA-QLoRA: LDM-8, W4A4 (FID -5.53)"),
    Claim("ldm-4-w4a4", SECOND, "sa-qlora", "same-state", "against the control: W4A4"),
    Claim("ldm-4-w4a8", SECOND, "sa-qlora", "same-state", "against the control: W4A8"),
    Claim("ldm-4-w4a4", "dpm-solver-1", "midpoint", "same-state", "against the control: order 1"),
    Claim("ldm-4-w8a8", SECOND, "sa-ptq", "sa-ptq, same-state", "against the control: W8A8"),
    Claim("sd-v1.4-w4a4", "plms", "sa-qlora", "same-state", "against the control: PLMS"),
    Claim("ldm-8-w4a4", SECOND, "sa-qlora", "same-state", "against the control: LDM-8"),
)


SMALL = -0.1  # what a change is measured against where the paper prints none
# What a verdict is called where there is no number to reproduce.
OURS = {"reproduced": "nearer", "opposite": "farther"}


def judged_claim(cell: dict[str, Any], claim: Claim) -> Verdict | None:
    """Of the paired difference of distances, relative to that of ``worse``; None where not measured."""
    found = cell["solvers"].get(claim.solver, {"arms": []})
    arms = {a["name"]: a for a in found["arms"]}
    if claim.better not in arms or claim.worse not in arms:
        return None
    there, sign = found["differences"].get(claim.better, {}).get(claim.worse), 1.0
    if there is None:  # measured from the other end
        there, sign = found["differences"].get(claim.worse, {}).get(claim.better), -1.0
    if there is None:
        return None
    d = there["frechet"]
    low, high = sorted(sign * d[k] for k in ("low", "high"))
    change = Estimate(sign * d["value"], d["stderr"], low, high, d["n"])
    published = SMALL if claim.relative is None else claim.relative
    return judged(published, change, arms[claim.worse]["frechet_full_precision"]["value"])


def table(results: Path, order: Sequence[str], said: str) -> str:
    """The whole page."""
    known = {c: results / f"{c}.json" for c in order}
    cells = {c: json.loads(p.read_text()) for c, p in known.items() if p.exists()}
    lines = ["# Sampling-aware quantization", "", *said.strip().splitlines()[2:], ""]
    missing = [c for c in order if c not in cells]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines += [
        "## Claims",
        "",
        "Relative change of the distance (the paper: of FID); negative is better. Where the paper prints no",
        "pair of numbers, as for the control, a verdict is nearer or farther, and null and underpowered are",
        "about a change of 10 %.",
        "",
        "| claim | better | than | paper | ours [95 %] | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        found = judged_claim(cells[claim.cell], claim) if claim.cell in cells else None
        if found is None:
            continue
        paper = "-" if claim.relative is None else f"{100 * claim.relative:+.0f} %"
        word = found.word if claim.relative is not None else OURS.get(found.word, found.word)
        row = (claim.said, claim.better, claim.worse, paper, _percent(found), word)
        lines.append(f"| {' | '.join(row)} |")
    for name, cell in cells.items():
        lines += ["", f"## {name}", "", _about(cell), "", *_arms(cell)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _arms(cell: dict[str, Any]) -> list[str]:
    differences = [d for s in cell["solvers"].values() for d in s["differences"].values()]
    rivals = sorted({rival for d in differences for rival in d})
    heads = ["solver", "arm", "FD to full precision", "PSNR, dB"]
    heads += [f"to {r}, dB [95 %]" for r in ("the start", *rivals)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for solver, found in cell["solvers"].items():
        for arm in found["arms"][1:]:
            lines.append(_row(f"{solver}, {found['steps']}", arm, found["differences"], rivals))
    return lines


def _row(solver: str, arm: dict[str, Any], differences: Any, rivals: Sequence[str]) -> str:
    fd, psnr = arm["frechet_full_precision"], arm["psnr"]
    start = arm.get("difference_to_quantized", {}).get("psnr")
    others = [differences.get(arm["name"], {}).get(r, {}).get("psnr") for r in rivals]
    cells = [solver, arm["name"], f"{fd['value']:.3f} ± {fd['stderr']:.3f}", f"{psnr['value']:.2f}"]
    return "| " + " | ".join([*cells, *(_decibels(d) for d in (start, *others))]) + " |"


def _about(cell: dict[str, Any]) -> str:
    off, last = (f"{100 * cell['floor'][k]:.2f} %" for k in ("mean", "last"))
    return (
        f"{cell['twin']}, {cell['bits']}, {cell['optimizer_steps']} optimizer steps, "
        f"{cell['iterations']} iterations of AdaRound, {cell['images']} images, training seed "
        f"{cell['seed']}, steps count {cell['counted']}. Full precision itself is off by {off} of its "
        f"output's square between paired points ({last} in the last interval)."
    )


def _decibels(found: dict[str, float] | None) -> str:
    return (
        ""
        if found is None
        else f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
    )


def _percent(found: Verdict) -> str:
    value, low, high = (100 * v for v in (found.value, found.low, found.high))
    return f"{value:+.0f} % [{low:+.0f}, {high:+.0f}]"
