"""Of a finished twin, what the zoo already has is not kept a second time."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

from evenkeel.storage import write_atomically
from evenkeel.zoo.parts import PACKAGED, PARTS_FILE, halved

SHARED = "shared"
PARTS = ("vae", "text_encoder", "text_encoder_2", "evaluator.safetensors")
DENOISERS = ("transformer", "unet")
WORTH = 0.81  # a network that packing makes smaller than this share is kept packed: mostly zeros


def share(folder: Path) -> dict[str, str | dict[str, str]]:
    """Remove from a twin's folder what lies beside it in ``shared/`` or in the package, to the bit.

    Also what is half the precision of the package's; a denoiser that is mostly zeros is packed.

    Writes ``parts.json``, which says where it is, and ``.gitignore``, so that copies laid in for use are not
    tracked; returns what is in the former. A part that differs stays.

    Args:
        folder: of the twin, in a folder of twins.

    """
    found: dict[str, str | dict[str, str]] = {}
    for part in PARTS:
        if not (folder / part).exists():
            continue
        for root in (folder.parent / SHARED, PACKAGED):
            like = (p for p in sorted(root.glob("*")) if _same(folder / part, _inside(p, part)))
            place = next(like, None)
            if place is not None:
                found[part] = _inside(place, part).relative_to(_base(root)).as_posix()
                break
        if part not in found:
            found |= _half_of_packaged(folder, part)
    found |= _packed(folder)
    if not found:
        return {}
    for part in found:
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)
        else:
            (folder / part).unlink()
    write_atomically(folder / PARTS_FILE, json.dumps(found, indent=1) + "\n")
    ignored = [f"/{part}/" if "." not in part else f"/{part}" for part in found]
    write_atomically(folder / ".gitignore", "".join(line + "\n" for line in ignored))
    return found


def _half_of_packaged(folder: Path, part: str) -> dict[str, str | dict[str, str]]:
    for file in sorted((folder / part).glob("*.safetensors")):
        name = f"{part}/{file.name}"
        for like in sorted(PACKAGED.glob(f"*/{name}")):
            if halved(like.read_bytes()) == file.read_bytes():
                return {name: {"halved": like.relative_to(PACKAGED).as_posix()}}
    return {}


def _packed(folder: Path) -> dict[str, str | dict[str, str]]:
    found: dict[str, str | dict[str, str]] = {}
    for denoiser in DENOISERS:
        for file in sorted((folder / denoiser).glob("*.safetensors")):
            content = file.read_bytes()
            packed = lzma.compress(content, preset=9)
            if len(packed) < WORTH * len(content):
                place = write_atomically(folder / f"{denoiser}.xz", packed)
                name = f"{denoiser}/{file.name}"
                found[name] = {"unpacked": place.relative_to(folder.parent).as_posix()}
    return found


def _base(root: Path) -> Path:
    return root if root == PACKAGED else root.parent


def _inside(place: Path, part: str) -> Path:
    """A file of a shared folder by its name; a network is the folder itself."""
    return place / part if "." in part else place


def _same(a: Path, b: Path) -> bool:
    def content(path: Path) -> dict[Path, bytes]:
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        return {p.relative_to(path): p.read_bytes() for p in files}

    return b.exists() and a.is_dir() == b.is_dir() and content(a) == content(b)
