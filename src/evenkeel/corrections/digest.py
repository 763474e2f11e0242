"""One digest over everything that a correction holds; what it cannot see it refuses."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# What a class holds beside values.
_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MemberDescriptorType,
    classmethod,
    staticmethod,
    property,
    functools.cached_property,
    type,
)


class Digested:
    """An object that is told from others by its class and by everything that it holds."""

    def digest(self) -> str:
        """See ``digest``.

        Raises:
            CalibrationError: an attribute holds what cannot be seen.

        """
        return digest(self, type(self).__name__)


def digest(value: Any, name: str = "value") -> str:
    """SHA-256 of a value and, recursively, of everything in it.

    Tensors and arrays count by dtype, shape and bytes; numbers and text by type and value; objects by
    their class and every attribute, whether it is a field or not. A class counts by its name, by the
    values that it holds itself, and by those that its methods took along from the function it was
    made in; not by its code. What is only remembered (``cached_property``) does not count.

    Args:
        value: numbers, text, None, tensors, arrays, tuples, lists, sets, mappings, dataclasses and
            ``Digested`` objects.
        name: of the value, for errors.

    Raises:
        CalibrationError: something in it cannot be seen, such as a function or an open file.

    >>> digest((1.0, torch.ones(2))) == digest((1.0, torch.ones(2)))
    True
    >>> digest(torch.zeros(2)) == digest(torch.zeros(2, dtype=torch.float64))
    False

    """
    running = hashlib.sha256()
    for piece in _pieces(value, name):
        running.update(len(piece).to_bytes(8, "big"))
        running.update(piece)
    return running.hexdigest()


def _pieces(value: Any, name: str) -> Iterator[bytes]:
    """Type and content of ``value``."""
    kind = type(value)
    yield _identity(kind).encode()
    if isinstance(value, Enum):
        yield value.name.encode()
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"{value.dtype.str} {value.shape}".encode()
        yield value.tobytes()
    elif kind in (Tensor, nn.Parameter) and _is_dense(value):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, _PLAIN):
        yield value if isinstance(value, bytes) else repr(value).encode()
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield digest(part, f"{name}[{i}]").encode()
    elif isinstance(value, set | frozenset):
        yield from sorted(digest(part, f"an element of {name}").encode() for part in value)
    elif isinstance(value, Mapping):
        items = (
            (digest(k, f"a key of {name}"), digest(v, f"{name}[{k!r}]")) for k, v in value.items()
        )
        yield from (f"{key} {content}".encode() for key, content in sorted(items))
    elif isinstance(value, Digested) or (is_dataclass(value) and kind is not type):
        for key, part in sorted((_held_by(value) | _held_by_class(kind)).items()):
            yield f"{key} {digest(part, f'{name}.{key}')}".encode()
    else:
        raise CalibrationError(
            f"{name} is a {_identity(kind)}, whose content a digest cannot see: two corrections that "
            f"differ in it would be taken for one. Hold numbers, text, tensors, arrays, containers or "
            f"dataclasses of them instead, and make the object from them when it is needed."
        )


def _identity(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)


def _held_by(value: Any) -> dict[str, Any]:
    """Every attribute of an object, but for what it only remembers."""
    kind = type(value)
    slots = {s for k in kind.__mro__ for s in getattr(k, "__slots__", ()) if hasattr(value, s)}
    found = {s: getattr(value, s) for s in slots} | getattr(value, "__dict__", {})
    remembered = functools.cached_property
    return {n: v for n, v in found.items() if not isinstance(getattr(kind, n, None), remembered)}


def _held_by_class(kind: type) -> dict[str, Any]:
    """Values of the classes that somebody wrote, and what their methods closed over."""
    found = {}
    for k in kind.__mro__:
        if k is Digested or Digested not in k.__mro__:
            continue
        for n, v in vars(k).items():
            if n.startswith("__") or n == "_abc_impl":
                continue
            if not isinstance(v, _CODE):
                found[f"{k.__qualname__}.{n}"] = v
            found |= {f"{k.__qualname__}.{n}.{m}": c for m, c in _closed_over(v).items()}
    return found


def _closed_over(member: Any) -> dict[str, Any]:
    """Values, not functions or classes, that a method took along from the function it was made in."""
    inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
    function = inspect.unwrap(inner) if callable(inner) else inner
    if not isinstance(function, types.FunctionType):
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    taken = {n: cell.cell_contents for n, cell in cells}
    return {n: v for n, v in taken.items() if not isinstance(v, _CODE)}
