"""NVIDIA ModelOpt: layers that round by quantizers of their own inside, weights as they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from evenkeel.hosts.backends.base import Backend, class_names, comes_from, joined, written

# Of SVDQuant; buffers of some of its quantizers, plain attributes of others.
_LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b", "_svdquant_lora_a", "_svdquant_lora_b")

# Of a TensorQuantizer. What it notes while it runs (shapes, calibration) is not among them.
_SETTINGS = (
    "_disabled",
    "_num_bits",
    "_block_sizes",
    "_unsigned",
    "_narrow_range",
    "_dynamic",
    "_fake_quant",
    "_bias",
    "_rotate",
)


class ModelOpt(Backend):
    """What a layer rounds, and how, its ``TensorQuantizer`` say."""

    name = "modelopt"

    def owns(self, layer: Any) -> bool:
        return comes_from(layer, "modelopt")

    def format(self, layer: Any) -> str:
        weight = _bits(getattr(layer, "weight_quantizer", None))
        activation = _bits(getattr(layer, "input_quantizer", None))
        if not weight and not activation:
            return ""
        factors = getattr(layer.weight_quantizer, "svdquant_lora_a", None)
        rank = int(factors.shape[0]) if isinstance(factors, Tensor) else None
        return joined(weight or "int16", r=rank, a=activation.split("-g")[0].removeprefix("int"))

    def settings(self, module: Any) -> str:
        if "TensorQuantizer" not in class_names(module) or not comes_from(module, "modelopt"):
            return ""
        said = vars(module)
        # In blocks, the axis is derived at the first call.
        keys = _SETTINGS if said.get("_block_sizes") else (*_SETTINGS, "_axis")
        return written({key: said.get(key) for key in keys})

    def beside(self, module: Any) -> Iterable[tuple[str, Tensor]]:
        said = vars(module)
        return [(key, said[key]) for key in _LOW_RANK if isinstance(said.get(key), Tensor)]


def _bits(quantizer: Any) -> str:
    if quantizer is None or getattr(quantizer, "_disabled", True):
        return ""
    bits = quantizer._num_bits
    text = f"int{bits}" if isinstance(bits, int) else f"fp{1 + sum(bits)}"
    blocks = getattr(quantizer, "_block_sizes", None) or {}
    return joined(text, g=blocks.get(-1))
