"""One page per paper: what it prints, what the same cell gives here, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evenkeel.reports.measures import FULL_PRECISION, FURTHER, MEASURES
from evenkeel.reproduction.cells import QUANTIZED, Paper, Row
from evenkeel.reproduction.run_cell import OURS, variant
from evenkeel.reproduction.verdict import Verdict

_HEAD = (
    "Relative change of the claimed measure against the quantized arm, 95 % interval. *reproduced*: the "
    "interval excludes 0 on the paper's side; *opposite*: on the other; *null*: it includes 0 and excludes "
    "a change as large as the paper's; *underpowered*: it includes both. `bits` is the paper's quantizer, "
    "`damage` plain rounding whose harm comes nearest to the paper's; `seed` other calibration prompts. "
    "Harm: the claimed measure, quantized over full precision, in the paper and here. Below, every measure "
    "that the paper prints, its own change in brackets; here the twin's evaluator stands for Inception, CLIP "
    "and LPIPS.",
    "",
    "| cell | model | claim | severity | quantizer | images | harm, published | here | change, published | "
    "here | verdict |",
    f"|{'---|' * 11}",
)
_TO_FULL_PRECISION = ("frechet_full_precision", "psnr", "ssim", "perceptual")
_HEADINGS = {m.key: m.heading for m in (*MEASURES, *FURTHER)}


def page(paper: Paper, found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Markdown; ``found`` by row and `variant`, as ``run_cell`` returned it."""
    lines = [paper.heading, "", f"{paper.source}. {paper.data[0].upper()}{paper.data[1:]}."]
    if any(row.cell is not None for row in paper.rows):
        lines += ["", *_HEAD]
    without: list[Row] = []
    for row in paper.rows:
        if row.cell is None:
            without.append(row)
            continue
        lines += [_line(row, v, found.get((row.id, v))) for v in _variants(row, found, "bits")]
    for row in paper.rows:
        for which in _variants(row, found):
            lines += _arms(row, which, found[row.id, which])
    notes: dict[str, list[str]] = {}
    for row in paper.rows:
        for note in row.note.split("; ") if row.cell is not None and row.note else ():
            notes.setdefault(note, []).append(row.id)
    if notes:
        lines += ["", "## What differs from the paper", ""]
        lines += [f"- {note}: {', '.join(rows)}." for note, rows in notes.items()]
    if without:
        lines += ["", "## Rows without a cell", ""]
        lines += [f"- {row.id} ({row.model}): {row.reason}." for row in without]
    return "\n".join(lines) + "\n"


def _variants(
    row: Row, found: Mapping[tuple[str, str], object], always: str | None = None
) -> list[str]:
    """Of this row, what there is, and what is named even if there is nothing."""
    return sorted({v for name, v in found if name == row.id} | ({always} if always else set()))


def _line(row: Row, which: str, result: Mapping[str, Any] | None) -> str:
    assert row.claim is not None
    gain = row.gain()
    start = f"| {row.id} | {row.model} | {row.claim[0]}, {row.claim[1]} | {which} |"
    printed = "" if (harm := row.damage()) is None else f"{harm:.2f}"
    if result is None:
        return f"{start} | | {printed} | | {100 * (gain or 0):+.1f} % | | not run |"
    verdict = Verdict(**result["verdict"])
    here = f"{100 * verdict.value:+.1f} % [{100 * verdict.low:+.1f}, {100 * verdict.high:+.1f}]"
    return (
        f"{start} {result['quantizer']} | {result['images']} | {printed} | {_harm(result, row.claim[1])} | "
        f"{100 * verdict.published:+.1f} % | {here} | {verdict.word} |"
    )


def _harm(result: Mapping[str, Any], measure: str) -> str:
    """Of quantization; empty where full precision is what the others are measured against."""
    full, quantized = (
        next(arm for arm in result["arms"] if arm["name"] == name).get(OURS[measure])
        for name in (FULL_PRECISION, QUANTIZED)
    )
    return "" if full is None else f"{quantized['value'] / full['value']:.2f}"


def _arms(row: Row, which: str, result: Mapping[str, Any]) -> list[str]:
    """Every arm of a cell, and what could not be made, with the reason."""
    arms = {arm["name"]: arm for arm in result["arms"]}
    full, quantized = arms.pop(FULL_PRECISION), arms.pop(QUANTIZED)
    measures = _measures(row, quantized)
    levels = []
    for measure in measures:
        levels.append(f"{_HEADINGS[measure]} {quantized[measure]['value']:.4g}")
        if measure not in _TO_FULL_PRECISION and measure in full:
            levels[-1] += f" (full precision {full[measure]['value']:.4g})"
    lines = [
        "",
        f"## {row.id}, {which}: {row.model}",
        "",
        f"{result['twin']}, {result['quantizer']}, {result['calibration_prompts']} calibration prompts, "
        f"{result['images']} images. Quantized: {', '.join(levels)}.",
        "",
        f"| arm | {' | '.join(_HEADINGS[m] for m in measures)} |",
        f"|{'---|' * (1 + len(measures))}",
    ]
    for name, arm in arms.items():
        changes = (
            _change(arm, quantized, measure) + _published(row, name, printed)
            for measure, printed in measures.items()
        )
        lines.append(f"| {name} | {' | '.join(changes)} |")
    lines += [f"\n{name} was not made: {why}" for name, why in result["refused"].items()]
    return lines


def _measures(row: Row, quantized: Mapping[str, Any]) -> dict[str, str]:
    """Ours, each with the paper's name of it: the claimed one first, then the paper's others.

    Distance and PSNR to full precision are always among them.
    """
    assert row.claim is not None
    printed = [row.claim[1], *(m for numbers in row.numbers.values() for m in numbers if m in OURS)]
    found = {OURS[measure]: measure for measure in printed}
    found = {"frechet_full_precision": "", "psnr": ""} | found
    order = [OURS[row.claim[1]], *(m for m in found if m != OURS[row.claim[1]])]
    return {m: found[m] for m in order if quantized.get(m, {}).get("value") is not None}


def _published(row: Row, arm: str, measure: str) -> str:
    """The paper's change of a measure by this arm, in brackets; empty where it prints none."""
    before = row.numbers[QUANTIZED].get(measure)
    after = row.numbers.get(arm, {}).get(measure)
    if before is None or after is None:
        return ""
    if measure == "PSNR":
        return f" (paper {after - before:+.2f})"
    return f" (paper {100 * (after - before) / abs(before):+.1f})"


def _change(arm: Mapping[str, Any], quantized: Mapping[str, Any], measure: str) -> str:
    """Against the quantized arm, with its interval: in dB, or relative; bold where it excludes zero."""
    change = arm["difference_to_quantized"].get(measure)
    if change is None or change["value"] is None:
        return "-"
    decibels = measure == "psnr"
    scale = 1.0 if decibels else 100 / abs(quantized[measure]["value"])
    value, low, high = (scale * change[k] for k in ("value", "low", "high"))
    digits = 2 if decibels else 1
    text = (
        f"{value:+.{digits}f}{' dB' if decibels else ' %'} [{low:+.{digits}f}, {high:+.{digits}f}]"
    )
    return f"**{text}**" if low > 0 or high < 0 else text


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """A line per result, for the terminal."""
    return "\n".join(
        f"{r['row']} ({variant(r['severity'], r['calibration_seed'])}): {Verdict(**r['verdict'])}"
        for r in found
    )
