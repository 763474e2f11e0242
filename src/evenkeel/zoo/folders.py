"""What can be read off a twin's folder without loading it: size, number of weights, card."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from evenkeel import zoo
from evenkeel.errors import EvenkeelError
from evenkeel.zoo.parts import complete, files_of

DENOISERS = ("transformer", "unet")


def described(twin: zoo.Twin) -> dict[str, Any]:
    """For a table or JSON: settings, and path, bytes and denoiser weights or None where it is not here."""
    place = zoo.find(twin.name)
    folder = None if place is None else complete(place)
    return {
        "name": twin.name,
        "class": twin.pipeline,
        "original": twin.original,
        "pictures": twin.pictures,
        "num_inference_steps": twin.num_inference_steps,
        "guidance_scale": twin.guidance_scale,
        "schedulers": list(twin.schedulers),
        "path": None if folder is None else str(folder),
        "bytes": None if folder is None else bytes_in(folder),
        "denoiser_weights": None if folder is None else denoiser_weights(folder),
    }


def bytes_in(folder: Path) -> int:
    """Size of all files of a twin together, those that it shares with others included."""
    return sum(p.stat().st_size for p in files_of(folder).values())


def denoiser_weights(folder: Path) -> int:
    """How many numbers the denoiser's files hold, from their headers.

    Raises:
        EvenkeelError: there are no safetensors files of a transformer or unet.

    """
    files = [p for name in DENOISERS for p in (folder / name).glob("*.safetensors")]
    if not files:
        raise EvenkeelError(
            f"{folder} holds neither transformer/ nor unet/ with safetensors files."
        )
    return sum(_numbers_in(file) for file in files)


def saved_dtypes(folder: Path) -> list[str]:
    """The floating formats of the pipeline's networks, as safetensors names them (F16, BF16, F32)."""
    files = folder.glob("*/*.safetensors")
    found = {t["dtype"] for file in files for t in _header(file).values()}
    return sorted(d for d in found if d.startswith(("F", "BF")))


def _numbers_in(file: Path) -> int:
    return sum(math.prod(t["shape"]) for t in _header(file).values())


def _header(file: Path) -> dict[str, Any]:
    """The format: the header's length in 8 bytes, the header in JSON, then the data."""
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header: dict[str, Any] = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return header


def card_of(name: str) -> str:
    """The text of the twin's model card.

    Raises:
        EvenkeelError: no such twin, no weights, or no card beside them.

    """
    file = zoo.path_of(name) / "README.md"
    if not file.is_file():
        raise EvenkeelError(
            f"{file.parent} holds no README.md; write it with python -m evenkeel.zoo.making.card {name}."
        )
    return file.read_text(encoding="utf-8")
