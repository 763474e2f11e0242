"""A file appears whole or not at all: a crash leaves the old one or none, never half of one."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from evenkeel.errors import StorageError

Content = bytes | str | Callable[[Path], Any]


def write_atomically(path: Path, content: Content) -> Path:
    """Write beside the place (under a name of this process's own), then move there.

    Missing folders are made; text is written as UTF-8; a function writes to the path that it is given.
    A file that was there keeps its permissions. Nothing is left behind when writing fails, and what a
    killed writer of this file left is removed.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "new" / "file.txt"
    >>> write_atomically(place, "whole").read_text()
    'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    _sweep(path)
    try:
        partial.touch()  # with the permissions that this process gives to new files
        mode = (path if path.exists() else partial).stat().st_mode
        if callable(content):
            _written(content, partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.chmod(mode & 0o777)
        os.replace(partial, path)
    except OSError as e:
        if e.filename is None and e.errno is not None:  # a full disk says only that it is full
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def workplace(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder inside another one, which may be a disk of its own: files can be moved from here.

    It is gone afterwards; what a killed process left of one is removed the next time.

    Raises:
        StorageError: the place is a file.

    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise StorageError(f"{place} is a file; give a folder.")
    is_new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    for left in place.glob(".work.*.partial"):
        pid = left.name.split(".")[2]
        if pid.isdecimal() and not _lives(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    try:
        prefix = f".work.{os.getpid()}."
        with tempfile.TemporaryDirectory(prefix=prefix, suffix=".partial", dir=place) as inside:
            yield Path(inside)
    finally:
        if is_new:
            with suppress(OSError):  # unless something was written
                place.rmdir()


def _written(content: Callable[[Path], Any], place: Path) -> None:
    """Let it write; what the system refused is an OSError, whatever a library makes of it."""
    try:
        content(place)
    except OSError:
        raise
    except Exception as e:
        refused = re.search(r"\(os error (\d+)\)", str(e))  # as Rust says it
        if refused is None:
            raise
        number = int(refused.group(1))
        raise OSError(number, os.strerror(number)) from e


def _sweep(path: Path) -> None:
    """Remove what writers of this file left that were killed."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        pid = left.name[len(path.name) + 1 : -len(".partial")]
        if pid.isdecimal() and int(pid) != os.getpid() and not _lives(int(pid)):
            left.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True
