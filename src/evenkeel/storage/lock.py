"""One writer at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evenkeel.errors import StorageError

LOCK = ".evenkeel.lock"  # whoever removes the folder meanwhile removes it, too


@contextmanager
def alone(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process or thread that asks for the same may write into this folder.

    The system gives the lock back when a process ends, however it ends.

    Raises:
        StorageError: another one has it.

    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    path = place / LOCK
    try:
        import fcntl
    except ImportError:  # Windows: nothing of the kind without a package
        yield
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_ino != path.stat().st_ino:
                raise BlockingIOError  # the one before has just removed the name
        except (BlockingIOError, FileNotFoundError) as e:
            raise StorageError(
                f"{place} is being written to by another evenkeel process or thread. Wait until it has "
                f"ended, or give another folder."
            ) from e
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)
