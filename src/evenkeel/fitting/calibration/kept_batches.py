"""Finished batches: kept in a folder against kills, shared between processes, merged at the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from evenkeel.corrections.base import Correction, digest_of
from evenkeel.errors import CalibrationError
from evenkeel.hosts.run import Batch, Run
from evenkeel.record import Record, canonical_order, prompt_key
from evenkeel.statistics.histogram import Frame
from evenkeel.storage import Kind, claim
from evenkeel.storage.lock import LOCK

CLAIM = Kind("calibration", 1, "remove that folder or pass another one", keys=("calibration",))


class Parts:
    """The finished batches of one calibration: in a folder, or folded into one record as they come.

    Batches must be put in order. Nothing grows with the number of batches but the record itself.
    """

    def __init__(self, folder: Path | None, batches: Sequence[Batch] = ()) -> None:
        self._folder, self._batches = folder, batches
        self._folded: Record | None = None

    @classmethod
    def of(
        cls,
        run: Run,
        resume: str | os.PathLike[str] | None,
        world: int,
        trajectory: str,
        correction: Correction | None,
        histograms: bool,
    ) -> Parts:
        """In the folder ``resume``, marked as this calibration's; several processes need one.

        Raises:
            CalibrationError: several processes and no folder.
            StorageError: the folder belongs to another calibration.

        """
        if resume is None:
            if world > 1:
                raise CalibrationError(
                    "several processes exchange finished batches through a folder: pass "
                    "resume=<folder>, the same for all of them."
                )
            return cls(None)
        run.refuse_unknown()
        asked = {
            **run.key(*run.pair),
            "correction": digest_of(correction),
            "trajectory": trajectory,
            "histograms": histograms,
            "prompts": [
                [b.seed, *(bytes(prompt_key(text).tolist()).hex() for text in b.prompts.keys)]
                for b in run.batches()
            ],
        }
        claim(Path(resume) / "calibration.json", CLAIM, asked)
        return cls(Path(resume), run.batches())

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
        first = self._folded if self._folder is None else self._part(0)
        assert first is not None
        return first.frame

    def merged(self, n: int) -> Record:
        """All ``n`` batches as one record, rows in canonical order."""
        record = self._folded
        for index in range(n):
            if self._folder is not None:
                part = self._part(index)
                record = part if record is None else record.merge(part)
        assert record is not None
        order = canonical_order(record.prompt_keys, record.seeds)
        assert torch.equal(order, torch.arange(len(order)))
        return record

    def _part(self, index: int) -> Record:
        """A finished batch, which holds the rows of this batch and of no other.

        Raises:
            StorageError: damaged, or of other prompts or seeds.

        """
        path, batch = self.path(index), self._batches[index]
        assert path is not None
        part = Record.load(path)
        keys = torch.stack([prompt_key(text) for text in batch.prompts.keys])
        seeds = torch.tensor([*batch.seeds], dtype=torch.int64)
        order = canonical_order(keys, seeds)
        same = torch.equal(part.seeds, seeds[order]) and torch.equal(part.prompt_keys, keys[order])
        if not same:
            raise CLAIM.error(
                f"{path} holds other prompts or seeds than this batch's ({batch.seeds[0]} to "
                f"{batch.seeds[-1]}): {CLAIM.remedy}."
            )
        return part

    def tidy(self) -> None:
        """Remove what calibration wrote, and the folder itself unless it holds something else."""
        if self._folder is None:
            return
        for pattern in ("part-*.safetensors*", "calibration.json*", LOCK):
            for path in self._folder.glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()
