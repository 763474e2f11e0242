"""What weight a layer of any backend computes with, found by asking it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.hosts.actuators.beside import shape_of
from evenkeel.hosts.actuators.head_rows import border, sizes
from evenkeel.hosts.pipeline.offloaded import present
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.layers.timed_inputs import TimedInput

AT_A_TIME = 1024  # features asked in one call
LINEAR = 1e-3, 1e-2  # how far a linear map is off its own sums in float32, in half precision


@torch.no_grad()
def effective_weight(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """(O, F) float32: what the layer multiplies a one-hot input by, its low-rank branches included.

    ``W_q[:, i] = layer(e_i) - layer(0)``. Backends that round their input represent a one-hot input
    exactly, as its largest value is its scale. Our own layers with ranges fixed beforehand would clip it:
    they take it as it is.

    Args:
        layer: a linear layer or an ungrouped 2D convolution, of any backend.
        dtype: of the input that it takes.

    """
    shape = shape_of(layer)
    assert shape is not None
    outputs, features = shape
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
    found = torch.empty(outputs, features, device=device)
    for start in range(0, features, AT_A_TIME):
        some = range(start, min(start + AT_A_TIME, features))
        ones = torch.zeros(len(some) + 1, features, dtype=dtype, device=device)
        ones[torch.arange(len(some)), torch.tensor(some)] = 1
        with _unclipped(layer):
            answers = _asked(layer, ones).float()
        found[:, some.start : some.stop] = (answers[:-1] - answers[-1]).T
    return found


@torch.no_grad()
def rounds_inputs(layer: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the layer rounds what enters it: whether its answer to a sum is not the sum of its answers.

    >>> rounds_inputs(nn.Linear(8, 4))
    False

    """
    if _fixed_range(layer):
        return True
    shape = shape_of(layer)
    assert shape is not None
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
    a, b = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    rows = torch.stack([a, b, a + b, torch.zeros_like(a)]).to(dtype)
    first, second, both, nothing = _asked(layer, rows).float()
    off, size = (first + second - both - nothing).norm(), (both - nothing).norm()
    return bool(off > LINEAR[dtype.itemsize < 4] * size)


def _fixed_range(layer: Any) -> bool:
    return isinstance(layer, QuantizedLayer) and isinstance(
        layer.activation, StaticInput | TimedInput
    )


@contextmanager
def _unclipped(layer: Any) -> Iterator[None]:
    """Inside, a layer with a range fixed beforehand does not round what enters it."""
    kept = layer.activation if _fixed_range(layer) else None
    if kept is not None:
        layer.activation = None
    try:
        yield
    finally:
        if kept is not None:
            layer.activation = kept


def _asked(layer: Any, rows: Tensor) -> Tensor:
    """Outputs (n, O) for rows (n, F)."""
    if not hasattr(layer, "in_channels"):
        answer: Tensor = layer(rows)
        return answer
    # One window per image: it starts where the padding lets an output's window start.
    kernel, stride, dilation = sizes(layer.kernel_size), sizes(layer.stride), sizes(layer.dilation)
    left = border(layer, kernel)[::-2]  # of the first axis, then of the second
    index = [-(-p // s) for p, s in zip(left, stride, strict=True)]
    offset = [i * s - p for i, s, p in zip(index, stride, left, strict=True)]
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    image = rows.new_zeros(
        len(rows),
        layer.in_channels,
        *(o + n for o, n in zip(offset, spans, strict=True)),
    )
    window = image[:, :, offset[0] :: dilation[0], offset[1] :: dilation[1]]
    window.copy_(rows.reshape(len(rows), layer.in_channels, *kernel))
    out: Tensor = layer(image)[:, :, index[0], index[1]]
    return out


def reference_weight(layer: nn.Module) -> Tensor:
    """(O, F) float32 weight of a plain layer."""
    weight = present(layer, "weight", layer.get_parameter("weight"))
    return weight.detach().float().flatten(1)


def reference_bias(layer: nn.Module) -> Tensor | None:
    """(O,) float32 bias of a plain layer, if it has one."""
    bias: Tensor | None = getattr(layer, "bias", None)
    return None if bias is None else present(layer, "bias", bias).detach().float()
