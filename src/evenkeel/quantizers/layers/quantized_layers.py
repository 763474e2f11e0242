"""Linear and convolution layers that compute as if their operands were of few bits.

The simulation keeps the dequantized weight in the model's own dtype and rounds activations on the
fly, so it shows what quantization does to the picture and nothing of what it does to the speed.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import Input
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales

Stored = tuple[Grid, Scales]
EXTRA = "_extra_state"  # torch's name for what a state dict holds of a layer beside its tensors
_SCALES, _SAID = ("scale", "zero", "unit"), "said"
_JOINING = (torch.cat, torch.concat, torch.concatenate, torch.stack, Tensor.copy_)


class _OnItsGrid(Tensor):
    """What a layer shows of its weight: an ordinary tensor to whoever reads it.

    Who fuses an adapter (peft, diffusers) assigns to ``data``, and who fuses projections joins weights or
    copies them into a plain layer: both are told why that is refused.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _JOINING and _among(cls, args):
            raise QuantizationError(
                "the weights of quantized layers cannot be joined or copied into a plain layer "
                "(fuse_qkv_projections): how their inputs are rounded, smoothing and low-rank branches "
                "would be lost. Fuse the full-precision network and quantize that, or leave it unfused."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """A copy, so that nothing is changed before the refusal."""
        return self.detach().clone().as_subclass(_OnItsGrid)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise QuantizationError(
            "an adapter cannot be fused into a quantized weight: the sum lies on no grid of few bits, and "
            "quantized again it loses most of what the adapter brings. Leave it beside the layer (no "
            "fuse_lora, merge or merge_and_unload), or fuse it into the full-precision network and "
            "quantize that."
        )


def _among(kind: type, args: Any) -> bool:
    """Whether one of what is joined, or what is copied, is of this class."""
    given = args[0] if args and isinstance(args[0], (list, tuple)) else args[1:2]
    return any(isinstance(part, kind) for part in given)


class QuantizedLayer(nn.Module):
    """What quantized linear and convolution layers have in common. All tensors are buffers.

    Its subclasses are linear layers and convolutions to ``isinstance``, so that peft and diffusers put
    LoRAs beside them; fusing one into the weight is refused.

    In the state dict of a network every layer has an entry more than its tensors, which says how they are
    to be read: no plain layer takes them for its own.

    ``stored`` tells which grid the weight lies on, so that files hold codes; None where nobody
    knows, or where the weight was not rounded. It is checked when the layer is written.
    """

    weight: Tensor
    bias: Tensor | None
    smoothing: Tensor | None
    activation: Input | None
    _extra_state = None  # diffusers looks for whatever a state dict holds

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: Input | None,
        smoothing: Tensor | None,
        stored: Stored | None,
    ) -> None:
        nn.Module.__init__(self)  # and not the layer's, which would draw weights
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("smoothing", smoothing)
        self.activation = activation
        self.stored = stored

    def __getattr__(self, name: str) -> Any:
        found: Any = nn.Module.__getattr__(self, name)
        plain = type(found) is Tensor  # a subclass has ways of its own
        return found.as_subclass(_OnItsGrid) if name == "weight" and plain else found

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, nn.Parameter):
            raise QuantizationError(
                "the weight of a quantized layer is on its grid already, and another backend (torchao's "
                "quantize_?) puts its own in place. Quantize the full-precision network, or leave these "
                "layers out of it."
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As every module does; but numbers of 8 bits (layerwise casting) cannot hold a grid of others."""
        weight = self._held
        given = fn(weight.new_empty(1))
        if given.is_floating_point() and given.element_size() == 1 < weight.element_size():
            fn = partial(Tensor.to, device=given.device)
        return nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]

    # ---- what a state dict says of it

    def description(self) -> Tensor:
        """How its tensors are to be read, with the scales of its weight: bytes of a safetensors file."""
        grid = None if self.stored is None else self.stored[0].as_dict()
        activation = None if self.activation is None else self.activation.as_dict()
        said = json.dumps({"grid": grid, "activation": activation}, sort_keys=True)
        scales = () if self.stored is None else astuple(self.stored[1])
        kept = {
            name: t.detach().cpu().contiguous()
            for name, t in zip(_SCALES, scales, strict=False)
            if t is not None
        }
        text = torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8)
        return torch.frombuffer(bytearray(save({_SAID: text, **kept})), dtype=torch.uint8)

    def set_description(self, found: Tensor) -> None:
        """Take over what ``description`` gave.

        Raises:
            QuantizationError: it is of a layer that rounds its input otherwise, or damaged.

        """
        try:
            tensors = {n: t.clone() for n, t in load(found.cpu().numpy().tobytes()).items()}
            said = json.loads(bytes(tensors.pop(_SAID).tolist()))
            theirs, grid = said["activation"], said["grid"]
            scales = None if grid is None else Scales(tensors.pop("scale"), **tensors)
            stored = None if scales is None else (Grid.from_dict(grid), scales)
        except Exception as e:
            raise QuantizationError(
                f"the description of a quantized layer cannot be read: {e}."
            ) from e
        ours = None if self.activation is None else self.activation.as_dict()
        if theirs != json.loads(json.dumps(ours)):
            raise QuantizationError(
                f"the state dict is of a layer that rounds its input as {theirs}, and this one does as "
                f"{ours}. Load it into a network that was quantized in the same way."
            )
        self.stored = stored

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix:  # of a network
            destination[f"{prefix}{EXTRA}"] = self.description()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        found = state_dict.pop(f"{prefix}{EXTRA}", None)
        if found is not None:
            self.set_description(found)
        elif prefix and strict:
            missing.append(f"{prefix}{EXTRA}")  # a plain layer's, which knows nothing of all this
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)

    @property
    def _held(self) -> Tensor:
        """The weight for those who compute with it here: the tensor itself."""
        found = self._buffers["weight"]
        assert found is not None
        return found

    @property
    def activation_bits(self) -> int:
        """Of a value that enters the product; 16 where it is not rounded."""
        return 16 if self.activation is None else self.activation.bits

    @property
    def rank(self) -> int:
        """Width of the low-rank branch; 0 without one."""
        return 0


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """x -> Q_a(x / s) W_q^T + b + (x / s down^T) up^T, the last term only with a low-rank branch.

    W_q = Q_w(W diag(s) - up down). The branch sees the activation before rounding and stays in the
    model's dtype. Inference only. Activation values are not checked; NaN spreads.

    Args:
        weight: (out, in), already dequantized.
        bias: (out,), or None.
        down: (rank, in), or None.
        up: (out, rank), or None.
        activation: how the input is rounded; None is not at all.
        smoothing: (in,) s, positive; None is 1.
        first_token: (out,) what to give for the first token of every sequence, whatever enters
            (MixDQ, arXiv:2405.17873); None treats all alike.
        stored: the grid of the weight and its scales.

    >>> QuantizedLinear(torch.ones(3, 8))
    QuantizedLinear(in_features=8, out_features=3, bias=False, rank=0)

    """

    down: Tensor | None
    up: Tensor | None
    first_token: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
        *,
        activation: Input | None = None,
        smoothing: Tensor | None = None,
        first_token: Tensor | None = None,
        stored: Stored | None = None,
    ) -> None:
        super().__init__(weight, bias, activation, smoothing, stored)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.register_buffer("first_token", first_token)

    @property
    def rank(self) -> int:
        """Width of the low-rank branch; 0 without one."""
        return 0 if self.down is None else self.down.shape[0]

    def smoothed(self, x: Tensor) -> Tensor:
        """What the branch sees: (..., in), the input over ``smoothing``."""
        return x if self.smoothing is None else x / self.smoothing

    def rounded(self, x: Tensor) -> Tensor:
        """What is multiplied by the weight: (..., in), smoothed and rounded."""
        x = self.smoothed(x)
        return x if self.activation is None else self.activation(x)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = F.linear(self.rounded(x), self._held, self.bias)
        if self.down is not None and self.up is not None:
            y = y + F.linear(F.linear(self.smoothed(x), self.down), self.up)
        if self.first_token is not None:
            y = torch.cat([self.first_token.expand_as(y[..., :1, :]), y[..., 1:, :]], dim=-2)
        return y

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}"
        )


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution whose filters are rounded, and whose input is rounded at every pixel.

    The input is divided by ``smoothing`` (in,) per channel and rounded along the channels of one
    pixel. There is no low-rank branch. Inference only.

    Args:
        like: the layer whose geometry (stride, padding, dilation, groups) is taken over.
        weight: (out, in / groups, height, width), already dequantized.
        bias: (out,), or None.
        activation: how the input is rounded, channels last; None is not at all.
        smoothing: (in,), positive; None is 1.
        stored: the grid of the weight and its scales.

    >>> old = nn.Conv2d(4, 6, 3, padding=1)
    >>> QuantizedConv2d(old, torch.ones(6, 4, 3, 3))(torch.zeros(1, 4, 5, 5)).shape
    torch.Size([1, 6, 5, 5])

    """

    def __new__(cls, like: Any = None, *arguments: Any, **named: Any) -> Any:
        """An ordinary convolution where channels are given: peft makes its own by the layer's class."""
        if isinstance(like, int):
            return nn.Conv2d(like, *arguments, **named)
        return super().__new__(cls)

    def __init__(
        self,
        like: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: Input | None = None,
        smoothing: Tensor | None = None,
        stored: Stored | None = None,
    ) -> None:
        super().__init__(weight, bias, activation, smoothing, stored)
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.kernel_size, self.stride = like.kernel_size, like.stride
        self.padding, self.dilation = like.padding, like.dilation
        self.groups, self.padding_mode = like.groups, like.padding_mode
        self.transposed, self.output_padding = False, (0, 0)
        # F.pad's order, last dimension first; used by the modes that F.conv2d does not know.
        self._reversed_padding_repeated_twice = list(like._reversed_padding_repeated_twice)

    def rounded(self, x: Tensor) -> Tensor:
        """What is convolved with the weight: (N, in, height, width), smoothed and rounded."""
        if self.activation is None and self.smoothing is None:
            return x
        last = x.movedim(-3, -1)
        if self.smoothing is not None:
            last = last / self.smoothing
        if self.activation is not None:
            last = self.activation(last)
        return last.movedim(-1, -3).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, height, width) -> (N, out, height', width'); the batch may be missing."""
        x, padding = self.rounded(x), self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return F.conv2d(x, self._held, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, groups={self.groups}, "
            f"bias={self.bias is not None}"
        )


Quantized = QuantizedLinear | QuantizedConv2d


def weight_group(layer: nn.Module, group: int | None) -> int | None:
    """Weights per scale in this layer; grouped convolutions have one scale per output channel.

    A depthwise filter sees one channel: groups of one weight would store more scales than codes.

    >>> weight_group(nn.Conv2d(4, 4, 3, groups=4), 64) is None
    True
    """
    return None if isinstance(layer, nn.Conv2d) and layer.groups > 1 else group


def copied(bias: Tensor | None) -> Tensor | None:
    """A bias that shares no memory with the original's."""
    return None if bias is None else bias.detach().clone()
