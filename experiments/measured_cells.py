"""Cells of an experiment: one small result file each, so that an interrupted command goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from evenkeel.reproduction import PAPERS
from evenkeel.storage import write_atomically

Cells = dict[str, dict[str, Any]]


def known(results: Path, names: Iterable[str]) -> Cells:
    """What is measured already, in this order."""
    places = {name: _place(results, name) for name in names}
    return {name: json.loads(p.read_text()) for name, p in places.items() if p.exists()}


def finish(
    asked: Iterable[str],
    results: Path,
    measure: Callable[[str], dict[str, Any]],
    publish: Callable[[], object],
    whole: Callable[[str], bool] = lambda name: True,
) -> None:
    """Measure what has no file yet, or is not whole; after every cell the page is written again."""
    for name in asked:
        place = _place(results, name)
        if not (place.exists() and whole(name)):
            write_atomically(place, json.dumps(_short(measure(name)), separators=(",", ":")) + "\n")
        publish()


def _short(found: Any) -> Any:
    """Eight digits of every number: more take room and say nothing."""
    if isinstance(found, float) and math.isfinite(found):
        return float(f"{found:.8g}")
    if isinstance(found, dict):
        return {key: _short(value) for key, value in found.items()}
    return [_short(value) for value in found] if isinstance(found, list) else found


def _place(results: Path, name: str) -> Path:
    return results / f"{name.replace(' ', '-')}.json"


def not_run(names: Iterable[str], cells: Cells) -> list[str]:
    """What a page says of cells without a file."""
    missing = [name for name in names if name not in cells]
    return [f"Not run yet: {', '.join(missing)}.", ""] if missing else []


def reproduced() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of the papers' cells, each with its first calibration: paper, name, result."""
    for name in PAPERS:
        for place in sorted((Path(__file__).parent / "reproduced" / name).glob("*.json")):
            result = json.loads(place.read_text())
            if result["calibration_seed"] == 0:
                yield name, f"{name} {place.stem}", result


def decibels(psnr: dict[str, Any]) -> str:
    """Of an arm; infinite where some image is its reference to the bit."""
    return "infinite" if psnr["value"] is None else f"{psnr['value']:.2f}"


def change_of(arm: dict[str, Any]) -> str:
    """Of PSNR against the plain quantized arm, paired, with its interval."""
    change = arm.get("difference_to_quantized", {}).get("psnr")
    if change is None:
        return ""
    return f"{change['value']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"
