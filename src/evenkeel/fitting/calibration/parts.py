"""Finished batches: kept in a folder against kills, shared between processes, merged at the end."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from evenkeel.corrections.base import digest_of
from evenkeel.errors import CalibrationError
from evenkeel.fitting.request import Settings
from evenkeel.hosts.pipeline.pipelines import Prompt
from evenkeel.hosts.scheduler.interception import plain_class
from evenkeel.hosts.scheduler.schedulers import config_of
from evenkeel.record import Record, canonical_order, prompt_key
from evenkeel.statistics.histogram import Frame
from evenkeel.storage import json_safe, write_atomically


class Parts:
    """The finished batches of one calibration: in a folder, or folded into one record as they come.

    Batches must be put in order. Nothing grows with the number of batches but the record itself.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._folded: Record | None = None

    def path(self, index: int) -> Path | None:
        """The file of one batch; None when nothing is kept on disk."""
        return None if self._folder is None else self._folder / f"part-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether an earlier run, or another process, finished this batch."""
        path = self.path(index)
        return path is not None and path.exists()

    def put(self, index: int, part: Record) -> None:
        """Keep a finished batch."""
        path = self.path(index)
        if path is not None:
            part.save(path)
        else:
            self._folded = part if self._folded is None else self._folded.merge(part)

    def frame(self) -> Frame:
        """The pilot frame that the first batch made, in this process or in another."""
        path = self.path(0)
        first = self._folded if path is None else Record.load(path)
        assert first is not None
        return first.frame

    def merged(self, n: int) -> Record:
        """All ``n`` batches as one record, rows in canonical order."""
        record = self._folded
        for index in range(n):
            path = self.path(index)
            if path is not None:
                part = Record.load(path)
                record = part if record is None else record.merge(part)
        assert record is not None
        order = canonical_order(record.prompt_keys, record.seeds)
        assert torch.equal(order, torch.arange(len(order)))
        return record


def part_folder(resume: str | os.PathLike[str] | None, world: int) -> Path | None:
    """Where finished batches go; several processes cannot do without."""
    if resume is None and world > 1:
        raise CalibrationError(
            "several processes exchange finished batches through a folder: pass resume=<folder>, the "
            "same for all of them."
        )
    return None if resume is None else Path(resume)


def claim_folder(
    folder: Path,
    pipeline: Any,
    settings: Settings,
    batches: list[tuple[list[Prompt], int]],
) -> None:
    """Mark the folder as this calibration's, or refuse one that belongs to another."""
    claim = json.dumps(
        {
            "pipeline": type(pipeline).__name__,
            "scheduler": [
                plain_class(pipeline.scheduler).__name__,
                config_of(pipeline.scheduler),
            ],
            "correction": digest_of(settings.correction),
            "layout": None if settings.layout is None else settings.layout.as_dict(),
            "steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "trajectory": settings.trajectory,
            "call": json_safe(settings.call),
            "histograms": settings.histograms,
            "twins": settings.twins,
            "prompts": [
                [b[1], *(bytes(prompt_key(str(p)).tolist()).hex() for p in b[0])] for b in batches
            ],
        },
        sort_keys=True,
    )
    path = folder / "calibration.json"
    if path.exists() and path.read_text() != claim:
        raise CalibrationError(
            f"{folder} holds the finished batches of another calibration (other models, prompts or "
            f"settings). Remove it, or pass another folder."
        )
    write_atomically(path, claim)


def tidy(folder: Path) -> None:
    """Remove what calibration wrote, and the folder itself unless it holds something else."""
    for pattern in ("part-*.safetensors*", "calibration.json*"):
        for path in folder.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def process() -> tuple[int, int]:
    """Rank and number of processes under torchrun; joins the group if the launcher set one up."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available():
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier(world: int) -> None:
    """Wait for all processes."""
    if world > 1:
        torch.distributed.barrier()
