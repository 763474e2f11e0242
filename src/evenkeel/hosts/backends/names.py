"""How the classes of quantization backends are recognised and written down. None is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


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


def is_nunchaku(layer: Any) -> bool:
    """Whether it is a layer with packed weights of nunchaku, or of diffusers' loader for them."""
    lite = "diffusers.quantizers.nunchaku"
    return (comes_from(layer, "nunchaku") or comes_from(layer, lite)) and hasattr(layer, "qweight")


def is_tensor_quantizer(module: Any) -> bool:
    """Whether it is one of ModelOpt's, which round a layer's input, weight or output."""
    return "TensorQuantizer" in class_names(module) and comes_from(module, "modelopt")
