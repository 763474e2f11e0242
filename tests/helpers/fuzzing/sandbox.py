"""A fuzzer works inside one temporary folder, and nothing that it passes on can lead out of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def sandbox() -> Iterator[Path]:
    """Inside, the working directory is a new temporary folder, which is gone afterwards."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="evenkeel-fuzz-") as folder:
        os.chdir(folder)
        try:
            yield Path(".")
        finally:
            os.chdir(before)


def refuse_outside(arguments: Sequence[str]) -> None:
    """Raise if any word, or any part of one, could be a place outside of the working directory."""
    root = Path.cwd().resolve()
    if not root.name.startswith("evenkeel-fuzz-"):
        raise AssertionError(f"{root} is not a fuzzer's folder")
    for argument in arguments:
        for word in (argument, *argument.split("=")):
            if os.path.isabs(word.strip()) or ".." in Path(word).parts or word.startswith("~"):
                raise AssertionError(f"{argument!r} could lead out of {root}")
            with contextlib.suppress(OSError, ValueError):  # no name of a file at all
                if not Path(word).resolve().is_relative_to(root):
                    raise AssertionError(f"{argument!r} leads out of {root}")


def listing(root: Path = Path(".")) -> dict[str, tuple[int, int]]:
    """Every file below, with its size and time."""
    found = {}
    for path in root.rglob("*"):
        if not path.is_dir():
            with contextlib.suppress(OSError):
                state = path.lstat()
                found[path.as_posix()] = (state.st_size, state.st_mtime_ns)
    return found
