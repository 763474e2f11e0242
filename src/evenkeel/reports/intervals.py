"""Intervals as a picture: for every measure and corrected arm a dot and a bar beside zero."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from evenkeel.reports.measures import FURTHER, MEASURES, difference_text, finite_or_none, verdict
from evenkeel.reports.table import corrected_arms

LABEL, WIDE, TEXT, ROW = 230, 300, 200, 22  # in units of the drawing


def interval_plot(results: Mapping[str, Any]) -> str:
    """SVG; every measure has a scale of its own, symmetric about no difference. Empty where nothing is.

    Better is a filled dot, worse a hollow square and neither a short stroke, so that colour is not needed.
    """
    arms = corrected_arms(results)
    rows: list[str] = []
    y = ROW
    for measure in (*MEASURES, *FURTHER):
        found = [
            (arm["name"], d)
            for arm in arms
            if (d := (arm.get("difference_to_quantized") or {}).get(measure.key)) is not None
            and all(finite_or_none(d, key) is not None for key in ("value", "low", "high"))
        ]
        if not found:
            continue
        most = max(abs(d[key]) for _, d in found for key in ("value", "low", "high")) or 1.0
        rows.append(f'<text x="0" y="{y}" class="head">{escape(measure.heading)}</text>')
        y += ROW
        for name, d in found:
            value, low, high = (
                LABEL + WIDE / 2 * (1 + d[key] / most) for key in ("value", "low", "high")
            )
            word = verdict(measure, d)
            kind = word if word in ("better", "worse") else "same"
            middle = y - 5
            said = "{} ({})".format(*difference_text(d))
            rows.append(
                f'<g class="{kind}"><title>{escape(f"{measure.heading}, {name}: {said}, {word}")}</title>'
                f'<text x="12" y="{y}">{escape(_cut(name))}</text>'
                f'<path d="M{low:.1f} {middle}H{high:.1f}"/>{_mark(kind, value, middle)}'
                f'<text x="{LABEL + WIDE + 12}" y="{y}">{escape(said)}</text></g>'
            )
            y += ROW
        y += ROW // 2
    if not rows:
        return ""
    zero = LABEL + WIDE / 2
    return (
        f'<figure class="intervals"><div class="scroll"><svg role="img" viewBox="0 0 '
        f'{LABEL + WIDE + TEXT} {y}" aria-label="Change against the quantized arm with 95 % intervals, '
        f'per measure and arm; the tables below hold the same numbers">'
        f'<path class="zero" d="M{zero} 6V{y - ROW // 2}"/>{"".join(rows)}</svg></div>'
        "<figcaption>Change against the quantized arm, 95 % interval; the line is no change, each measure "
        "has its own scale. Filled dot: better; hollow square: worse; stroke: no difference shown."
        "</figcaption></figure>"
    )


def _mark(kind: str, x: float, y: float) -> str:
    if kind == "better":
        return f'<circle cx="{x:.1f}" cy="{y}" r="5"/>'
    if kind == "worse":
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5}" width="9" height="9"/>'
    return f'<path d="M{x:.1f} {y - 5}V{y + 5}"/>'


def _cut(name: str, most: int = 30) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
