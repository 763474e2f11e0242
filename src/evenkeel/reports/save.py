"""Write what a comparison found: ``results.json``, the images of every arm, ``report.html``."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

from evenkeel.comparing.comparison import Comparison
from evenkeel.errors import MissingExtra
from evenkeel.record import Record
from evenkeel.record.describe import describe
from evenkeel.reports.html import report_html
from evenkeel.storage import Kind, valid_json, write_folder
from evenkeel.storage.atomic import Content

COMPARISON = Kind("comparison", 1, "compare again", keys=("settings",))


def save_results(
    out: Path,
    comparison: Comparison,
    settings: dict[str, Any],
    record: Record | None,
    prompts: list[str],
    *,
    shown: int = 64,
    not_applicable: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Write everything into ``out`` as one result and return the content of ``results.json``.

    ``settings`` and ``arms`` (name and measures, each with value, stderr, low, high, n), and
    ``calibration`` as ``inspection.describe`` gives it.
    """
    versions = {n: importlib.metadata.version(n) for n in ("evenkeel", "torch", "diffusers")}
    results: dict[str, Any] = {
        "settings": {**settings, **{f"{k} version": v for k, v in versions.items()}},
        "arms": [arm.as_dict() for arm in comparison.arms],
        "calibration": None if record is None else describe(record),
        "not_applicable": not_applicable or {},
    }
    results = json.loads(json.dumps(results, default=str))
    files: dict[str, Content] = {"results.json": valid_json(results, indent=1) + "\n"}
    grids = {name: images[:shown] for name, images in comparison.images.items()}
    try:
        files["report.html"] = report_html(results, grids, prompts[:shown])
    except MissingExtra as e:  # the images took hours, the numbers are written
        warnings.warn(f"{out / 'report.html'} was not written: {e}", stacklevel=2)
    write_folder(out, COMPARISON, {"settings": results["settings"]}, files)
    return results
