"""What a single layer says about its quantization, one function per backend.

Layouts that need a GPU (nunchaku, and torchao's packed formats) are read as their sources document
them; they have not met the hardware.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.hosts.backends.names import class_names, comes_from, dtype_text, is_nunchaku


@dataclass(frozen=True)
class Format:
    """A backend's name and how it writes a layer's weight (and rounds its input)."""

    backend: str
    text: str

    @property
    def bits(self) -> int | None:
        """Of a weight's code: the first number in the text."""
        found = re.search(r"\d+", self.text)
        return int(found.group()) if found else None


PLAIN = Format("plain", "")


def is_layer(module: Any) -> bool:
    """Whether it says about itself that it is a linear layer or a convolution.

    >>> is_layer(nn.Linear(8, 4)), is_layer(nn.LayerNorm(8))
    (True, False)

    """
    size = ("in_features", "out_features"), ("in_channels", "out_channels", "kernel_size")
    holds = any(hasattr(module, key) for key in ("weight", "qweight"))
    # An adapter (peft) shows the sizes of the layer inside it, which is counted by itself.
    return (
        holds
        and not hasattr(module, "base_layer")
        and any(all(hasattr(module, key) for key in keys) for keys in size)
    )


def format_of(layer: nn.Module) -> Format:
    """The backend and format of one layer; ``PLAIN`` if it is an ordinary one.

    >>> format_of(nn.Linear(8, 4))
    Format(backend='plain', text='')

    """
    for backend, owns, read in _BACKENDS:
        if owns(layer):
            text = read(layer)
            return Format(backend, text) if text else PLAIN
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return PLAIN
    if type(weight) not in (Tensor, nn.Parameter):
        kind = type(weight)
        return Format(kind.__module__.split(".")[0], kind.__name__.lower())
    if weight.dtype.itemsize == 1 and weight.dtype.is_floating_point:
        return Format("casting", dtype_text(weight.dtype))  # diffusers' layerwise casting
    return PLAIN


def _torchao(layer: Any) -> str:
    weight = _quantizer_text(getattr(layer, "weight_fake_quantizer", None))
    if weight or hasattr(layer, "activation_fake_quantizer"):
        activation = _quantizer_text(getattr(layer, "activation_fake_quantizer", None))
        return _joined("fake-" + (weight or "int16"), a=_number(activation))
    tensor = layer.weight
    inner = getattr(tensor, "original_weight_tensor", None)  # LinearActivationQuantizedTensor
    dynamic = inner is not None
    tensor = tensor if inner is None else inner
    given = [getattr(tensor, key, None) for key in ("act_quant_kwargs", "activation_quantization")]
    rounded = next((x for x in given if x is not None), None)
    block = getattr(tensor, "block_size", None) or ()
    group = int(block[-1]) if isinstance(block, (list, tuple)) and block else None
    if isinstance(block, int):
        group = block
    activation = _number(type(rounded).__name__) or _number(str(rounded))
    return _joined(
        _torchao_weight(tensor),
        g=group if group != tensor.shape[-1] else None,
        a=activation if rounded is not None else ("x" if dynamic else None),
    )


def _torchao_weight(tensor: Any) -> str:
    """``int8`` of Int8Tensor, the target of an unpacked one, the stored dtype of a float8 one."""
    for key in ("target_dtype", "elem_dtype"):
        if getattr(tensor, key, None) is not None:
            return dtype_text(getattr(tensor, key))
    name = type(tensor).__name__
    if name == "Float8Tensor":
        return dtype_text(tensor.qdata.dtype)
    short = re.sub(r"(Tensor|Packed|Plain|Tile|To4d|Preshuffled|Int32|Weight)", "", name)
    return (short or name).lower()


def _quantizer_text(quantizer: Any) -> str:
    config = getattr(quantizer, "config", None)
    if config is None or not getattr(quantizer, "enabled", True):
        return ""
    group = getattr(getattr(config, "granularity", None), "group_size", None)
    return _joined(dtype_text(getattr(config, "dtype", type(config).__name__)), g=group)


def _bitsandbytes(layer: Any) -> str:
    weight = layer.weight
    if hasattr(weight, "quant_type"):
        packed = getattr(weight, "quant_state", None) is not None
        text = _joined(weight.quant_type, g=weight.blocksize if weight.blocksize != 64 else None)
        return text if packed else f"{text}-unpacked"
    return "int8" if weight.dtype == torch.int8 else "int8-unpacked"


def _gguf(layer: Any) -> str:
    kind = getattr(getattr(layer, "weight", None), "quant_type", None)
    return "" if kind is None else str(getattr(kind, "name", kind))


def _quanto(layer: Any) -> str:
    weight, activation = layer.weight_qtype, getattr(layer, "activation_qtype", None)
    if weight is None and activation is None:
        return ""
    group = getattr(layer, "weight_group_size", None)
    text = _joined(getattr(weight, "name", "none"), g=group)
    frozen = weight is None or type(layer.weight) not in (Tensor, nn.Parameter)
    text = text if frozen else f"{text}-unfrozen"
    return _joined(text, a=_number(getattr(activation, "name", "")))


def _sdnq(layer: Any) -> str:
    how = layer.sdnq_dequantizer
    rank = how.svd_rank if getattr(layer, "svd_up", None) is not None else None
    group = how.group_size if how.group_size and how.group_size > 0 else None
    activation = how.quantized_matmul_dtype if how.use_quantized_matmul else None
    return _joined(str(how.weights_dtype), g=group, r=rank, a=_number(str(activation)))


def _modelopt(layer: Any) -> str:
    weight = _modelopt_bits(getattr(layer, "weight_quantizer", None))
    activation = _modelopt_bits(getattr(layer, "input_quantizer", None))
    if not weight and not activation:
        return ""
    factors = getattr(layer.weight_quantizer, "svdquant_lora_a", None)
    rank = int(factors.shape[0]) if isinstance(factors, Tensor) else None
    return _joined(weight or "int16", r=rank, a=activation.split("-g")[0].removeprefix("int"))


def _modelopt_bits(quantizer: Any) -> str:
    if quantizer is None or getattr(quantizer, "_disabled", True):
        return ""
    bits = quantizer._num_bits
    text = f"int{bits}" if isinstance(bits, int) else f"fp{1 + sum(bits)}"
    blocks = getattr(quantizer, "_block_sizes", None) or {}
    return _joined(text, g=blocks.get(-1))


def _nunchaku(layer: Any) -> str:
    kind = type(layer).__name__
    if kind.startswith("SVDQ"):
        return _joined(
            f"svdq-{getattr(layer, 'precision', 'int4')}",
            g=getattr(layer, "group_size", None),
            r=getattr(layer, "rank", None),
            a=4,
        )
    return _joined("awq-int4", g=getattr(layer, "group_size", None))


def _evenkeel(layer: Any) -> str:
    stored = getattr(layer, "stored", None)
    bits = getattr(getattr(stored[0], "format", None), "bits", None) if stored else None
    activation = getattr(layer, "activation_bits", 16)
    return _joined(
        f"int{bits}" if bits else "simulated",
        r=getattr(layer, "rank", 0) or None,
        a=activation if activation != 16 else None,
    )


def _joined(text: str, **parts: Any) -> str:
    """``int4`` and g=64 to ``int4-g64``; empty parts are left out."""
    return "-".join([text, *(f"{key}{value}" for key, value in parts.items() if value)])


def _number(text: str | None) -> str:
    found = re.search(r"\d+", text or "")
    return found.group() if found else ""


# First match wins: name, whether it made this layer, and how it describes it.
_BACKENDS: tuple[tuple[str, Callable[[Any], bool], Callable[[Any], str]], ...] = (
    (
        "torchao",
        lambda x: comes_from(x, "torchao") or comes_from(getattr(x, "weight", None), "torchao"),
        _torchao,
    ),
    ("bitsandbytes", lambda x: comes_from(x, "bitsandbytes"), _bitsandbytes),
    ("gguf", lambda x: "GGUFLinear" in class_names(x), _gguf),
    ("quanto", lambda x: comes_from(x, "optimum.quanto") and hasattr(x, "weight_qtype"), _quanto),
    ("sdnq", lambda x: hasattr(x, "sdnq_dequantizer"), _sdnq),
    ("modelopt", lambda x: comes_from(x, "modelopt"), _modelopt),
    ("nunchaku", is_nunchaku, _nunchaku),
    ("evenkeel", lambda x: comes_from(x, "evenkeel.quantizers"), _evenkeel),
)
