"""The folder that ``evenkeel sample`` writes: pictures, prompts, and a manifest of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from evenkeel.storage import Kind, write_folder
from evenkeel.storage.atomic import Content

PICTURES = Kind("pictures", 1, "run evenkeel sample again", keys=("settings",))


def write_pictures(
    folder: Path, images: Iterable[Tensor], prompts: Sequence[Any], settings: dict[str, Any]
) -> list[Path]:
    """All PNG files and ``prompts.txt`` as one result; returns where the pictures are.

    Args:
        folder: made if missing.
        images: (3, height, width) uint8 each.
        prompts: one line each.
        settings: of the run, for the manifest.

    """
    files: dict[str, Content] = {
        f"{i:05d}.png": partial(
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save, format="PNG"
        )
        for i, image in enumerate(images)
    }
    names = [*files]
    files["prompts.txt"] = "".join(f"{' '.join(str(p).splitlines())}\n" for p in prompts)
    write_folder(folder, PICTURES, {"settings": settings}, files)
    return [folder / name for name in names]
