"""Networks that several twins share lie once in the zoo, and are laid into a twin's folder when it is used.

A twin's ``parts.json`` says what lies elsewhere: ``{"vae": "shared/kl-4"}``, a folder or a file, by its
path beside the twin's folder or among the package's own weights. Copies, because not every system and
not every archive has links; the folder is then one that diffusers loads like any other. A file can also be
one that is made from another: ``{"halved": "pixart-sigma/vae/..."}``, the same weights in half precision, or
``{"unpacked": "dit-xl/transformer.xz"}``, where much of a network is zeros that its pipeline asks for.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evenkeel.errors import EvenkeelError, StorageError
from evenkeel.storage import Kind, check_json, read_json, write_atomically, write_json
from evenkeel.storage.digests import file_digest

PARTS_FILE, TWIN_FILE, EVALUATOR_FILE = "parts.json", "twin.json", "evaluator.safetensors"
KIND = Kind(
    "twin",
    1,
    "take the twin's folder from the repository again",
    keys=("name", "pictures", "files"),
)
PACKAGED = Path(__file__).resolve().parent / "weights"


def halved(content: bytes) -> bytes:
    """A safetensors file with its floating numbers in half precision, the same bytes every time."""
    import numpy as np
    from safetensors.numpy import load, save  # who only asks for a path does not wait for torch

    halves = {
        k: v.astype(np.float16) if np.issubdtype(v.dtype, np.floating) else v
        for k, v in load(content).items()
    }
    saved: bytes = save(halves, metadata={"format": "pt"})
    return saved


MADE: dict[str, Callable[[bytes], bytes]] = {"halved": halved, "unpacked": lzma.decompress}


@dataclass(frozen=True, slots=True)
class Part:
    """Where a part of a twin lies.

    Attributes:
        place: a folder or a file.
        made: how a file becomes that of the twin, a key of ``MADE``; None where it is that file.

    """

    place: Path
    made: str | None = None

    def content(self, source: Path) -> bytes:
        """What the twin's folder gets of a file of the part."""
        content = source.read_bytes()
        return content if self.made is None else MADE[self.made](content)


def parts_of(folder: Path) -> dict[str, Part]:
    """Name in the twin's folder -> where the part lies; empty where nothing is shared.

    Raises:
        EvenkeelError: the file is not of that form, or a part is nowhere.

    """
    file = folder / PARTS_FILE
    if not file.is_file():
        return {}
    try:
        named = json.loads(file.read_text(encoding="utf-8"))
        return {part: _part_of(folder, name) for part, name in named.items()}
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as e:
        raise EvenkeelError(
            f'{file} is not of the form {{"vae": "shared/NAME", ...}}: {e!r}. Take it from the '
            f"repository again."
        ) from e


def files_of(folder: Path) -> dict[Path, Path]:
    """Every file of a twin: its place below the folder -> where it lies, shared parts included.

    Files that are made from others are there once the folder is complete.
    """
    found = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file()}
    for name, part in parts_of(folder).items():
        if part.made is None:
            found |= {Path(name) / p.relative_to(part.place): p for p in _files(part.place)}
    return found


def complete(folder: Path) -> Path:
    """The folder, with copies of what lies elsewhere; only what is missing or differs is written.

    Raises:
        EvenkeelError: a part is nowhere, or the folder cannot be written to.

    """
    said = _digests(folder)
    for name, part in parts_of(folder).items():
        for source in _files(part.place):
            target = folder / name / source.relative_to(part.place)
            own = said.get(target.relative_to(folder).as_posix())
            if own is not None and target.is_file() and file_digest(target) == own:
                continue  # to make a file anew only to compare takes long
            content = part.content(source)
            if target.is_file() and target.read_bytes() == content:
                continue
            try:
                write_atomically(target, content)
            except OSError as e:
                raise EvenkeelError(
                    f"{source}, a part of {folder.name}, cannot be copied to {target}: {e}. Copy "
                    f"{folder.parent} to where it can be written and name the copy in EVENKEEL_ZOO."
                ) from e
    return folder


def _digests(folder: Path) -> dict[str, str]:
    """What ``twin.json`` says of the twin's files; empty where it cannot be used."""
    try:
        found: dict[str, str] = read_json(folder / TWIN_FILE, KIND)["files"]
    except StorageError:
        return {}
    return found if isinstance(found, dict) else {}


def sign(folder: Path, name: str, pictures: str) -> Path:
    """Write ``twin.json``: whose folder this is, and the digest of every file that decides what it draws.

    Args:
        folder: of a finished twin; parts that lie elsewhere count as if they lay in it.
        name: of the twin.
        pictures: what it draws.

    """
    digests = {place.as_posix(): file_digest(source) for place, source in _deciding(folder)}
    header = {"name": name, "pictures": pictures, "files": digests}
    return write_json(folder / TWIN_FILE, KIND, header)


def signed(folder: Path) -> dict[str, str]:
    """Name and pictures of a twin whose files are, to the bit, those that were measured.

    Raises:
        StorageError: ``twin.json`` cannot be used, or a file is missing, foreign or was changed.

    """
    header = read_json(folder / TWIN_FILE, KIND)
    with KIND.valid(folder / TWIN_FILE):
        check_json(header, {"name": str, "pictures": str, "files": {str: str}})
    found = {place.as_posix(): source for place, source in _deciding(folder)}
    if found.keys() != header["files"].keys():
        differing = sorted(found.keys() ^ header["files"].keys())
        raise StorageError(
            f"{folder} does not hold the files that {TWIN_FILE} lists: {', '.join(differing)} "
            f"{'is' if len(differing) == 1 else 'are'} missing or foreign. {KIND.remedy.capitalize()}."
        )
    for name, digest in header.pop("files").items():
        if file_digest(found[name]) != digest:
            raise StorageError(
                f"{found[name]} was changed after the twin was measured (its digest does not match). "
                f"{KIND.remedy.capitalize()}."
            )
    return dict(header)


def _deciding(folder: Path) -> list[tuple[Path, Path]]:
    """Networks, tokenizers, schedulers and the evaluator; not what is told about them."""
    top = ("model_index.json", EVALUATOR_FILE)
    return [(p, s) for p, s in files_of(folder).items() if len(p.parts) > 1 or p.name in top]


def _part_of(folder: Path, named: str | dict[str, str]) -> Part:
    if isinstance(named, str):
        return Part(_place_of(folder, named))
    ((made, name),) = named.items()
    if made not in MADE:
        raise ValueError(f"{made!r} is none of {', '.join(MADE)}")
    return Part(_place_of(folder, name), made)


def _place_of(folder: Path, name: str) -> Path:
    places = [root / name for root in (folder.parent, PACKAGED)]
    found = next((p for p in places if p.exists()), None)
    if found is None:
        raise EvenkeelError(
            f"{name}, which {folder.name} shares with other twins, is in none of "
            f"{[str(p) for p in places]}; take it from the repository, beside the twin."
        )
    return found


def _files(place: Path) -> list[Path]:
    """The file itself, or all files of a folder; never what is being written."""
    if place.is_file():
        return [place]
    return sorted(p for p in place.rglob("*") if p.is_file() and p.suffix != ".partial")
