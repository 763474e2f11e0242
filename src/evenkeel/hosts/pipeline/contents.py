"""What arguments of a pipeline call hold, as JSON: tensors and pictures by a digest of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def described(value: Any) -> Any:
    """Equal for equal content, and other for other content, as far as ``unknown`` finds nothing in it.

    >>> described({"size": (8, 8), "guess": None})
    {'size': [8, 8], 'guess': None}
    >>> described(torch.zeros(2)) == described(torch.zeros(2)) != described(torch.ones(2))
    True

    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return _digest("tensor", value.dtype, tuple(value.shape), data=data.tobytes())
    if isinstance(value, np.ndarray):
        return _digest(
            "array", value.dtype, value.shape, data=np.ascontiguousarray(value).tobytes()
        )
    if isinstance(value, Image.Image):
        return _digest("picture", value.mode, value.size, data=value.tobytes())
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return str(value)
    return type(value).__name__


def unknown(value: Any, name: str) -> Iterator[str]:
    """Where in it something is whose content nobody can tell: a function, an object of a foreign class.

    >>> [*unknown({"scale": 1.0, "callback_on_step_end": print}, "call")]
    ["call['callback_on_step_end'] (builtin_function_or_method)"]

    """
    if isinstance(value, Mapping):
        for key, v in value.items():
            yield from unknown(v, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from unknown(v, f"{name}[{i}]")
    elif not isinstance(value, (*_PLAIN, np.generic, Tensor, np.ndarray, Image.Image)) and (
        not isinstance(value, (torch.dtype, torch.device, PurePath))
    ):
        yield f"{name} ({type(value).__name__})"


def _digest(*what: Any, data: bytes) -> str:
    text = " ".join(map(str, what))
    return f"{text} {hashlib.sha256(data).hexdigest()[:32]}"
