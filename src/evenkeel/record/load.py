"""Read whichever of our files it is."""

from __future__ import annotations

import os
from pathlib import Path

from evenkeel.errors import RecordError
from evenkeel.record.readout import KIND, Readout
from evenkeel.record.record import Record
from evenkeel.record.schema import read_metadata


def load(path: str | os.PathLike[str]) -> Record | Readout:
    """A record or a readout, by what the file says it is.

    Raises:
        RecordError: neither, or damaged.

    """
    place = Path(path)
    if place.is_file():
        try:
            found = read_metadata(place.read_bytes()).get("format")
        except (ValueError, UnicodeDecodeError) as e:
            raise RecordError(f"{place} is not a readable safetensors file ({e}).") from e
        if found == f"evenkeel-{KIND}":
            return Readout.load(place)
    return Record.load(place)
