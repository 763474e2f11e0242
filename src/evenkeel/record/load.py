"""Read whichever of our files it is."""

from __future__ import annotations

import os

from evenkeel.record.readout import KIND, Readout
from evenkeel.record.record import Record
from evenkeel.storage import kind_of


def load(path: str | os.PathLike[str]) -> Record | Readout:
    """A record or a readout, by what the file says it is.

    Raises:
        RecordError: neither, or damaged.

    """
    return Readout.load(path) if kind_of(path) == KIND.name else Record.load(path)
