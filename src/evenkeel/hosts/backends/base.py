"""What a quantization backend is to this library, and how its classes are recognised and written down."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor


class Backend(ABC):
    """One quantization backend; whatever is particular about it stands in the file of its subclass.

    A backend is recognised by the names of classes and of the modules they come from, and never
    imported: its layers exist only where it is loaded already. Tensors that follow torch's protocol
    ``__tensor_flatten__`` need nothing here, nor do parameters and buffers that are plain tensors.

    Attributes:
        name: as records and reports show it.

    """

    name: ClassVar[str]

    @abstractmethod
    def owns(self, layer: Any) -> bool:
        """Whether it made this layer."""

    @abstractmethod
    def format(self, layer: Any) -> str:
        """How a layer of its own is written, ``int3-g64-r32-a4``; "" where it is left plain.

        The backend's word for the weight, then group (``g``), rank (``r``) and bits of the input
        (``a``), as `joined` puts them together. The first number is taken as the bits of a weight.
        """

    def settings(self, module: Any) -> str:
        """What decides about the output and is neither tensor nor format; "" of foreign modules.

        Args:
            module: any, layers as well as what a backend keeps inside a layer.

        """
        return ""

    def tensors(self, name: str, tensor: Any) -> Iterable[tuple[str, Tensor]] | None:
        """The plain tensors behind a parameter of a class of its own; None of any other."""
        return None

    def context(self, tensor: Any) -> str:
        """What such a parameter says about itself: group, dtype; "" of any other."""
        return ""

    def beside(self, module: Any) -> Iterable[tuple[str, Tensor]]:
        """Tensors that decide about the output and are neither parameter nor buffer, by attribute."""
        return ()

    def hidden(self, module: Any) -> str:
        """Where the weights of a module are that nobody can see, and what to do; "" if none are."""
        return ""


def joined(text: str, **parts: Any) -> str:
    """A format's text; empty parts are left out.

    >>> joined("int4", g=64, r=None)
    'int4-g64'

    """
    return "-".join([text, *(f"{key}{value}" for key, value in parts.items() if value)])


def number(text: str | None) -> str:
    """The first number in a text.

    >>> number("qint8"), number("none")
    ('8', '')

    """
    found = re.search(r"\d+", text or "")
    return found.group() if found else ""


def written(value: Any) -> str:
    """The same text in every process, saved and loaded: no addresses, mappings in order, no tuples.

    >>> import torch
    >>> written({"b": torch.int8, "a": (1, object())})
    '{a: [1, <object object>], b: torch.int8}'

    """
    if isinstance(value, Mapping):
        items = sorted((str(key), written(v)) for key, v in value.items())
        return "{" + ", ".join(f"{key}: {text}" for key, text in items) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def dtype_text(value: Any) -> str:
    """``int4`` of torch.int4 and of TorchAODType.INT4.

    >>> import torch
    >>> dtype_text(torch.float8_e4m3fn)
    'float8_e4m3fn'

    """
    return str(getattr(value, "name", value)).split(".")[-1].lower()


def class_names(value: Any) -> set[str]:
    """Of its class and all that it inherits from.

    >>> sorted(class_names(True))
    ['bool', 'int', 'object']

    """
    return {kind.__name__ for kind in type(value).__mro__}


def comes_from(value: Any, package: str) -> bool:
    """Whether its class, or one that it inherits from, comes from a package.

    >>> import torch
    >>> comes_from(torch.nn.Linear(1, 1), "torch.nn"), comes_from(torch.nn.Linear(1, 1), "torch.n")
    (True, False)

    """
    return any(f"{kind.__module__}.".startswith(f"{package}.") for kind in type(value).__mro__)
