"""GGUF, as diffusers loads it: linear layers whose weight is a parameter of bytes with a type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from evenkeel.hosts.backends.base import Backend, class_names, written


class GGUF(Backend):
    """Recognised by diffusers' ``GGUFLinear`` and ``GGUFParameter``."""

    name = "gguf"

    def owns(self, layer: Any) -> bool:
        return "GGUFLinear" in class_names(layer)

    def format(self, layer: Any) -> str:
        kind = getattr(getattr(layer, "weight", None), "quant_type", None)
        return "" if kind is None else str(getattr(kind, "name", kind))

    def settings(self, module: Any) -> str:
        if "GGUFParameter" not in class_names(getattr(module, "weight", None)):
            return ""
        kind = getattr(module.weight.quant_type, "name", "?")
        return written({"compute_dtype": getattr(module, "compute_dtype", None), "type": kind})

    def tensors(self, name: str, tensor: Any) -> Iterable[tuple[str, Tensor]] | None:
        if not hasattr(tensor, "as_tensor"):
            return None
        return [(name, tensor.as_tensor().detach())]  # its views are of its own class
