"""Networks that several twins share lie once in the zoo, and are laid into a twin's folder when it is used.

A twin's ``parts.json`` says what lies elsewhere: ``{"vae": "shared/kl-4"}``, a folder or a file, by its
path beside the twin's folder or among the package's own weights. Copies, because not every system and
not every archive has links; the folder is then one that diffusers loads like any other.
"""

from __future__ import annotations

import json
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


def parts_of(folder: Path) -> dict[str, Path]:
    """Name in the twin's folder -> where the part lies; empty where nothing is shared.

    Raises:
        EvenkeelError: the file is not of that form, or a part is nowhere.

    """
    file = folder / PARTS_FILE
    if not file.is_file():
        return {}
    try:
        named: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        return {part: _place_of(folder, name) for part, name in named.items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as e:
        raise EvenkeelError(
            f'{file} is not of the form {{"vae": "shared/NAME", ...}}: {e!r}. Take it from the '
            f"repository again."
        ) from e


def files_of(folder: Path) -> dict[Path, Path]:
    """Every file of a twin: its place below the folder -> where it lies, shared parts included."""
    found = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file()}
    for part, place in parts_of(folder).items():
        found |= {Path(part) / p.relative_to(place): p for p in _files(place)}
    return found


def complete(folder: Path) -> Path:
    """The folder, with copies of what lies elsewhere; only what is missing or differs is written.

    Raises:
        EvenkeelError: a part is nowhere, or the folder cannot be written to.

    """
    for part, place in parts_of(folder).items():
        for source in _files(place):
            target = folder / part / source.relative_to(place)
            content = source.read_bytes()
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
