"""A place to write to: tried before work begins, and never somebody else's."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from evenkeel.errors import StorageError
from evenkeel.storage.files import Kind
from evenkeel.storage.manifest import listed

_LONGEST = "000000.partial"  # what a name is made longer by while it is written
FORCE = "Give another place, or --force to replace it"


@dataclass(frozen=True)
class FileOutput:
    """One file.

    Attributes:
        name: what is written, as in ``record``.
        is_ours: whether a file that is there is of this kind, so that it may be replaced.

    """

    name: str
    is_ours: Callable[[Path], bool]

    def check(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Raise unless the file can be written here and destroys nothing of anybody's.

        Args:
            path: as the user gave it.
            force: also replace files of other kinds, and follow links that leave their folder.

        Raises:
            StorageError: names the place and what is there.

        """
        place = _possible(path)
        if place.is_dir():
            raise StorageError(f"{place} is a folder; give the name of a file for the {self.name}.")
        _refuse_device(place)
        if not force:
            _refuse_link(place)
            if place.is_file() and place.stat().st_size and not self.is_ours(place):
                raise StorageError(f"{place} is there and is no evenkeel {self.name}. {FORCE}.")
        _try(place.parent, place.name)


@dataclass(frozen=True)
class FolderOutput:
    """Several files in a folder, with a manifest.

    Attributes:
        kind: of the manifest.
        names: patterns of the names of all files that may be written, without the manifest.
        manifest: its name, ``<kind>.json`` if not given.
        also: further kinds of manifest whose files are ours.

    """

    kind: Kind
    names: tuple[str, ...]
    manifest: str | None = None
    also: tuple[Kind, ...] = ()

    def check(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Raise unless the files can be written here and destroy nothing of anybody's.

        Args:
            path: of the folder, as the user gave it.
            force: also replace files that no manifest of this kind lists.

        Raises:
            StorageError: names the place and what is there.

        """
        place = check_folder(path, f"{self.kind.name}.json")
        if not force:
            _refuse_link(place)
            self._refuse_foreign(place)

    def _refuse_foreign(self, place: Path) -> None:
        if not place.is_dir():
            return
        manifest = self.manifest or f"{self.kind.name}.json"
        ours = listed(place, self.kind, self.manifest)
        known = {} if ours is None else {manifest: "", **ours}
        for kind in self.also:
            known |= listed(place, kind) or {}
        there = (f.relative_to(place).as_posix() for p in self.names for f in place.glob(p))
        names = {*there, *([manifest] if (place / manifest).exists() else [])}
        foreign = sorted(n for n in names if n not in known)
        if foreign:
            raise StorageError(
                f"{place} holds {', '.join(foreign[:5])}, which no evenkeel {self.kind.name} lists as its "
                f"own. {FORCE}."
            )


def check_folder(path: str | os.PathLike[str], longest: str = "part-00000.safetensors") -> Path:
    """Raise unless files with names up to this length can be written into this folder.

    Raises:
        StorageError: names the place, and what is there.

    """
    place = _possible(path)
    _refuse_device(place)
    if place.is_file():
        raise StorageError(f"{place} is a file; give a folder.")
    _try(place, longest)
    return place


def _possible(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if not text.isprintable() or not all(part.strip() for part in Path(text).parts or [""]):
        raise StorageError(f"{text!a} is no name for a file or folder; expected printable text.")
    place = Path(text)
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:  # too long, or behind a folder that may not be looked into
        raise StorageError(f"{text} cannot be written: {e.strerror}. Give another place.") from e
    return place


def _refuse_device(place: Path) -> None:
    """What is neither file nor folder, here or on the way here, is nobody's to replace."""
    for found in (place, *place.parents):
        try:
            mode = found.stat().st_mode
        except OSError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise StorageError(
                f"{found} is a device, pipe or socket; give the name of a file or folder."
            )
        if found != place and stat.S_ISREG(mode):
            raise StorageError(f"{found} is a file, so that nothing can be written below it.")


def _refuse_link(place: Path) -> None:
    if place.is_symlink():
        target = place.resolve()
        if target.parent != place.parent.resolve():
            raise StorageError(f"{place} is a link that leads to {target}. {FORCE}.")


def _try(folder: Path, name: str) -> None:
    """Write something of this name's length into the folder, and take it away again."""
    try:
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            prefix = "x" * max(0, len(os.fsencode(name)) - 8)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=prefix, suffix=_LONGEST) as file:
                file.write(b"x")
                file.flush()
        finally:
            for new in made:
                with suppress(OSError):
                    new.rmdir()
    except OSError as e:
        raise StorageError(
            f"{folder / name} cannot be written: {e.strerror or e}. Give another place."
        ) from e
