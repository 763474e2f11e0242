"""What all our files share: atomic writing, a digest, and refusing what is damaged, foreign or changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from evenkeel.errors import RecordError
from evenkeel.record.schema import digest, read_metadata
from evenkeel.storage import write_atomically


def write_file(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    texts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> Path:
    """A safetensors file of this kind: JSON texts in its header, and a digest over all of it.

    Args:
        path: place to write to; a crash leaves the old file or none.
        kind: ``record`` or ``readout``.
        version: of the kind's schema.
        texts: name -> JSON, in the order in which the digest takes them.
        tensors: may be views of one another.

    """
    # Cloned: safetensors refuses tensors that share memory.
    own = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    metadata = {
        "format": f"evenkeel-{kind}",
        "schema_version": str(version),
        **texts,
        "digest": digest("".join(texts.values()), own),
    }
    return write_atomically(Path(path), save_bytes(own, metadata))


def read_file(
    path: str | os.PathLike[str], kind: str, version: int, texts: tuple[str, ...], maker: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of this kind; nothing in it is executed.

    Args:
        path: written by ``write_file``.
        kind: as there.
        version: that is understood.
        texts: names of the JSON texts under the digest.
        maker: the command that makes such a file.

    Raises:
        RecordError: missing, damaged, foreign, changed, or of another schema version.

    """
    place = Path(path)
    if not place.is_file():
        raise RecordError(f"{place} is not a file; expected a {kind} made by evenkeel {maker}.")
    try:
        content = place.read_bytes()
        metadata, tensors = read_metadata(content), load_bytes(content)
    except Exception as e:  # whatever a hostile file provokes in the parsers
        raise RecordError(
            f"{place} is not a readable safetensors file ({e}); it is damaged or foreign. Restore "
            f"it, or run evenkeel {maker} again."
        ) from e
    if metadata.get("format") != f"evenkeel-{kind}":
        raise RecordError(f"{place} is a safetensors file but not an evenkeel {kind}.")
    if metadata.get("schema_version") != str(version):
        raise RecordError(
            f"{place} has schema version {metadata.get('schema_version')}, this library reads "
            f"{version}: run evenkeel {maker} again, or use the version that wrote it."
        )
    try:
        genuine = metadata.get("digest") == digest(
            "".join(metadata.get(name, "") for name in texts), tensors
        )
    except TypeError:  # a dtype that numpy does not have
        genuine = False
    if not genuine:
        raise RecordError(
            f"{place} was changed after it was written (its digest does not match). Restore it, or "
            f"run evenkeel {maker} again."
        )
    return metadata, tensors
