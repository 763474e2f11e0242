"""Linear and convolution layers that compute as if their operands were integers.

The simulation keeps the dequantized weight in the model's own dtype and rounds activations on the
fly, so it shows what quantization does to the picture and nothing of what it does to the speed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.low_rank import best_low_rank
from evenkeel.quantizers.spec import QuantizerSpec
from evenkeel.quantizers.uniform import fake_quantize, quantize_weight


class QuantizedLinear(nn.Module):
    """x -> Q_a(x) W_q^T + b + (x down^T) up^T, the last term only with a low-rank branch.

    W_q = Q_w(W - up down). The branch sees the activation before rounding and stays in the model's
    dtype. All tensors are buffers: inference only. Activation values are not checked; NaN spreads.

    Args:
        weight: (out, in), already dequantized.
        bias: (out,), or None.
        down: (rank, in), or None.
        up: (out, rank), or None.
        activation_bits: 4 to 8, or 16 for not quantized.
        activation_group: features per activation scale; None is one scale per token.

    >>> layer = nn.Linear(8, 3)
    >>> QuantizedLinear.of(layer, QuantizerSpec(4, 8, group=4))
    QuantizedLinear(in_features=8, out_features=3, bias=True, activation=8 bits/4, rank=0)

    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
        *,
        activation_bits: int = 16,
        activation_group: int | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activation_bits = activation_bits
        self.activation_group = activation_group
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    @classmethod
    def of(cls, layer: nn.Linear, spec: QuantizerSpec, name: str = "linear") -> QuantizedLinear:
        """Quantize one layer; it is not changed and shares no memory with the result.

        Raises:
            QuantizationError: NaN or infinity in the weight, or a rank that leaves no residual.

        """
        weight = layer.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        down = up = None
        if spec.rank:
            down, up = _branch(weight, spec.rank, name)
            # The factors as they are stored: the residual also absorbs their own rounding.
            wide = wide - up.to(wide.dtype) @ down.to(wide.dtype)
        rounded = quantize_weight(wide, spec.weight_bits, spec.group, f"The weight of {name!r}")
        return cls(
            rounded.to(weight.dtype, copy=True),
            _copied(layer.bias),
            down,
            up,
            activation_bits=spec.activation_bits,
            activation_group=spec.activation_group,
        )

    @property
    def rank(self) -> int:
        """Width of the low-rank branch; 0 without one."""
        return 0 if self.down is None else self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rounded = x
        if self.activation_bits != 16:
            rounded = fake_quantize(x, self.activation_bits, self.activation_group)
        y = F.linear(rounded, self.weight, self.bias)
        if self.down is not None and self.up is not None:
            y = y + F.linear(F.linear(x, self.down), self.up)
        return y

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {_activation(self)}, rank={self.rank}"
        )


class QuantizedConv2d(nn.Module):
    """A convolution whose filters are rounded, and whose input is rounded at every pixel.

    Activation groups run along the channels of one pixel; with ``activation_group`` None a pixel
    has one scale. There is no low-rank branch. All tensors are buffers: inference only.

    Args:
        like: the layer whose geometry (stride, padding, dilation, groups) is taken over.
        weight: (out, in / groups, height, width), already dequantized.
        bias: (out,), or None.
        activation_bits: 4 to 8, or 16 for not quantized.
        activation_group: channels per activation scale; None is one scale per pixel.

    >>> layer = nn.Conv2d(4, 6, 3, padding=1)
    >>> QuantizedConv2d.of(layer, QuantizerSpec(4, 8))(torch.zeros(1, 4, 5, 5)).shape
    torch.Size([1, 6, 5, 5])

    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        like: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation_bits: int = 16,
        activation_group: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.kernel_size, self.stride = like.kernel_size, like.stride
        self.padding, self.dilation = like.padding, like.dilation
        self.groups, self.padding_mode = like.groups, like.padding_mode
        # F.pad's order, last dimension first; used by the modes that F.conv2d does not know.
        self._border: list[int] = list(like._reversed_padding_repeated_twice)
        self.activation_bits = activation_bits
        self.activation_group = activation_group
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, layer: nn.Conv2d, spec: QuantizerSpec, name: str = "conv2d") -> QuantizedConv2d:
        """Quantize one layer; it is not changed and shares no memory with the result.

        Raises:
            QuantizationError: NaN or infinity in the weight.

        """
        weight = layer.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        group = weight_group(layer, spec)
        rounded = quantize_weight(wide, spec.weight_bits, group, f"The weight of {name!r}")
        return cls(
            layer,
            rounded.to(weight.dtype, copy=True),
            _copied(layer.bias),
            activation_bits=spec.activation_bits,
            activation_group=spec.activation_group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, height, width) -> (N, out, height', width'); the batch may be missing."""
        if self.activation_bits != 16:
            last = fake_quantize(x.movedim(-3, -1), self.activation_bits, self.activation_group)
            x = last.movedim(-1, -3).contiguous()
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._border, mode=self.padding_mode), (0, 0)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, groups={self.groups}, "
            f"bias={self.bias is not None}, {_activation(self)}"
        )


def weight_group(layer: nn.Module, spec: QuantizerSpec) -> int | None:
    """Weights per scale in this layer; grouped convolutions have one scale per output channel.

    A depthwise filter sees one channel: groups of one weight would store more scales than codes.

    >>> weight_group(nn.Conv2d(4, 4, 3, groups=4), QuantizerSpec(4)) is None
    True
    """
    return None if isinstance(layer, nn.Conv2d) and layer.groups > 1 else spec.group


def _branch(weight: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    if rank >= min(weight.shape):
        raise QuantizationError(
            f"The weight of {name!r} is {tuple(weight.shape)}: a branch of rank {rank} would carry "
            "all of it and leave nothing to quantize. Lower the rank, or add the layer to `skip`."
        )
    try:
        left, right = best_low_rank(weight, rank)
    except QuantizationError as error:
        raise QuantizationError(f"The weight of {name!r}: {error}") from error
    return right.to(weight.dtype), left.to(weight.dtype)


def _copied(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def _activation(layer: QuantizedLinear | QuantizedConv2d) -> str:
    if layer.activation_bits == 16:
        return "activation=16 bits"
    return f"activation={layer.activation_bits} bits/{layer.activation_group or 'token'}"
