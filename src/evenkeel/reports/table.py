"""The comparison as a table: rows are arms, and below them what each correction changed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from evenkeel.errors import EvenkeelError
from evenkeel.reports.measures import (
    ABSENT,
    COLUMNS,
    FULL_PRECISION,
    FURTHER,
    MEASURES,
    QUANTIZED,
    arm_text,
    difference_text,
    verdict,
)

Rows = list[list[str]]

LEGEND = (
    "value ± standard error; FD is the Fréchet distance. Lower is better for FD and s/image, higher "
    "for alignment, PSNR and SSIM. - means not available or not finite."
)
DIFFERENCE_TITLE = "Paired differences, arm minus quantized, with 95 % intervals"
DIFFERENCE_HEADINGS = ["arm", "measure", "difference", "95 % interval", "n", "verdict"]


def arms_of(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arms, in order.

    Raises:
        EvenkeelError: there are none, one has no name, or two share a name.

    """
    arms = list(results.get("arms") or [])
    names = [arm.get("name") for arm in arms]
    if not arms or not all(isinstance(name, str) and name for name in names):
        raise EvenkeelError(
            f"results['arms'] must be a non-empty list of arms with a 'name' each; found the names "
            f"{names}."
        )
    if len(set(names)) < len(names):
        raise EvenkeelError(f"two arms share a name: {names}. Give every arm its own.")
    return arms


def corrected_arms(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arms that are compared with the quantized one."""
    return [arm for arm in arms_of(results) if arm["name"] not in (FULL_PRECISION, QUANTIZED)]


def arm_rows(results: Mapping[str, Any]) -> Rows:
    """Heading and one row per arm, as text."""
    heading = ["arm", *(m.heading for m in COLUMNS)]
    return [heading, *([a["name"], *(arm_text(a, m) for m in COLUMNS)] for a in arms_of(results))]


def further_rows(results: Mapping[str, Any]) -> Rows:
    """Heading and one row per further measure, a column per arm; else only the heading."""
    arms = arms_of(results)
    rows = [
        [m.heading, *(arm_text(a, m) for a in arms)]
        for m in FURTHER
        if any(m.key in arm for arm in arms)
    ]
    return [["further measures", *(a["name"] for a in arms)], *rows]


def difference_rows(results: Mapping[str, Any]) -> Rows:
    """Heading and one row per corrected arm and measure; only the heading where there is none."""
    rows = [DIFFERENCE_HEADINGS]
    for arm in corrected_arms(results):
        differences = arm.get("difference_to_quantized") or {}
        for measure in (*MEASURES, *FURTHER):
            found = differences.get(measure.key)
            if found is not None:
                n = found.get("n")
                cells = (*difference_text(found), ABSENT if n is None else str(n))
                rows.append([arm["name"], measure.heading, *cells, verdict(measure, found)])
        if not differences:
            rows.append([arm["name"], *[ABSENT] * 4, "not compared"])
    return rows


def text_table(results: Mapping[str, Any]) -> str:
    """The comparison in monospaced columns, for the terminal.

    Args:
        results: with ``arms``, each ``{"name", measure: {"value", "stderr", "low", "high", "n"}}``
            and, for corrected arms, ``difference_to_quantized`` of the same shape per measure.

    Raises:
        EvenkeelError: no arms, or a number that is not finite (None is how to say so).

    >>> fd = {"value": 3.21, "stderr": 0.12, "low": 3.0, "high": 3.4, "n": 100}
    >>> table = text_table({"arms": [{"name": "quantized", "frechet_reference": fd}]})
    >>> table.splitlines()[2].split()
    ['quantized', '-', '3.21', '±', '0.12', '-', '-', '-', '-']

    """
    parts = [columns(arm_rows(results), left=1), *textwrap.wrap(LEGEND, 100)]
    if len(others := further_rows(results)) > 1:
        parts += ["", columns(others, left=1)]
    differences = difference_rows(results)
    if len(differences) > 1:
        parts += ["", DIFFERENCE_TITLE, "", columns(differences, left=2)]
    return "\n".join([*parts, *black(results), *left_out(results)])


def markdown_table(results: Mapping[str, Any]) -> str:
    """The comparison as two Markdown tables; arguments and errors as for :func:`text_table`.

    >>> markdown_table({"arms": [{"name": "quantized"}]}).splitlines()[2]
    '| quantized | - | - | - | - | - | - |'
    """
    parts = [_markdown(arm_rows(results), left=1), "", LEGEND]
    if len(others := further_rows(results)) > 1:
        parts += ["", _markdown(others, left=1)]
    differences = difference_rows(results)
    if len(differences) > 1:
        parts += ["", f"{DIFFERENCE_TITLE}:", "", _markdown(differences, left=2)]
    return "\n".join([*parts, *black(results), *left_out(results)])


def black(results: Mapping[str, Any]) -> list[str]:
    """The arms with images that are black in every pixel, and which they are."""
    found = [(arm["name"], arm["black"]) for arm in arms_of(results) if arm.get("black")]
    if not found:
        return []
    lines = (f"- {name}: {len(rows)}, number {', '.join(map(str, rows))}" for name, rows in found)
    return [
        "",
        "Images that are black in every pixel, as NaN leaves them; scored all the same:",
        *lines,
    ]


def left_out(results: Mapping[str, Any]) -> list[str]:
    """The corrections that were asked for and do not apply to this sampler, each with the reason."""
    reasons: Mapping[str, str] = results.get("not_applicable") or {}
    if not reasons:
        return []
    return ["", "Not applicable here:", *(f"- {name}: {why}" for name, why in reasons.items())]


def columns(rows: Rows, left: int) -> str:
    """Columns padded to their widest cell; the first ``left`` and the verdicts flush left."""
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_padded(row, widths, left)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _padded(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    last = len(row) - 1 if left == 2 else -1
    return [
        cell.ljust(width) if i < left or i == last else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _markdown(rows: Rows, left: int) -> str:
    rule = [":--" if i < left else "--:" for i in range(len(rows[0]))]
    escaped = [[" ".join(c.split()).replace("|", "\\|") for c in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])
