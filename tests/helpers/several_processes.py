"""Work in several processes that share their prompts, with torchrun or without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import evenkeel.hosts.processes

HELPERS = str(Path(__file__).parent)


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code, negative for a signal, and what it printed."""

    code: int
    stdout: str
    stderr: str


def forked(
    work: Callable[[], None], place: Path, count: int = 2, patience: float = 900
) -> list[Ended]:
    """Copies of this process that do the same work; no launcher ends one because of another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = [_fork(work, place, rank, count, port) for rank in range(count)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience
    while len(codes) < count:
        for rank, child in enumerate(children):
            if rank not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [
        Ended(codes[r], (place / f"stdout-{r}").read_text(), (place / f"stderr-{r}").read_text())
        for r in range(count)
    ]


def _fork(work: Callable[[], None], place: Path, rank: int, count: int, port: str) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # bars have a thread, which does nothing
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1))
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        evenkeel.hosts.processes._joined = None
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def environment(here: Path) -> dict[str, str]:
    """Of a child that finds modules in ``here`` and the helpers."""
    path = [str(here), HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


def torchrun(here: Path, *command: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """``torchrun COMMAND`` to its end; modules in ``here`` can be imported."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=environment(here),
        capture_output=True,
        text=True,
        timeout=900,
    )
