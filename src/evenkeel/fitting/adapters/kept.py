"""What a fit has finished, kept in a folder: after a kill the same call goes on there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.fitting.adapters.sites import Site
from evenkeel.hosts.run import Batch, Run
from evenkeel.storage import Kind, digest, json_safe, json_text, read_tensors, write_tensors

PIECE = Kind("piece of a fit", 1, "remove that folder", keys=("made_by", "said"))


@dataclass(frozen=True)
class Kept:
    """Finished pieces of work, each in a file whose name is a digest of all that decides about it.

    So one folder may serve any number of calls: what they have in common is made once, and what differs in
    anything is made again.

    Args:
        folder: made when the first piece is; None keeps nothing.

    """

    folder: Path | None = None

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | None) -> Kept:
        """In this folder, or nowhere."""
        return cls(None if folder is None else Path(folder))

    def path(
        self, name: str, made_by: Mapping[str, Any], ending: str = ".safetensors"
    ) -> Path | None:
        """Where such a piece is, or will be."""
        if self.folder is None:
            return None
        text = json_text(json_safe(dict(made_by)))
        return self.folder / f"{name}-{digest(text, {})[:24]}{ending}"

    def made_by(self, run: Run, batch: Batch, *denoisers: nn.Module) -> dict[str, Any]:
        """Everything that decides about what these denoisers give for a batch of a run.

        Raises:
            CalibrationError: there is something of which that cannot be told.

        """
        if self.folder is None:
            return {}
        return {**run.key(*denoisers), "seed": batch.seed, "prompts": batch.prompts.keys}

    def put(
        self, name: str, made_by: Mapping[str, Any], said: Any, tensors: Mapping[str, Tensor]
    ) -> None:
        """Keep a piece, whole or not at all."""
        if (path := self.path(name, made_by)) is not None:
            write_tensors(path, PIECE, {"made_by": json_safe(dict(made_by)), "said": said}, tensors)

    def get(
        self, name: str, made_by: Mapping[str, Any], *needed: str
    ) -> tuple[Any, dict[str, Tensor]] | None:
        """A piece that an earlier call kept; None where there is none.

        Raises:
            StorageError: it is damaged, of something else, or lacks a tensor that is needed.

        """
        path = self.path(name, made_by)
        if path is None or not path.exists():
            return None
        header, tensors = read_tensors(path, PIECE)
        if header["made_by"] != json_safe(dict(made_by)) or not tensors.keys() >= {*needed}:
            raise PIECE.error(f"{path} holds another piece than its name says; {PIECE.remedy}.")
        return header["said"], tensors

    def tensor(self, name: str, made_by: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """One tensor, made unless it is there."""
        if (found := self.get(name, made_by, "made")) is not None:
            return found[1]["made"]
        made = make()
        self.put(name, made_by, None, {"made": made})
        return made

    def rows(
        self,
        made_by: Mapping[str, Any],
        sites: Mapping[str, Site],
        make: Callable[[], Tensor | None],
    ) -> Tensor | None:
        """Rows of one batch, offered to the sites: of ``make``, or from the folder.

        ``make`` runs the batch and gives the state that entered its first step. Each layer's rows are a file
        of their own, so that they need not be in memory together; the last file says that all are there.
        """
        if self.folder is None:
            return make()
        names = [(name, side) for name, site in sites.items() for side in site.samples]
        if (done := self.get("batch", made_by)) is not None:
            dtypes, tensors = done
            for name, side in names:
                beside = {**made_by, "layer": name, "side": side}
                piece = self.get("rows", beside, "keys", "rows")
                if piece is not None and len(piece[1]["keys"]):
                    sites[name].samples[side].offer(piece[1]["keys"], piece[1]["rows"])
                sites[name].dtype = getattr(torch, dtypes[name])
            return tensors.get("first")
        whole = {name: site.samples for name, site in sites.items()}
        for site in sites.values():
            site.use({side: sample.fresh() for side, sample in site.samples.items()})
        first = make()
        for name, side in names:
            keys, rows = sites[name].samples[side].sorted()
            made = {"keys": keys, "rows": rows}
            self.put("rows", {**made_by, "layer": name, "side": side}, None, made)
            if len(keys):
                whole[name][side].offer(keys, rows)
        for name, site in sites.items():
            site.use(whole[name])
        dtypes = {name: str(site.dtype).removeprefix("torch.") for name, site in sites.items()}
        self.put("batch", made_by, dtypes, {} if first is None else {"first": first})
        return first


NOTHING = Kept()
