"""Where an interrupted training goes on: parameters, the optimizer's moments, and the best ones so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.storage import Kind, claim, read_tensors, write_tensors

_AGAIN = "remove the folder and train again"
RUN = Kind("training run", 1, _AGAIN, keys=("run",))
STATE = Kind("training state", 1, _AGAIN, keys=("state",))


class Checkpoint:
    """The folder of one training run.

    Args:
        folder: made if missing; None keeps nothing.
        identity: all that decides about the result.

    Raises:
        StorageError: the folder belongs to another run.

    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self._file = None if folder is None else folder / "training.safetensors"
        if folder is not None:
            claim(folder / "training-run.json", RUN, identity)

    def write(
        self,
        said: dict[str, Any],
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        best: dict[str, Tensor],
    ) -> None:
        """Keep the state between two epochs; the last one is replaced, whole or not at all."""
        if self._file is None:
            return
        names = {id(p): n for n, p in parameters.items()}
        tensors = {f"now.{n}": p.detach() for n, p in parameters.items()}
        tensors |= {f"best.{n}": t for n, t in best.items()}
        for parameter, moments in optimizer.state.items():
            tensors |= {f"{k}.{names[id(parameter)]}": v for k, v in moments.items()}
        write_tensors(self._file, STATE, {"state": said}, tensors)

    def read(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What was said and the best parameters, after putting the rest back; None where nothing is kept."""
        if self._file is None or not self._file.exists():
            return None
        header, tensors = read_tensors(self._file, STATE)
        with STATE.valid(self._file), torch.no_grad():
            found: dict[str, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                part, _, name = key.partition(".")
                found.setdefault(part, {})[name] = tensor
            for name, parameter in parameters.items():
                parameter.copy_(found["now"][name])
            for part in found.keys() - {"now", "best"}:
                for name, tensor in found[part].items():
                    parameter = parameters[name]
                    like = tensor if part == "step" else tensor.to(parameter.device)
                    optimizer.state[parameter][part] = like
            return dict(header["state"]), found.get("best", {})
