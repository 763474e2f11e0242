"""Advance several pipeline calls together: each pauses where it wants something from the others.

A pipeline's ``__call__`` cannot be suspended, so each call runs in a thread of its own; but only one
of them, or the caller, runs at any time, in an order that the caller decides. There is no
concurrency, only several stacks: results do not depend on timing.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def _trim() -> Callable[[int], Any]:
    """``malloc_trim``, which gives freed memory back to the system, where there is one (glibc).

    glibc keeps what a thread has freed for that thread alone: of a large network's activations every
    strand would hold a share that no other can use.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, "malloc_trim", lambda _: 0)


class Abandoned(BaseException):
    """Raised inside a strand that its owner no longer waits for; pipelines do not catch it."""


class Finished:
    """What ``resume`` returns when the body has returned; carries its result."""

    def __init__(self, result: Any) -> None:
        self.result = result


class Strand:
    """One call that can be paused from inside.

    Args:
        body: called with the strand.
        trims: give memory that was freed back to the system at each pause; not where the strand itself
            computes little, as taking it back from the system is slow.

    >>> def body(strand):
    ...     return strand.pause("question") + 1
    >>> strand = Strand(body)
    >>> strand.resume()
    'question'
    >>> strand.resume(41).result
    42

    """

    def __init__(self, body: Callable[[Strand], Any], *, trims: bool = True) -> None:
        self._body, self._trims = body, trims
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._given: Any = None
        self._shown: Any = None
        self._abandoned = self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def resume(self, answer: Any = None) -> Any:
        """Let it run until it pauses (returns what it shows) or returns (a ``Finished``).

        Raises:
            BaseException: whatever its body raised.
            RuntimeError: it has ended already; waiting for it would never end.

        """
        if self._ended:
            raise RuntimeError("this strand has ended; it cannot be resumed.")
        self._given = answer
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        if self._trims:
            _trim()(0)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._shown

    def pause(self, shown: Any) -> Any:
        """Called inside: show something to the owner, wait for the answer."""
        if self._abandoned:  # nobody waits any longer, not even for a ``finally`` clause that asks
            raise Abandoned
        self._shown = shown
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise Abandoned
        return self._given

    def abandon(self) -> None:
        """Unwind a paused strand; harmless on one that never started or has ended."""
        self._ended = True
        if self._thread.is_alive():
            self._abandoned = True
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._shown = Finished(self._body(self))
        except Abandoned:
            return
        except BaseException as error:
            self._error = error
        self._ended = True
        self._back.release()
