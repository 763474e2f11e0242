"""A command launched as several processes: ``torchrun -m evenkeel compare ...`` prints once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def several_processes(options: argparse.Namespace) -> Iterator[None]:
    """Inside, only the main process prints, and an error of one ends the others with its reason.

    Raises:
        EvenkeelError: a command that one process does alone.

    """
    from evenkeel.errors import EvenkeelError
    from evenkeel.hosts.processes import processes

    us = processes()
    with ExitStack() as stack:
        if not us.main:
            nothing = stack.enter_context(open(os.devnull, "a"))
            stack.enter_context(redirect_stdout(nothing))
        with us.telling():
            if not getattr(options, "several", False):
                raise EvenkeelError(
                    "this command runs in one process; start it without a launcher."
                )
            yield
            us.barrier()


def own_device(device: str | None) -> str | None:
    """The process's own of several equal devices: "cuda" is "cuda:1" for the second of a machine."""
    local = os.environ.get("LOCAL_RANK")
    return f"{device}:{local}" if launched() and local and device == "cuda" else device
