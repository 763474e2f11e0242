"""A model card for what has none of its own: records, readouts, quantized denoisers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evenkeel.errors import StorageError
from evenkeel.quantizers import load_quantized
from evenkeel.record import Record, load
from evenkeel.storage.hub import licence_of

QUANTIZED = "quantized denoiser"


def kind_of_place(place: Path) -> str:
    """What a file or folder holds, read whole.

    Raises:
        StorageError: nothing of this library's, or damaged.

    """
    if (place / "quantized.json").is_file():
        load_quantized(place)
        return QUANTIZED
    found = load(place)
    return "record" if isinstance(found, Record) else found.name


def card_of(place: Path, repo: str, base: str | None) -> str:
    """Metadata that the hub takes, what it is, and the line that uses it.

    Args:
        place: file or folder.
        repo: where it is going to be.
        base: hub id of the model it belongs to; its licence is kept.

    Raises:
        StorageError: nothing of this library's, or damaged.

    """
    if not place.exists():
        raise StorageError(f"{place} is not there; give what an evenkeel command has written.")
    kind = kind_of_place(place)
    relation = "quantized" if kind == QUANTIZED else "adapter"
    said: dict[str, Any] = {"library_name": "diffusers"}
    if base is not None:
        said |= {"base_model": [base], "base_model_relation": relation}
        licence = licence_of(base)
        said |= {} if licence is None else {"license": licence}
    said["tags"] = ["evenkeel", "quantization", kind.replace(" ", "-")]
    # JSON is YAML, and quotes what must be quoted.
    head = [f"{key}: {json.dumps(value)}" for key, value in said.items()]
    source = f"{repo}/{place.name}" if place.is_file() else repo
    used = "--quantized" if kind == QUANTIZED else "--record"
    lines = ["---", *head, "---", "", f"# {kind[0].upper()}{kind[1:]}", ""]
    lines += [f"Made with evenkeel; belongs to {f'`{base}`' if base else 'one model'} only.", ""]
    return "\n".join(
        [*lines, "```", f"evenkeel sample MODEL {used} {source} --out images", "```", ""]
    )
