"""Finished units of an interrupted quantization, kept so that nothing is computed twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.saved.layer_files import read_layer, write_layer
from evenkeel.quantizers.saved.report import LayerReport, layer_from
from evenkeel.storage import (
    Kind,
    claim,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

_AGAIN = "remove the folder and quantize again"
RUN = Kind("quantization run", 1, _AGAIN, keys=("run",))
UNIT = Kind("quantized unit", 2, _AGAIN, keys=("made_by", "layers", "reports"))
STAGE = Kind("quantization stage", 2, _AGAIN, keys=("made_by", "result"))


class Partial:
    """The folder of one run.

    Args:
        folder: made if missing; None keeps nothing.
        identity: of the run: method, denoiser, calibration set.

    Raises:
        StorageError: the folder belongs to another run.

    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        self.folder, self._identity = folder, identity
        if folder is None:
            return
        claim(folder / "run.json", RUN, {"identity": identity})

    def write(
        self, unit: str, layers: Mapping[str, QuantizedLayer], reports: Sequence[LayerReport]
    ) -> None:
        """Keep the finished layers of a unit."""
        if self.folder is None:
            return
        tensors, descriptions = {}, {}
        for name, layer in layers.items():
            own, descriptions[name] = write_layer(layer)
            tensors.update({f"{name}.{k}": v for k, v in own.items()})
        found = [asdict(r) for r in reports]
        header = {"made_by": self._made_by(unit), "layers": descriptions, "reports": found}
        write_tensors(self._place(unit), UNIT, header, tensors)

    def read(
        self, unit: str, like: nn.Module
    ) -> tuple[dict[str, QuantizedLayer], list[LayerReport]] | None:
        """The finished layers of a unit, or None; ``like`` has the layers they replace."""
        if self.folder is None or not self._place(unit).exists():
            return None
        header, tensors = read_tensors(self._place(unit), UNIT)
        self._refuse_another(self._place(unit), UNIT, header["made_by"], unit)
        made = {}
        with UNIT.valid(self._place(unit)):
            for name, description in header["layers"].items():
                start = f"{name}."
                own = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
                old = like.get_submodule(name)
                made[name] = read_layer(description, own, old).to(next(old.parameters()).device)
            return made, [layer_from(r) for r in header["reports"]]

    def stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON result: from the folder, or computed and kept there."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, STAGE, {"made_by": self._made_by(name), "result": compute()})
        found = read_json(path, STAGE)
        self._refuse_another(path, STAGE, found["made_by"], name)
        return found["result"]

    def _made_by(self, part: str) -> list[str]:
        return [self._identity, part]

    def _refuse_another(self, path: Path, kind: Kind, said: Any, part: str) -> None:
        """A file that was moved here from another run, or from another part of this one."""
        if said != self._made_by(part):
            raise kind.error(
                f"{path} was made by {said}, expected {self._made_by(part)}: {_AGAIN}."
            )

    def _place(self, unit: str) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(unit.encode()).hexdigest()[:16]
        return self.folder / f"unit-{digest}.safetensors"
