"""The plain tensors behind a module's parameters and buffers, whatever a backend wraps them in.

Wrapped tensors (torchao, quanto) are taken apart by torch's own protocol ``__tensor_flatten__``; the
others keep scales beside their tensors, each in its own place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.backends.names import written

# Of ModelOpt's SVDQuant; buffers of some of its quantizers, plain attributes of others.
LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b", "_svdquant_lora_a", "_svdquant_lora_b")


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and plain tensor of everything that decides about the output, in no special order.

    For a plain module these are its parameters and buffers. The same network gives the same tensors
    before and after its first call, and compiled or not, although some backends move theirs about.

    Raises:
        UnsupportedPipeline: a tensor class, or a network in C++ (nunchaku's first FLUX loader), that
            shows nothing of what it stores.

    >>> sorted(name for name, tensor in stored_tensors(nn.Linear(8, 4)))
    ['bias', 'weight']

    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield from _plain(name.replace("_orig_mod.", ""), tensor)
    for name, part in module.named_modules():
        if type(vars(part).get("m")).__module__.startswith("nunchaku._C"):
            raise UnsupportedPipeline(
                f"the weights of {name or type(part).__name__} are inside a C++ object of nunchaku, so "
                f"this denoiser cannot be told from another one. Load it with "
                f"NunchakuFluxTransformer2DModelV2, or with diffusers' own nunchaku loader."
            )
        for key, tensor in _beside(part):
            yield from _plain(f"{name}.{key}".replace("_orig_mod.", "").lstrip("."), tensor)


def bytes_of(module: nn.Module) -> int:
    """Memory of everything that `stored_tensors` gives.

    >>> bytes_of(nn.Linear(8, 4))
    144

    """
    return sum(tensor.numel() * tensor.element_size() for _, tensor in stored_tensors(module))


def contexts_of(module: nn.Module) -> dict[str, str]:
    """By tensor, what wrapped tensors say about themselves: group, dtype, how the input is rounded.

    >>> contexts_of(nn.Linear(8, 4))
    {}

    """
    found = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        path = name.replace("_orig_mod.", "")
        if _is_wrapped(tensor):
            found[path] = written(_flatten(tensor)[1])
        elif hasattr(tensor, "quant_state"):
            parts = ("quant_type", "blocksize")
            found[path] = written({key: getattr(tensor, key, None) for key in parts})
    return found


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter):
        yield name, tensor.detach()
    elif getattr(tensor, "quant_state", None) is not None:
        yield from _bitsandbytes_4bit(name, tensor)
    elif _is_wrapped(tensor):
        for key in _flatten(tensor)[0]:
            yield from _plain(f"{name}.{key}", getattr(tensor, key))
    elif hasattr(tensor, "as_tensor"):  # GGUFParameter, whose views are of its own class
        yield name, tensor.as_tensor().detach()
    elif issubclass(kind, nn.Parameter):  # with memory of its own (bitsandbytes' Int8Params)
        yield name, tensor.data.as_subclass(Tensor).detach()
    else:
        raise UnsupportedPipeline(
            f"{name} is a {kind.__module__}.{kind.__name__}: a tensor class without "
            f"__tensor_flatten__, so what it stores cannot be recognised again. Supported backends "
            f"are listed in docs/backends.md."
        )


def _is_wrapped(tensor: Any) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__")


def _flatten(tensor: Any) -> tuple[list[str], Any]:
    names, context = tensor.__tensor_flatten__()
    return list(names), context


def _beside(part: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that decide about the output and are neither parameter nor buffer."""
    weight: Any = getattr(part, "weight", None)
    state: Any = getattr(part, "state", None)
    if hasattr(weight, "SCB") and hasattr(state, "SCB"):
        # bitsandbytes' int8 scales move from the weight to the layer at the first call.
        scale = weight.SCB if weight.SCB is not None else state.SCB
        if scale is not None:
            yield "SCB", scale
    for key in LOW_RANK:
        if isinstance(vars(part).get(key), Tensor):
            yield key, vars(part)[key]


def _bitsandbytes_4bit(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
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
