"""bitsandbytes: int8, NF4 and FP4, whose scales lie beside the codes and move at the first call."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from evenkeel.hosts.backends.base import Backend, comes_from, joined, written


class BitsAndBytes(Backend):
    """One network has one answer, before and after its first call."""

    name = "bitsandbytes"

    def owns(self, layer: Any) -> bool:
        return comes_from(layer, "bitsandbytes")

    def format(self, layer: Any) -> str:
        weight = layer.weight
        if hasattr(weight, "quant_type"):
            packed = getattr(weight, "quant_state", None) is not None
            text = joined(weight.quant_type, g=weight.blocksize if weight.blocksize != 64 else None)
            return text if packed else f"{text}-unpacked"
        return "int8" if weight.dtype == torch.int8 else "int8-unpacked"

    def settings(self, module: Any) -> str:
        if comes_from(module, "bitsandbytes") and hasattr(module, "state"):
            return written({"threshold": module.state.threshold})
        return ""

    def tensors(self, name: str, tensor: Any) -> Iterable[tuple[str, Tensor]] | None:
        packed = getattr(tensor, "quant_state", None) is not None
        return _four_bits(name, tensor) if packed else None

    def context(self, tensor: Any) -> str:
        if not hasattr(tensor, "quant_state"):
            return ""
        return written({key: getattr(tensor, key, None) for key in ("quant_type", "blocksize")})

    def beside(self, module: Any) -> Iterable[tuple[str, Tensor]]:
        weight: Any = getattr(module, "weight", None)
        state: Any = getattr(module, "state", None)
        if hasattr(weight, "SCB") and hasattr(state, "SCB"):
            # The scales of int8 move from the weight to the layer at the first call.
            scale = weight.SCB if weight.SCB is not None else state.SCB
            if scale is not None:
                yield "SCB", scale


def _four_bits(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Codes and scales in one order and precision.

    At the first call on a CPU that multiplies bfloat16 in vectors, bitsandbytes reorders the codes
    and rounds the scales to bfloat16, for good; elsewhere it keeps both. One network, one answer.
    """
    state = tensor.quant_state
    data = tensor.data.as_subclass(Tensor).detach().contiguous()
    codes = data.view(torch.uint8).reshape(-1)
    scale = state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        codes, scale = _unpacked(codes, *state.shape), scale.T
    elif state.nested:
        library: Any = sys.modules["bitsandbytes.functional"]
        scale = library.dequantize_blockwise(scale, state.state2) + state.offset
    yield name, codes
    yield f"{name}.absmax", scale.to(torch.bfloat16).reshape(-1)
    yield f"{name}.code", state.code


def _unpacked(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Packed in tiles of 32 rows, two codes of four bits to a byte; back to (rows * columns / 2,)."""
    tiles = packed.reshape(-1, 32)
    codes = torch.cat([tiles & 0xF, tiles >> 4], dim=-1)
    codes = codes.reshape(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(-1)
    return (codes[::2] << 4) | codes[1::2]
