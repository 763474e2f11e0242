"""A denoiser's head, and what enters and leaves it as rows of a regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from evenkeel.errors import UnsupportedPipeline


@dataclass(frozen=True)
class Head:
    """The layer whose output, reordered, is the denoiser's output.

    Attributes:
        name: dotted path in the denoiser, for example ``proj_out``.
        kind: a linear layer over tokens, or a convolution.
        features: F, inputs of one output value: in_features, or in_channels times the kernel.
        targets: O, out_features or out_channels.
        has_bias: whether it adds a constant.
        corrected: output columns that may be changed; those of a learned variance are left out.

    """

    name: str
    kind: Literal["linear", "convolution"]
    features: int
    targets: int
    has_bias: bool
    corrected: tuple[int, ...]


def rows_of(head: Head, layer: Any, h: Tensor) -> Tensor:
    """What enters the head, one row per position of its output: out = rows W^T + b.

    Tokens are rows already; of a convolution a row is the patch under its kernel, in the order of
    ``weight.flatten(1)``. Values are not checked; NaN spreads.

    Args:
        head: the layer as found.
        layer: the layer itself; a convolution's stride, padding and dilation are read off it.
        h: its input, (batch, ..., F) tokens or (batch, channels, height, width[, depth]).

    Returns:
        (batch, positions, F), in the dtype of ``h``.

    Raises:
        UnsupportedPipeline: ``h`` does not fit the layer.

    >>> import torch
    >>> layer = torch.nn.Conv2d(3, 4, 3, padding=1)
    >>> head = Head("conv_out", "convolution", 27, 4, True, (0, 1, 2, 3))
    >>> rows_of(head, layer, torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 64, 27])

    """
    if head.kind == "linear":
        if h.ndim < 2 or h.shape[-1] != head.features:
            raise UnsupportedPipeline(
                f"{head.name!r} takes (batch, ..., {head.features}); its input is {tuple(h.shape)}."
            )
        return h.reshape(h.shape[0], -1, head.features)
    kernel = sizes(layer.kernel_size)
    if h.ndim != 2 + len(kernel) or h.shape[1] != layer.in_channels:
        raise UnsupportedPipeline(
            f"{head.name!r} takes (batch, {layer.in_channels}, "
            f"{'height, width' if len(kernel) == 2 else 'frames, height, width'}); its input is "
            f"{tuple(h.shape)}."
        )
    if len(kernel) == 3:
        return h.flatten(2).transpose(1, 2)
    mode = str(layer.padding_mode)
    padded = F.pad(h, border(layer, kernel), mode="constant" if mode == "zeros" else mode)
    dilation, stride = sizes(layer.dilation), sizes(layer.stride)
    return F.unfold(padded, kernel, dilation=dilation, stride=stride).transpose(1, 2)


def outputs_as_rows(head: Head, out: Tensor) -> Tensor:
    """The head's output (batch, ..., O) or (batch, O, ...) as (batch, positions, O).

    Raises:
        UnsupportedPipeline: the shape is not one this head gives.

    >>> import torch
    >>> head = Head("conv_out", "convolution", 27, 4, True, (0, 1, 2, 3))
    >>> outputs_as_rows(head, torch.zeros(2, 4, 8, 8)).shape
    torch.Size([2, 64, 4])

    """
    _check_output(head, out)
    if head.kind == "linear":
        return out.reshape(out.shape[0], -1, head.targets)
    return out.flatten(2).transpose(1, 2)


def rows_as_outputs(head: Head, rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `outputs_as_rows`: rows (batch, positions, O) in the shape of ``like``.

    Raises:
        UnsupportedPipeline: rows and shape do not belong together.

    >>> import torch
    >>> head = Head("conv_out", "convolution", 27, 4, True, (0, 1, 2, 3))
    >>> rows_as_outputs(head, torch.zeros(2, 64, 4), torch.zeros(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])

    """
    _check_output(head, like)
    positions = like.numel() // (like.shape[0] * head.targets)
    if rows.shape != (like.shape[0], positions, head.targets):
        raise UnsupportedPipeline(
            f"An output {tuple(like.shape)} of {head.name!r} holds rows "
            f"{(like.shape[0], positions, head.targets)}; got {tuple(rows.shape)}."
        )
    return (rows if head.kind == "linear" else rows.transpose(1, 2)).reshape(like.shape)


def sizes(value: Any) -> tuple[int, ...]:
    """A convolution's kernel, stride, ... per axis.

    A quantization backend may keep a single number for a square kernel.

    >>> sizes([3, 1]), sizes(3)
    ((3, 1), (3, 3))

    """
    return tuple(map(int, value)) if isinstance(value, (tuple, list)) else (int(value),) * 2


def border(layer: Any, kernel: tuple[int, ...]) -> list[int]:
    """A convolution's padding as `torch.nn.functional.pad` wants it: last axis first.

    >>> import torch
    >>> border(torch.nn.Conv2d(3, 4, (3, 1), padding="same"), (3, 1))
    [0, 0, 1, 1]

    """
    if layer.padding == "same":
        spans = [d * (k - 1) for d, k in zip(sizes(layer.dilation), kernel, strict=True)]
        return [side for span in reversed(spans) for side in (span // 2, span - span // 2)]
    widths = (0,) * len(kernel) if layer.padding == "valid" else sizes(layer.padding)
    return [side for width in reversed(widths) for side in (width, width)]


def _check_output(head: Head, out: Tensor) -> None:
    axis = -1 if head.kind == "linear" else 1
    if out.ndim < 2 or out.shape[axis] != head.targets:
        raise UnsupportedPipeline(
            f"{head.name!r} gives {head.targets} values along axis {axis}; got {tuple(out.shape)}."
        )
