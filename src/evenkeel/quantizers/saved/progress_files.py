"""Finished units of an interrupted quantization, kept so that nothing is computed twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.saved.layer_files import read_layer, write_layer
from evenkeel.quantizers.saved.report import LayerReport, layer_from
from evenkeel.storage import write_atomically

RUN = "run.json"


class Partial:
    """The folder of one run.

    Args:
        folder: made if missing; None keeps nothing.
        identity: of the run: method, denoiser, calibration set.

    Raises:
        QuantizationError: the folder belongs to another run.

    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        self.folder = folder
        if folder is None:
            return
        path = folder / RUN
        if not path.exists():
            write_atomically(path, json.dumps({"identity": identity}) + "\n")
            return
        found = json.loads(path.read_text(encoding="utf-8")).get("identity")
        if found != identity:
            raise QuantizationError(
                f"{folder} keeps units of another run ({found}); this one is {identity}. Remove "
                "the folder, or use another."
            )

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
        header = {"layers": descriptions, "reports": [asdict(r) for r in reports]}
        write_atomically(self._place(unit), save(tensors, {"unit": json.dumps(header)}))

    def read(
        self, unit: str, like: nn.Module
    ) -> tuple[dict[str, QuantizedLayer], list[LayerReport]] | None:
        """The finished layers of a unit, or None; ``like`` has the layers they replace."""
        if self.folder is None or not self._place(unit).exists():
            return None
        with safe_open(self._place(unit), framework="pt") as file:
            header = json.loads(file.metadata()["unit"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        made = {}
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
            write_atomically(path, json.dumps(compute()) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))

    def _place(self, unit: str) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(unit.encode()).hexdigest()[:16]
        return self.folder / f"unit-{digest}.safetensors"
