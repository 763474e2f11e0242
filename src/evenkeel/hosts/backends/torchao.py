"""torchao: weights in tensors of its own classes, and the fake quantizers of its QAT.

Its packed formats need a GPU; they are read as its sources document them.
"""

from __future__ import annotations

import re
from typing import Any

from evenkeel.hosts.backends.base import Backend, comes_from, dtype_text, joined, number, written


class TorchAO(Backend):
    """Wrapped weights are taken apart by ``__tensor_flatten__``, so only names are read here."""

    name = "torchao"

    def owns(self, layer: Any) -> bool:
        return comes_from(layer, "torchao") or comes_from(getattr(layer, "weight", None), "torchao")

    def format(self, layer: Any) -> str:
        weight = _fake(getattr(layer, "weight_fake_quantizer", None))
        if weight or hasattr(layer, "activation_fake_quantizer"):
            activation = _fake(getattr(layer, "activation_fake_quantizer", None))
            return joined("fake-" + (weight or "int16"), a=number(activation))
        tensor = layer.weight
        inner = getattr(tensor, "original_weight_tensor", None)  # LinearActivationQuantizedTensor
        dynamic = inner is not None
        tensor = tensor if inner is None else inner
        given = [
            getattr(tensor, key, None) for key in ("act_quant_kwargs", "activation_quantization")
        ]
        rounded = next((x for x in given if x is not None), None)
        block = getattr(tensor, "block_size", None) or ()
        group = int(block[-1]) if isinstance(block, (list, tuple)) and block else None
        if isinstance(block, int):
            group = block
        activation = number(type(rounded).__name__) or number(str(rounded))
        return joined(
            _weight(tensor),
            g=group if group != tensor.shape[-1] else None,
            a=activation if rounded is not None else ("x" if dynamic else None),
        )

    def settings(self, module: Any) -> str:
        if comes_from(module, "torchao") and hasattr(module, "config"):  # a fake quantizer
            return written({"config": module.config, "enabled": getattr(module, "enabled", True)})
        return ""


def _weight(tensor: Any) -> str:
    """``int8`` of Int8Tensor, the target of an unpacked one, the stored dtype of a float8 one."""
    for key in ("target_dtype", "elem_dtype"):
        if getattr(tensor, key, None) is not None:
            return dtype_text(getattr(tensor, key))
    name = type(tensor).__name__
    if name == "Float8Tensor":
        return dtype_text(tensor.qdata.dtype)
    short = re.sub(r"(Tensor|Packed|Plain|Tile|To4d|Preshuffled|Int32|Weight)", "", name)
    return (short or name).lower()


def _fake(quantizer: Any) -> str:
    config = getattr(quantizer, "config", None)
    if config is None or not getattr(quantizer, "enabled", True):
        return ""
    group = getattr(getattr(config, "granularity", None), "group_size", None)
    return joined(dtype_text(getattr(config, "dtype", type(config).__name__)), g=group)
