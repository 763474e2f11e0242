"""Of a finished twin, what the zoo already has is not kept a second time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from evenkeel.storage import write_atomically
from evenkeel.zoo.parts import PACKAGED, PARTS_FILE

SHARED = "shared"
PARTS = ("vae", "text_encoder", "text_encoder_2", "evaluator.safetensors")


def share(folder: Path) -> dict[str, str]:
    """Remove from a twin's folder what lies beside it in ``shared/`` or in the package, to the bit.

    Writes ``parts.json``, which says where it is, and ``.gitignore``, so that copies laid in for use are not
    tracked; returns what is in the former. A part that differs stays.

    Args:
        folder: of the twin, in a folder of twins.

    """
    found = {}
    for part in PARTS:
        if not (folder / part).exists():
            continue
        for root in (folder.parent / SHARED, PACKAGED):
            like = (p for p in sorted(root.glob("*")) if _same(folder / part, _inside(p, part)))
            place = next(like, None)
            if place is not None:
                found[part] = _inside(place, part).relative_to(_base(root)).as_posix()
                break
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
