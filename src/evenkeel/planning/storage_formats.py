"""Bytes of a quantized denoiser, in memory and on disk, by the name of its format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.methods.spec import QuantizerSpec


@dataclass(frozen=True)
class Packed:
    """How a backend stores the weight of a linear layer.

    Attributes:
        bits: per weight, scales of groups included.
        row_bytes: per output beside it.
        rank: of a 16-bit branch beside it.

    """

    bits: float
    row_bytes: int = 0
    rank: int = 0


# GGUF: block sizes of ggml's formats. bitsandbytes: blocks of 64 with float32 scales. nvfp4: 16 values
# share an fp8 scale; mxfp4: 32 an exponent. int4: torchao's groups of 128 with scale and zero in 16 bits.
BACKENDS: dict[str, Packed] = {
    "nf4": Packed(4 + 32 / 64),
    "fp4": Packed(4 + 32 / 64),
    "nf4-double": Packed(4 + 8 / 64 + 32 / (64 * 256)),
    "int8": Packed(8, row_bytes=4),
    "fp8": Packed(8, row_bytes=4),
    "int4": Packed(4 + 32 / 128),
    "nvfp4": Packed(4 + 8 / 16),
    "mxfp4": Packed(4 + 8 / 32),
    "svdquant-int4": Packed(4 + 16 / 64, rank=32),
    "q8_0": Packed(8.5),
    "q6_k": Packed(6.5625),
    "q5_k": Packed(5.5),
    "q5_1": Packed(6.0),
    "q5_0": Packed(5.5),
    "q4_k": Packed(4.5),
    "q4_1": Packed(5.0),
    "q4_0": Packed(4.5),
    "q3_k": Packed(3.4375),
    "q2_k": Packed(2.625),
}


@dataclass(frozen=True)
class Quantized:
    """A quantized denoiser.

    Attributes:
        name: of the format.
        layers: that are quantized.
        memory: bytes while it runs.
        stored: bytes of its file.
        unpacked: bytes of the largest weight in the denoiser's dtype, which packed formats make anew
            at every call.
        own: whether this library quantizes, and may refit.
        rank: of its low-rank branches.

    """

    name: str
    layers: int
    memory: int
    stored: int
    unpacked: int = 0
    own: bool = False
    rank: int = 0


def bytes_of(module: nn.Module, dtype: torch.dtype) -> int:
    """Of all parameters and buffers, floating ones in ``dtype``."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(
        t.numel() * (dtype.itemsize if t.is_floating_point() else t.dtype.itemsize)
        for t in tensors.values()
    )


def quantized_bytes(denoiser: nn.Module, text: str, dtype: torch.dtype) -> Quantized:
    """What ``text`` makes of the denoiser: a specification of this library, or a backend's format.

    This library computes with rounded weights in the denoiser's own dtype and packs them on disk;
    backends keep them packed.

    Raises:
        QuantizationError: neither; lists what there is.

    """
    whole = bytes_of(denoiser, dtype)
    backend = BACKENDS.get(text.lower())
    if backend is not None:
        layers = [m for m in denoiser.modules() if type(m) is nn.Linear]
        saved = sum(_saved(layer, backend, dtype) for layer in layers)
        largest = max((layer.weight.numel() * dtype.itemsize for layer in layers), default=0)
        return Quantized(text.lower(), len(layers), whole - saved, whole - saved, largest)
    try:
        method = QuantizerSpec.parse(text).method
    except QuantizationError as error:
        raise QuantizationError(f"{error} Formats of backends: {', '.join(BACKENDS)}.") from error
    memory, stored, count = whole, whole, 0
    for name, layer in denoiser.named_modules():
        if type(layer) in (nn.Linear, nn.Conv2d) and not first_match(name, method.skip):
            kept, packed = _own(layer, method, dtype)
            weight = layer.get_parameter("weight").numel() * dtype.itemsize
            memory, stored, count = memory + kept, stored - weight + packed, count + 1
    return Quantized(text, count, memory, stored, own=True, rank=method.rank)


def _saved(layer: nn.Linear, how: Packed, dtype: torch.dtype) -> int:
    outputs, inputs = layer.weight.shape
    packed = int(outputs * inputs * how.bits / 8) + outputs * how.row_bytes
    packed += how.rank * (outputs + inputs) * 2
    return outputs * inputs * dtype.itemsize - packed


def _own(layer: nn.Module, method: RoundToNearest, dtype: torch.dtype) -> tuple[int, int]:
    """What our layer holds on the device beside its weight, and what stands for that on disk."""
    outputs, inputs, *kernel = layer.get_parameter("weight").shape
    branch = method.rank * (outputs + inputs) * dtype.itemsize if type(layer) is nn.Linear else 0
    grid = method.weight_grid(layer)
    if grid is None:
        return branch, branch + outputs * inputs * dtype.itemsize
    pixels = 1
    for side in kernel:
        pixels *= side
    groups = outputs * pixels * (1 if grid.group is None else -(-inputs // grid.group))
    if grid.group is None:
        groups = outputs
    codes = -(-outputs * inputs * pixels * grid.format.bits // 8)
    zeros = groups if grid.zero_point else 0
    # Powers of two are the same numbers in 16 bits; fp8 scales have one float32 beside them.
    each = {"float32": 4, "fp8_e4m3": 1, "e8m0": 2}[grid.scale]
    scales = groups * each + (4 if grid.scale == "fp8_e4m3" else 0)
    return branch, branch + codes + scales + zeros
