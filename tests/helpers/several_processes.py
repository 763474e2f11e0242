"""Python in several processes that share their prompts, with a launcher or without one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

HELPERS = str(Path(__file__).parent)


def environment(here: Path, **more: str) -> dict[str, str]:
    """Of a child that finds modules in ``here`` and the helpers."""
    path = [str(here), HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)} | more


def torchrun(here: Path, *command: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """``torchrun COMMAND`` to its end; modules in ``here`` can be imported."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=environment(here),
        capture_output=True,
        text=True,
        timeout=600,
    )


def unwatched(here: Path, code: str, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """The processes of ``code``, each to its end: no launcher ends one because of another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(
                here,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(count),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *both)
        for process, both in zip(started, said, strict=True)
    ]
