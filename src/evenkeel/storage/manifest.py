"""A result of several files is one thing: all of the new one or all of the old one is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from evenkeel.errors import StorageError
from evenkeel.storage.atomic import Content, write_atomically
from evenkeel.storage.checks import check_json
from evenkeel.storage.digests import file_digest, json_safe, json_text
from evenkeel.storage.files import Kind, read_json, write_json
from evenkeel.storage.lock import alone

FILES = "files"
_NEW = ".new"


def write_folder(
    folder: str | os.PathLike[str],
    kind: Kind,
    header: Mapping[str, Any],
    files: Mapping[str, Content],
    manifest: str | None = None,
) -> Path:
    """Several files and a manifest with the digests of all; a kill leaves the old set or the new one.

    The files are first written beside their places. Writing the manifest decides: before it, the old
    ones count, after it the new ones, which are then moved to their places.

    Args:
        folder: made if missing; other files in it are left alone.
        kind: of the manifest.
        header: of the manifest.
        files: name, or path below the folder, -> content, or a function that writes to the path that it
            is given.
        manifest: its name, ``<kind>.json`` if not given.

    Raises:
        StorageError: the place is a file, the header does not fit the kind, or somebody else writes there.

    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise kind.error(f"{place} is a file; give a folder to write the {kind.name} into.")
    for name in files:
        _refuse_path(kind, place, name)
    with alone(place):
        _settle(place, kind, manifest)
        before = listed(place, kind, manifest) or {}
        beside = {name: place / (name + _NEW) for name in files}
        digests: dict[str, str] = {}
        try:
            for name, content in files.items():
                digests[name] = file_digest(write_atomically(beside[name], content))
            write_json(_list(place, kind, manifest), _with_files(kind), {**header, FILES: digests})
        except BaseException:
            if (
                listed(place, kind, manifest) != digests
            ):  # else the interrupt came after the decision
                for path in beside.values():
                    path.unlink(missing_ok=True)
            raise
        for name, path in beside.items():
            os.replace(path, place / name)
        for name in before.keys() - digests.keys():  # of the old set, which is gone
            with suppress(OSError, StorageError):
                _refuse_path(kind, place, name)
                (place / name).unlink()
    return place


def read_folder(
    folder: str | os.PathLike[str], kind: Kind, manifest: str | None = None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """The manifest's header, and where each file is; every byte is what was written.

    Raises:
        StorageError: a file is missing or changed, or the manifest cannot be used.

    """
    place = Path(folder)
    if not place.is_dir():
        raise kind._refused(place, f"is not a folder; expected one of a {kind.name}")
    path = _list(place, kind, manifest)
    header = read_json(path, _with_files(kind))
    digests = header.pop(FILES)
    with kind.valid(path):
        check_json(digests, {str: str})
        return header, {name: _genuine(kind, place, name, said) for name, said in digests.items()}


def claim(path: str | os.PathLike[str], kind: Kind, identity: Mapping[str, Any]) -> None:
    """Mark a folder of finished work as this run's, or refuse one that belongs to another.

    Args:
        path: of the mark, in that folder.
        kind: with one key.
        identity: everything that decides about the work.

    Raises:
        StorageError: the mark names another run; says what differs.

    """
    place, (key,) = Path(path), kind.keys
    own = json_safe(dict(identity))
    if not place.exists():
        write_json(place, kind, {key: own})
        return
    found = read_json(place, kind)[key]
    with kind.valid(place):
        check_json(found, dict)
    there, here = ({n: json_text(v) for n, v in said.items()} for said in (found, own))
    differing = [
        f"{name} ({_brief(there.get(name))} there, {_brief(here.get(name))} here)"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise kind.error(
            f"{place.parent} holds finished work of another {kind.name}, which differs in "
            f"{', '.join(differing)}. Remove that folder, or pass another one."
        )


def _brief(text: str | None) -> str:
    text = text or "nothing"
    return text if len(text) < 60 else f"{text[:57]}..."


def _settle(place: Path, kind: Kind, manifest: str | None) -> None:
    """Move what an interrupted writer left beside its place, where the manifest counts on it."""
    if any((place / (name + _NEW)).exists() for name in listed(place, kind, manifest) or ()):
        with suppress(StorageError):
            for name, path in read_folder(place, kind, manifest)[1].items():
                os.replace(path, place / name)


def listed(
    place: str | os.PathLike[str], kind: Kind, manifest: str | None = None
) -> dict[str, str] | None:
    """Name -> digest of the files of a folder, as its manifest says; None where there is none.

    Manifests of other versions count: what they list is this library's, too.
    """
    try:
        found = json.loads(_list(Path(place), kind, manifest).read_bytes())
        if found["format"] == kind.format:
            return {str(name): str(digest) for name, digest in found[FILES].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return None


def _list(place: Path, kind: Kind, manifest: str | None) -> Path:
    return place / (manifest or f"{kind.name}.json")


def _with_files(kind: Kind) -> Kind:
    return replace(kind, keys=(*kind.keys, FILES))


def _refuse_path(kind: Kind, place: Path, name: str) -> None:
    """A name may not lead out of the folder, not even over a link in it."""
    parts = name.split("/")
    if Path(*parts).parts != tuple(parts) or {"", ".", ".."} & {*parts} or "\0" in name:
        raise kind.error(f"{place}: {name!r} is not the name of a file in this folder.")
    if len(parts) > 1 and not (place / name).parent.resolve().is_relative_to(place.resolve()):
        raise kind.error(f"{place}: {name!r} leads out of this folder.")


def _genuine(kind: Kind, place: Path, name: str, said: str) -> Path:
    """The file with this digest: at its place, or beside it where moving it there was cut short."""
    _refuse_path(kind, place, name)
    beside = place / (name + _NEW)
    there = [path for path in (place / name, beside) if path.is_file()]
    for path in there:
        if file_digest(path) == said:
            return path
    if not there:
        raise kind._refused(place / name, f"is missing; {kind.name} lists it")
    raise kind._refused(
        place / name, "was changed after it was written (its digest does not match)"
    )
