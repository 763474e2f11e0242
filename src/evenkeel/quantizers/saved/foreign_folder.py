"""Keep a denoiser that another backend quantized: what diffusers writes of it, as one result."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from evenkeel.storage import Kind, workplace, write_folder

FOREIGN = Kind("denoiser", 1, "make it again", keys=("class",))


def save_foreign(module: nn.Module, folder: str | Path) -> Path:
    """What ``save_pretrained`` writes, with a manifest that diffusers does not look at.

    Args:
        module: a diffusers model.
        folder: made if missing; ``from_pretrained`` loads it.

    Raises:
        StorageError: the place is a file.

    """
    saver: Any = module
    with workplace(folder) as inside:
        saver.save_pretrained(inside)
        files = {p.name: partial(os.replace, p) for p in sorted(inside.iterdir())}
        return write_folder(folder, FOREIGN, {"class": type(module).__name__}, files)
