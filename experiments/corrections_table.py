"""CORRECTIONS.md from the results of corrections.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INTRODUCTION = """# Every sampler-side correction on the embedded pipeline

Made by `python experiments/corrections.py`; setting and seeds there. FD-FP: Fréchet distance to the
full-precision images; FD-real: to held-out real ones. Differences are arm minus quantized, paired by
prompt and noise, with 95 % intervals. **Bold**: the interval excludes zero. Check: the marginal check's
verdict from 64 other prompts, made before the images. DDIM keeps the linspace spacing that `from_config`
hands it; its formula steps by 20 and the timesteps do not, so levels are slightly off in every arm alike.
Arms are our default forms, TAC's K by least squares, and `tac-unconditional` came later than three of the
tables: published forms and all of TAC's are measured on every twin in MATRIX.md.
"""
WORDS = {"expected to help": "help", "expected to hurt": "hurt", "neutral": "neutral"}


def write_table(jobs: Sequence[Any], results: Path, out: Path) -> None:
    """One table per finished job, then how often the check agreed."""
    parts, outcomes = [INTRODUCTION], []
    for job in jobs:
        path = results / f"{job.name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        parts += [f"## {job.quantizer}, {job.setting}, {job.images} images", "", *_rows(found)]
        outcomes += _outcomes(found)
    parts += ["## Did the marginal check foresee it?", "", *_agreement(outcomes)]
    out.write_text("\n".join(parts) + "\n")


def _rows(found: dict[str, Any]) -> list[str]:
    checks = {a["name"]: a for a in found["check"]["arms"]}
    lines = [
        "| arm | FD-FP | difference | PSNR dB | difference | SSIM difference | FD-real difference | "
        "alignment difference | check |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in found["arms"][1:]:
        change = arm.get("difference_to_quantized", {})
        cells = [arm["name"], f"{arm['frechet_full_precision']['value']:.3f}"]
        cells += [_interval(change.get("frechet_full_precision"), 3)]
        cells += [f"{arm['psnr']['value']:.2f}", _interval(change.get("psnr"), 2)]
        cells += [_interval(change.get("ssim"), 4)]
        cells += [_interval(change.get("frechet_reference"), 3)]
        cells += [_interval(change.get("alignment"), 4)]
        check = checks.get(arm["name"])
        cells += ["" if check is None else WORDS.get(check["verdict"], check["verdict"])]
        lines.append("| " + " | ".join(cells) + " |")
    reasons = found["not applicable"]
    lines += ["", *(f"Not applicable: {name} ({why})" for name, why in reasons.items())]
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in found["seconds"].items())
    return [*lines, "", f"Measured on {found['torch_threads']} thread: {seconds}.", ""]


def _interval(estimate: dict[str, float] | None, digits: int) -> str:
    if not estimate or estimate["value"] is None:
        return ""
    low, high = estimate["low"], estimate["high"]
    text = f"{estimate['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return text if low <= 0 <= high else f"**{text}**"


def _shown(estimate: dict[str, float], better: int) -> str:
    if estimate["low"] <= 0 <= estimate["high"]:
        return "neutral"
    return "help" if estimate["value"] * better > 0 else "hurt"


def _outcomes(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(verdict, what PSNR showed, what the Frechet distance showed) per corrected arm."""
    checks = {a["name"]: WORDS.get(a["verdict"], a["verdict"]) for a in found["check"]["arms"]}
    rows = []
    for arm in found["arms"]:
        change = arm.get("difference_to_quantized")
        if change and arm["name"] in checks:
            psnr = _shown(change["psnr"], 1)
            distance = _shown(change["frechet_full_precision"], -1)
            rows.append((checks[arm["name"]], psnr, distance))
    return rows


def _agreement(outcomes: list[tuple[str, str, str]]) -> list[str]:
    if not outcomes:
        return ["No results yet."]
    lines = []
    for column, what in ((1, "PSNR"), (2, "Fréchet distance to full precision")):
        counts = Counter((row[0], row[column]) for row in outcomes)
        same = sum(n for (said, shown), n in counts.items() if said == shown)
        opposite = counts["help", "hurt"] + counts["hurt", "help"]
        lines += [
            f"{what}: the same in {same} of {len(outcomes)}, the opposite in {opposite}.",
            "",
            "| check said | images showed help | neutral | hurt |",
            "|---|---|---|---|",
        ]
        for said in ("help", "neutral", "hurt"):
            row = " | ".join(str(counts[said, shown]) for shown in ("help", "neutral", "hurt"))
            lines.append(f"| {said} | {row} |")
        lines.append("")
    return lines
