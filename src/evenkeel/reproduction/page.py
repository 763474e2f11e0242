"""One page per paper: what it prints, what the same cell gives here, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evenkeel.reproduction.cells import Paper, Row
from evenkeel.reproduction.run_cell import SEVERITIES
from evenkeel.reproduction.verdict import Verdict


def page(paper: Paper, found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Markdown; ``found`` by row and severity, as ``run_cell`` returned it."""
    lines = [paper.heading, "", f"{paper.source}. {paper.data}.", ""]
    lines += [
        "Relative change of the claimed measure against the quantized arm, 95 % interval. *reproduced*: the "
        "interval excludes 0 on the paper's side; *opposite*: on the other; *null*: it includes 0 and "
        "excludes a change as large as the paper's; *underpowered*: it includes both. `bits` is the paper's "
        "quantizer, `damage` plain rounding that does as much harm as the paper's.",
        "",
        "| cell | model | claim | severity | quantizer | images | published | here | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    without: list[Row] = []
    for row in paper.rows:
        if row.cell is None:
            without.append(row)
            continue
        lines += [_line(row, severity, found.get((row.id, severity))) for severity in SEVERITIES]
    notes = [f"- {row.id}: {row.note}." for row in paper.rows if row.cell is not None and row.note]
    if notes:
        lines += ["", "## What differs from the paper", "", *notes]
    if without:
        lines += ["", "## Rows without a cell", ""]
        lines += [f"- {row.id} ({row.model}): {row.reason}." for row in without]
    return "\n".join(lines) + "\n"


def _line(row: Row, severity: str, result: Mapping[str, Any] | None) -> str:
    assert row.claim is not None
    gain = row.gain()
    start = f"| {row.id} | {row.model} | {row.claim[0]}, {row.claim[1]} | {severity} |"
    if result is None:
        return f"{start} | | {100 * (gain or 0):+.1f} % | | not run |"
    verdict = Verdict(**result["verdict"])
    here = f"{100 * verdict.value:+.1f} % [{100 * verdict.low:+.1f}, {100 * verdict.high:+.1f}]"
    return (
        f"{start} {result['quantizer']} | {result['images']} | {100 * verdict.published:+.1f} % | {here} | "
        f"{verdict.word} |"
    )


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """A line per result, for the terminal."""
    return "\n".join(f"{r['row']} ({r['severity']}): {Verdict(**r['verdict'])}" for r in found)
