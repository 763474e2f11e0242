"""One file: tensors with a header, or JSON; a digest over all of it; refused when anything is off."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from evenkeel.errors import StorageError
from evenkeel.storage.atomic import write_atomically
from evenkeel.storage.digests import digest, json_text, parse_json, refuse_deep

if TYPE_CHECKING:  # what is only listed must not wait for torch
    from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """What a file is, and what to do when it cannot be used.

    Attributes:
        name: ``record`` makes the format ``evenkeel-record``.
        version: of its schema; only this one is read.
        remedy: what to do about a bad file, as in ``run evenkeel calibrate again``.
        keys: of the header, in the order in which the digest takes them.
        error: that is raised.
        max_bytes: larger files are refused unread.

    """

    name: str
    version: int
    remedy: str
    keys: tuple[str, ...] = ("header",)
    error: type[StorageError] = StorageError
    max_bytes: int | None = None

    @property
    def format(self) -> str:
        """The name that the file itself bears."""
        return f"evenkeel-{self.name}"

    def wrote(self, path: str | os.PathLike[str]) -> bool:
        """Whether a JSON file says that it is of this kind, in whatever version."""
        try:
            found = parse_json(Path(path).read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and found.get("format") == self.format

    @contextmanager
    def valid(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Whatever goes wrong inside is said of this file: anyone can compute a digest."""
        try:
            yield
        except StorageError:
            raise
        except Exception as e:
            raise self.error(
                f"{path} carries a matching digest but is not a valid {self.name}: "
                f"{type(e).__name__}: {e}. Restore it, or {self.remedy}."
            ) from e

    def _refused(self, path: Path, what: str) -> StorageError:
        return self.error(f"{path} {what}. Restore it, or {self.remedy}.")

    def _sized(self, path: Path) -> None:
        if not path.is_file():
            raise self._refused(path, f"is not a file; expected a {self.name}")
        size = path.stat().st_size
        if self.max_bytes is not None and size > self.max_bytes:
            raise self._refused(
                path, f"has {size} bytes; a {self.name} has at most {self.max_bytes}"
            )

    def _identified(self, path: Path, found: Mapping[str, Any]) -> None:
        if found.get("format") != self.format:
            raise self.error(f"{path} is not an evenkeel {self.name}; {self.remedy}.")
        version = found.get("schema_version")
        if str(version) != str(self.version):
            raise self.error(
                f"{path} has schema version {version}, this library reads {self.version}: "
                f"{self.remedy}, or use the version that wrote it."
            )

    def _genuine(self, path: Path, said: Any, computed: str) -> None:
        if said != computed:
            raise self._refused(
                path, "was changed after it was written (its digest does not match)"
            )


def write_tensors(
    path: str | os.PathLike[str],
    kind: Kind,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """A safetensors file of this kind, every value of the header as JSON in its metadata.

    Args:
        path: place to write to; a crash leaves the old file or none.
        kind: its keys are those of ``header``.
        header: what JSON can hold.
        tensors: on any device; may be views of one another.

    Raises:
        StorageError: the header has other keys, or something in it that JSON cannot hold.

    """
    import torch

    texts = _texts(path, kind, header)
    # Cloned: safetensors refuses tensors that share memory.
    own = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()
    }
    metadata = {
        "format": kind.format,
        "schema_version": str(kind.version),
        **texts,
        "digest": digest("".join(texts.values()), own),
    }
    return write_atomically(Path(path), safetensors_bytes(own, metadata))


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, equal for equal content: the package writes metadata in an order of chance.

    Args:
        tensors: contiguous, on the CPU, no views of one another.
        metadata: beside them.

    """
    from safetensors.torch import save

    content = save(dict(tensors))
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(
        {"__metadata__": dict(metadata), **json.loads(content[8 : 8 + size])}, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    whole: bytes = len(header).to_bytes(8, "little") + header + content[8 + size :]
    return whole


def read_tensors(
    path: str | os.PathLike[str], kind: Kind
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of this kind; nothing in it is executed.

    Raises:
        StorageError: missing, damaged, foreign, changed, or of another schema version.

    """
    place = Path(path)
    kind._sized(place)
    try:
        with safe_open(place, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            kind._identified(place, metadata)
            # Cloned: a file's tensors lie wherever its header ends, and the same product rounds
            # differently in memory of another alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except StorageError:
        raise
    except Exception as e:  # whatever a hostile file provokes in the parser
        raise kind._refused(
            place, f"is not a readable safetensors file ({e}); it is damaged or foreign"
        ) from e
    texts = [metadata.get(key, "") for key in kind.keys]
    kind._genuine(place, metadata.get("digest"), digest("".join(texts), tensors))
    with kind.valid(place):
        return {key: parse_json(text) for key, text in zip(kind.keys, texts, strict=True)}, tensors


def read_foreign_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that carries no digest.

    Raises:
        StorageError: missing or damaged.

    """
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except Exception as e:  # whatever a hostile file provokes in the parser
        raise StorageError(f"{path} is not a readable safetensors file: {e}.") from e
    return found


def write_json(path: str | os.PathLike[str], kind: Kind, header: Mapping[str, Any]) -> Path:
    """A JSON file of this kind, indented for people, with the digest of what it says.

    Raises:
        StorageError: the header has other keys, or something in it that JSON cannot hold.

    """
    _texts(path, kind, header)
    whole = {"format": kind.format, "schema_version": kind.version, **header}
    whole["digest"] = digest(json_text(whole), {})
    return write_atomically(Path(path), json.dumps(whole, indent=1) + "\n")


def read_json(path: str | os.PathLike[str], kind: Kind) -> dict[str, Any]:
    """What `write_json` was given.

    Raises:
        StorageError: missing, damaged, foreign, changed, or of another schema version.

    """
    place = Path(path)
    kind._sized(place)
    try:
        found = parse_json(place.read_bytes())
    except ValueError as e:
        raise kind._refused(place, f"is not JSON ({e}); it is damaged or foreign") from e
    if not isinstance(found, dict):
        raise kind._refused(place, "is JSON but no object; it is damaged or foreign")
    kind._identified(place, found)
    said = found.pop("digest", None)
    try:
        computed = digest(json_text(found), {})
    except (ValueError, RecursionError):  # a number that is not finite, a lone surrogate
        computed = ""
    kind._genuine(place, said, computed)
    with kind.valid(place):
        return {key: found[key] for key in kind.keys}


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of a safetensors file, by what it says itself; "" where it says nothing readable."""
    try:
        with safe_open(Path(path), framework="pt") as file:
            return str((file.metadata() or {}).get("format", "")).removeprefix("evenkeel-")
    except Exception:  # no file, or whatever a hostile one provokes in the parser
        return ""


def _texts(path: str | os.PathLike[str], kind: Kind, header: Mapping[str, Any]) -> dict[str, str]:
    if set(header) != set(kind.keys):
        raise kind.error(
            f"{path}: a {kind.name} has {sorted(kind.keys)} in its header, found {sorted(header)}."
        )
    try:
        for value in header.values():
            refuse_deep(value)  # whatever this Python's json would take
        return {key: json_text(header[key]) for key in kind.keys}
    except (TypeError, ValueError, RecursionError) as e:
        raise kind.error(
            f"{path}: JSON cannot hold the header of this {kind.name} ({e}). Nothing was written."
        ) from e
