"""Keep freed memory for the next optimizer step, which needs as much again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
_DEFAULT = 128 * 1024
_KEPT, _LARGEST = 1 << 30, 32 << 20


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, glibc gives up to a gigabyte of what was freed to the next who asks, not to the system.

    A training step allocates and frees a few hundred tensors of the same sizes each time; memory that comes
    anew from the system costs more than the arithmetic in it. Nothing happens where there is no glibc.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_option = getattr(library, "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(_TRIM_THRESHOLD, _KEPT)
    set_option(_MMAP_THRESHOLD, _LARGEST)
    try:
        yield
    finally:
        set_option(_TRIM_THRESHOLD, _DEFAULT)
        set_option(_MMAP_THRESHOLD, _DEFAULT)
