"""The report: one HTML file that needs nothing else, to read, to send and to keep."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from evenkeel.reports.intervals import interval_plot
from evenkeel.reports.measures import ABSENT, FURTHER, MEASURES
from evenkeel.reports.pictures import picture_table
from evenkeel.reports.plots import (
    correlation_plot,
    factor_plot,
    gain_slope_plot,
    spectrum_plot,
    variance_plot,
)
from evenkeel.reports.script import SCRIPT
from evenkeel.reports.style import CSS
from evenkeel.reports.summary import in_short, summary
from evenkeel.reports.table import (
    DIFFERENCE_TITLE,
    LEGEND,
    Rows,
    arm_rows,
    arms_of,
    black,
    difference_rows,
    further_rows,
)
from evenkeel.storage import write_atomically

PLOTS: tuple[tuple[Callable[[Mapping[str, Any]], bytes], str, str], ...] = (
    (
        factor_plot,
        "Correction per step",
        "Above zero the corrected sampler goes further than the plain one at that step, at zero it "
        "is left alone; the shaded band is where c falls when other calibration prompts are drawn.",
    ),
    (
        variance_plot,
        "Variance of the error",
        "The higher the line, the more random error quantization adds to the model's output at "
        "that step; this is what the correction is computed from.",
    ),
    (
        gain_slope_plot,
        "Gain and slope of the error",
        "Away from zero, part of the error is not random but a fixed share of the output itself, "
        "which stretching a step does not remove.",
    ),
    (
        correlation_plot,
        "Correlation between steps",
        "Red off the diagonal means that the error of one step returns in another; the correction "
        "takes the errors of different steps to be unrelated, which would be white there.",
    ),
    (
        spectrum_plot,
        "Spectrum of the error",
        "Flat lines mean that the error looks like white noise, as the correction takes it to; "
        "lines that fall mean that it is smooth, with structure over many pixels.",
    ),
)


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    images: Mapping[str, Tensor],
    prompts: Sequence[str],
) -> Path:
    """Everything about one comparison in one HTML file, pictures included, nothing to load.

    The file appears whole or not at all. Folders that are missing are made.

    Args:
        path: of the file.
        results: ``settings``, ``arms`` and ``calibration`` (or None), as JSON can hold them.
        images: arm name to uint8 (k, 3, H, W); empty for a report without pictures, which says so.
        prompts: of the k pictures.

    Returns:
        The path.

    Raises:
        EvenkeelError: no arms, numbers that are not finite, pictures that do not fit the prompts.

    Example: ``write_report("report.html", results, {"quantized": pictures}, ["a red kite"])``.

    """
    return write_atomically(Path(path), report_html(results, images, prompts))


def report_html(
    results: Mapping[str, Any], images: Mapping[str, Tensor], prompts: Sequence[str]
) -> str:
    """The content of that file."""
    names = [arm["name"] for arm in arms_of(results)]
    settings = results.get("settings") or {}
    subtitle = " · ".join(str(settings[k]) for k in ("pipeline", "quantizer") if settings.get(k))
    calibration = results.get("calibration")
    short = "".join(f"<p>{escape(text)}</p>" for text in in_short(results))
    sentences = "".join(f"<p>{escape(text)}</p>" for text in summary(results))
    spoilt = "".join(f"<p class='note'>{escape(line)}</p>" for line in black(results) if line)
    body = [
        f"<header><h1>{escape(_title(names))}</h1><p>{escape(subtitle)}</p></header>",
        _section(
            "In words",
            f'<div class="summary">{short}</div>{interval_plot(results)}'
            f"<details><summary>With every number</summary>{sentences}</details>"
            + _caution(results)
            + spoilt,
        ),
        _section("Pictures", _pictures(images, prompts)),
        _section("Measures", _measures(results)),
        _section("Calibration", _calibration(calibration)),
        _section("Settings", _settings(settings)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(_title(names))}</title><style>{CSS}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _title(names: Sequence[str]) -> str:
    return "evenkeel: " + " · ".join(names)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>"


def _caution(results: Mapping[str, Any]) -> str:
    count = len(difference_rows(results)) - 1
    if count == 0:
        return ""
    return (
        "<p class='note'>A 95 % interval misses the truth one time in twenty, so of "
        f"{count} comparisons an occasional one excludes zero by chance alone. Where an interval "
        "includes zero, a difference was not shown; that it is exactly zero was not shown either.</p>"
    )


def _pictures(images: Mapping[str, Tensor], prompts: Sequence[str]) -> str:
    if not images:
        return "<p>No pictures were given to this report.</p>"
    return picture_table(images, prompts)


def _measures(results: Mapping[str, Any]) -> str:
    parts = [_table(arm_rows(results), "Measures of every arm", left=1)]
    parts.append(f"<p class='note'>{escape(LEGEND)}</p>")
    others = further_rows(results)
    if len(others) > 1:
        parts.append(_table(others, "Further measures", left=1))
    shown = (*MEASURES, *(m for m in FURTHER if any(m.heading == row[0] for row in others)))
    meaning = "".join(f"<dt>{escape(m.heading)}</dt><dd>{escape(m.words)}</dd>" for m in shown)
    parts.append(f"<details><summary>What is measured</summary><dl>{meaning}</dl></details>")
    differences = difference_rows(results)
    if len(differences) > 1:
        parts.append(_table(differences, DIFFERENCE_TITLE, left=2))
    else:
        parts.append("<p>There are no corrected arms, and so no differences.</p>")
    return "\n".join(parts)


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "<p>No calibration was given to this report.</p>"
    parts = [
        f"<p>Measured on {escape(str(calibration.get('prompts')))} prompts with the quantizer "
        f"{escape(str(calibration.get('quantizer')))}, the quantized model beside the "
        "full-precision one.</p>"
    ]
    for plot, title, meaning in PLOTS:
        parts.append(f"<h3>{escape(title)}</h3>")
        if plot is spectrum_plot and not calibration.get("error_spectrum"):
            parts.append("<p>This calibration holds no spectrum of the error.</p>")
        else:
            parts.append(_figure(plot(calibration), title, meaning, "plot"))
    parts += ["<h3>Step by step</h3>", _table(_step_rows(calibration), "What was done", left=0)]
    return "\n".join(parts)


def _step_rows(calibration: Mapping[str, Any]) -> Rows:
    rows = [["step", "timestep", "noise to signal", "factor per channel", "explanation"]]
    for step in calibration["steps"]:
        factors = ", ".join(_short(f) for f in step["factor"])
        place = [_short(step.get(key)) for key in ("step", "timestep", "noise_to_signal")]
        rows.append([*place, factors, step.get("explanation") or ABSENT])
    return rows


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "<p>No settings were given to this report.</p>"
    items = (
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(_as_text(value))}</dd></div>"
        for key, value in settings.items()
    )
    return f'<dl class="settings">{"".join(items)}</dl>'


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    return ABSENT if value is None else f"{value:.5g}"


def _table(rows: Rows, caption: str, left: int) -> str:
    heading = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    kind = "numbers sortable" if left else "sortable"
    body = "\n".join(f"<tr>{_cells(row, left)}</tr>" for row in rows[1:])
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heading}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[str], left: int) -> str:
    verdicts = {"better": "better", "worse": "worse"}
    cells = []
    for i, cell in enumerate(row):
        kind = f' class="{verdicts[cell]}"' if i == len(row) - 1 and cell in verdicts else ""
        tag = '<th scope="row">{}</th>' if i < left else f"<td{kind}>{{}}</td>"
        cells.append(tag.format(escape(cell)))
    return "".join(cells)


def _figure(png: bytes, alt: str, caption: str, kind: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure class="{kind}"><div class="scroll"><img alt="{escape(alt)}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{escape(caption)}</figcaption>'
        "</figure>"
    )
