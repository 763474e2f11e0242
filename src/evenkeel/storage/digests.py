"""What a digest is over, and JSON in the one form that a digest can be over."""

from __future__ import annotations

import hashlib
import json
import math
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


DEEPEST = 200  # levels of nesting; what this library writes has fewer than twenty


def refuse_deep(value: Any) -> None:
    """Raise ValueError where lists and objects are nested deeper than a reader takes them."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deep")
        level = [
            inner
            for outer in level
            if isinstance(outer, (list, tuple, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` that a hostile text cannot take along.

    Raises:
        ValueError: not JSON, nested too deep, a number of thousands of digits, or half of a character,
            which nothing can write.

    >>> parse_json("[1, 2]")
    [1, 2]

    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    refuse_deep(found)
    json.dumps(found, ensure_ascii=False).encode()
    return found


_WORDS = {"inf": "infinite", "-inf": "minus infinity", "nan": "not a number"}


def valid_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: numbers that are not finite are null, with the reason beside.

    Of what an object holds, itself or in lists, ``not_finite`` says which were not, and what they were.
    What JSON cannot hold is its text.

    >>> valid_json({"psnr": math.inf, "n": 2})
    '{"psnr": null, "n": 2, "not_finite": {"psnr": "infinite"}}'

    """
    return json.dumps(_finite(value, {}, ""), default=str, allow_nan=False, indent=indent)


def _finite(value: Any, reasons: dict[str, str], at: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        reasons[at] = _WORDS[str(float(value))]
        return None
    if isinstance(value, Mapping):
        own: dict[str, str] = {}
        found = {str(k): _finite(v, own, str(k)) for k, v in value.items()}
        return found | ({"not_finite": own} if own else {})
    if isinstance(value, (list, tuple)):
        return [_finite(v, reasons, f"{at}.{i}" if at else str(i)) for i, v in enumerate(value)]
    return value
