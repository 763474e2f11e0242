"""What a digest is over, and JSON in the one form that a digest can be over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is only listed must not wait for torch
    from torch import Tensor


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor's name, dtype, shape and bytes, in order of the names.

    >>> digest("{}", {}) == hashlib.sha256(b"{}").hexdigest()
    True

    """
    running = hashlib.sha256(header.encode())
    if tensors:
        import torch
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        running.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        running.update(tensor.flatten().view(torch.uint8).numpy().data)
    return running.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 over a file's bytes."""
    running = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            running.update(block)
    return running.hexdigest()


def json_text(value: Any) -> str:
    """JSON with sorted keys: equal values give equal texts.

    Infinities are written as Python reads them: configurations of schedulers hold some.

    Raises:
        TypeError: what JSON cannot hold.

    >>> json_text({"b": [1, None], "a": 0.1})
    '{"a": 0.1, "b": [1, null]}'

    """
    return json.dumps(value, sort_keys=True)


def json_safe(values: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON reads it back; what JSON cannot hold becomes its type's name."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=lambda v: type(v).__name__))
    return plain
