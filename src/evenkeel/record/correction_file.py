"""The safe file of a correction that is not made from a record, and reading whichever file it is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from evenkeel.corrections.base import Correction, Tables
from evenkeel.corrections.catalogue import ALL, FILE
from evenkeel.corrections.composite import Composite
from evenkeel.errors import RecordError
from evenkeel.record.record import Record
from evenkeel.record.schema import check_provenance, readable
from evenkeel.statistics.provenance import Provenance
from evenkeel.storage import Kind, check_json, kind_of, read_folder, read_tensors, write_tensors
from evenkeel.storage.hub import local


def save(found: Record | Correction, path: str | os.PathLike[str]) -> Path:
    """Write a record, or a correction that has a file of its own (a readout), atomically.

    Args:
        found: what ``load`` gives back.
        path: place to write to; a crash leaves the old file or none.

    Raises:
        RecordError: a correction that is made anew from a record, that is more than its file holds, or
            that could not be read again.

    """
    if isinstance(found, Record):
        return found.save(path)
    tables, made_for = found.tables(), found.made_for
    if found.name not in ALL or ALL[found.name].source != FILE or tables is None or not made_for:
        raise RecordError(
            f"{found.name} has no file of its own: it is made from a record. Save the record."
        )
    header = {"provenance": asdict(made_for), found.name: tables.described}
    with readable(found.name):
        check_provenance(made_for, len(made_for.timesteps))
        ALL[found.name].make(
            Tables(json.loads(json.dumps(tables.described)), tables.tensors), made_for
        )
    return write_tensors(path, _kind(found.name), header, tables.tensors)


def load(path: str | os.PathLike[str]) -> Record | Correction:
    """A record, or a correction that has a file of its own, by what the file says it is.

    Of a folder that ``evenkeel restore`` wrote, everything in it as one correction. ``user/name`` of the
    hub is such a folder, ``user/name/file`` a file.

    Raises:
        RecordError: neither, or missing, damaged, changed, or of another schema version.
        StorageError: the hub is out of reach, or does not have it.

    """
    path = local(path)
    if Path(path).is_dir():
        return load_restored(path)
    name = kind_of(path)
    is_correction = name in ALL and ALL[name].source == FILE
    return load_correction(name, path) if is_correction else Record.load(path)


def load_correction(name: str, path: str | os.PathLike[str]) -> Correction:
    """The correction of this name, from a file that ``save`` wrote; executes nothing in it.

    Args:
        name: its entry in ``corrections.ALL``.
        path: of the file.

    Raises:
        RecordError: as for ``load``, or the file holds something else.

    """
    kind, path = _kind(name), local(path)
    header, tensors = read_tensors(path, kind)
    with kind.valid(path):
        made_for = Provenance(**header["provenance"])
        check_provenance(made_for, len(made_for.timesteps))
        return ALL[name].make(Tables(header[name], tensors), made_for)


def _kind(name: str) -> Kind:
    remedy = f"run evenkeel {'restore' if name == 'adapters' else name} again"
    return Kind(name, ALL[name].version, remedy, keys=("provenance", name), error=RecordError)


# What ``evenkeel restore`` writes, in the order in which it acts.
RESTORED = Kind("restored", 1, "run evenkeel restore again", keys=("parts",), error=RecordError)


def load_restored(folder: str | os.PathLike[str]) -> Correction:
    """The corrections of a folder as one.

    Raises:
        RecordError: not such a folder, or a file in it is missing, damaged or changed.

    """
    header, files = read_folder(folder, RESTORED)
    with RESTORED.valid(folder):
        check_json(header["parts"], [str])
        parts = [(name, files[f"{name}.safetensors"]) for name in header["parts"]]
    found = [load_correction(name, path) for name, path in parts]
    return found[0] if len(found) == 1 else Composite(tuple(found))
