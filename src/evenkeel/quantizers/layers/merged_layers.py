"""Layers in which a low-rank map is learned that is merged into the weight before it is rounded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.quantizers.layers.quantized_layers import (
    Quantized,
    QuantizedConv2d,
    QuantizedLinear,
    copied,
)
from evenkeel.quantizers.layers.timed_inputs import LearnedTimedInput, TimedInput
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, snap, unlast
from evenkeel.quantizers.rounding.straight_through import straight_through


class MergedLayer(nn.Module):
    """y = Q_a(x) Q_w(W_0 + B A)^T + b, differentiable in A, B, scales and zeros.

    The adapter is merged before rounding (EfficientDM, arXiv:2310.03270), so that nothing is added at
    inference: :meth:`finished` is an ordinary quantized layer. Of a convolution A is one of k x k to r
    channels and B one of 1 x 1, which is the same product of matrices. Computed in float32.

    Args:
        like: the full-precision layer, ``nn.Linear`` or ``nn.Conv2d``; not changed.
        base: W_0, in the shape of its weight.
        grid: of the weight: integers with a zero point, one scale per output channel.
        scales: of ``last(weight, grid)``.
        rank: r, at most what the weight has; 0 is no adapter.
        activation: how inputs are rounded at the start; None is not at all.
        generator: of A, drawn as ``nn.Linear`` draws (Kaiming); B is zero.

    """

    base: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(
        self,
        like: nn.Linear | nn.Conv2d,
        base: Tensor,
        grid: Grid,
        scales: Scales,
        *,
        rank: int,
        activation: TimedInput | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        assert scales.zero is not None and grid.group is None and not grid.per_tensor
        matrix = base.detach().float().flatten(1)
        outputs, features = matrix.shape
        bound = 1 / math.sqrt(features)  # Kaiming with a = sqrt(5)
        drawn = torch.empty(min(rank, outputs, features), features)
        self.down = nn.Parameter(drawn.uniform_(-bound, bound, generator=generator).to(base.device))
        self.up = nn.Parameter(torch.zeros(outputs, len(drawn), device=base.device))
        self.scale = nn.Parameter(scales.scale.float().clone())
        self.register_buffer("base", matrix.clone())
        self.register_buffer("zero", scales.zero.float().clone())
        self.register_buffer("bias", copied(like.bias))
        self.activation = None if activation is None else LearnedTimedInput(activation)
        self.grid, self.shape = grid, base.shape
        # In a list, so that the full-precision layer is no part of this one.
        self._like: list[Any] = [like]

    @property
    def merged(self) -> Tensor:
        """(out, features), W_0 + B A."""
        return torch.addmm(self.base, self.up, self.down) if len(self.down) else self.base

    @property
    def weight(self) -> Tensor:
        """Q_w(W_0 + B A) in the shape of the layer's weight."""
        largest = self.grid.format.largest
        return straight_through(self.merged, self.scale, self.zero, largest).view(self.shape)

    def inputs(self, x: Tensor) -> Tensor:
        """Q_a(x)."""
        return x if self.activation is None else self.activation(x)

    def finished(self) -> Quantized:
        """The quantized layer as it is now, in float32."""
        with torch.no_grad():
            scales = Scales(self.scale.detach().clone(), self.zero.clone())
            rounded = snap(self.merged.view(self.shape).flatten(1), self.grid, scales)
            weight = unlast(rounded, self.shape, self.grid)
        activation = None if self.activation is None else self.activation.fixed()
        stored, bias = (self.grid, scales), copied(self.bias)
        (like,) = self._like
        if isinstance(like, nn.Conv2d):
            return QuantizedConv2d(like, weight, bias, activation=activation, stored=stored)
        return QuantizedLinear(weight, bias, activation=activation, stored=stored)


class MergedLinear(MergedLayer):
    """A linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(self.inputs(x), self.weight, self.bias)


class MergedConv2d(MergedLayer):
    """A convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, height, width) -> (N, out, height', width')."""
        (like,) = self._like
        x, padding = self.inputs(x), like.padding
        if like.padding_mode != "zeros":
            x = F.pad(x, list(like._reversed_padding_repeated_twice), mode=like.padding_mode)
            padding = (0, 0)
        weight = self.weight
        return F.conv2d(x, weight, self.bias, like.stride, padding, like.dilation, like.groups)


def merged_layer(like: nn.Module, *arguments: object, **named: object) -> MergedLayer:
    """A :class:`MergedLinear` or :class:`MergedConv2d`, whichever ``like`` is."""
    kind = MergedConv2d if isinstance(like, nn.Conv2d) else MergedLinear
    return kind(like, *arguments, **named)  # type: ignore[arg-type]
