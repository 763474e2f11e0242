"""What decides about a quantized layer's output besides its tensors and the name of its format."""

from __future__ import annotations

from typing import Any

from evenkeel.hosts.backends.names import (
    class_names,
    comes_from,
    is_nunchaku,
    is_tensor_quantizer,
    written,
)


def settings_of(module: Any) -> str:
    """What decides about a layer's (or quantizer's) output and is neither tensor nor format.

    >>> from torch import nn
    >>> settings_of(nn.Linear(8, 4))
    ''

    """
    if "GGUFParameter" in class_names(getattr(module, "weight", None)):
        kind = getattr(module.weight.quant_type, "name", "?")
        return written({"compute_dtype": getattr(module, "compute_dtype", None), "type": kind})
    if comes_from(module, "torchao") and hasattr(module, "config"):  # a fake quantizer
        return written({"config": module.config, "enabled": getattr(module, "enabled", True)})
    if hasattr(module, "sdnq_dequantizer"):
        return written(vars(module.sdnq_dequantizer))
    if comes_from(module, "optimum.quanto") and hasattr(module, "weight_qtype"):
        keys = ("weight_qtype", "weight_group_size", "activation_qtype")
        return written({key: getattr(module, key, None) for key in keys})
    if is_tensor_quantizer(module):
        return written({key: vars(module).get(key) for key in _of_tensor_quantizer(module)})
    if comes_from(module, "bitsandbytes") and hasattr(module, "state"):
        return written({"threshold": module.state.threshold})
    if is_nunchaku(module) and hasattr(module, "precision"):
        # The scale of a whole nvfp4 weight is a plain number in one loader, a parameter in the other.
        keys = ("precision", "act_unsigned", "wtscale")
        return written({key: vars(module).get(key) for key in keys})
    return ""


# Of ModelOpt's TensorQuantizer. What it notes while it runs (shapes, calibration) is not among them.
_TENSOR_QUANTIZER = (
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


def _of_tensor_quantizer(module: Any) -> tuple[str, ...]:
    # In blocks, the axis is derived at the first call.
    blocks = vars(module).get("_block_sizes")
    return _TENSOR_QUANTIZER if blocks else (*_TENSOR_QUANTIZER, "_axis")
