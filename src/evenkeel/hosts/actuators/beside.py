"""Adapters beside the layers of a denoiser, whatever computes these layers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.corrections.base import Correction
from evenkeel.errors import Incompatible
from evenkeel.hosts.actuators.head_rows import border, sizes
from evenkeel.hosts.actuators.keyworded import keyworded
from evenkeel.hosts.pipeline.fingerprint import BESIDE
from evenkeel.hosts.pipeline.pipelines import forget_graphs, uncompiled
from evenkeel.hosts.scheduler.groups import Turn
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.low_rank.factors import LayerAdapter


class Beside(Interceptor):
    """Adds every adapter's output to its layer's between ``attach`` and ``detach``.

    A forward hook of each layer does it: no module is exchanged and no weight is touched, so that the
    state dict, offloading hooks and other adapters stay what they are.

    Args:
        correction: with adapters, see ``Correction.beside``.
        denoiser: whose layers they stand beside.

    Raises:
        Incompatible: a layer is missing, or of another size.

    """

    on_denoiser = True
    on_steps = False
    correction: Correction

    def __init__(self, correction: Correction, denoiser: nn.Module) -> None:
        self.correction = correction
        self._denoiser = weakref.ref(denoiser)
        self._handles: list[Any] = []
        for adapter in correction.beside:
            layer_beside(denoiser, adapter)

    def __getstate__(self) -> dict[str, Any]:
        # A copied scheduler must not take a copy of the denoiser along: it adds nothing.
        return {**self.__dict__, "_denoiser": None, "_handles": []}

    def attach(self) -> None:
        """Add from now on."""
        denoiser = self._denoiser() if self._denoiser is not None else None
        if denoiser is None or self._handles:
            return
        self._handles = attach(denoiser, self.correction.beside, self.turn)

    def detach(self) -> None:
        """Add no longer; the layers compute what they did, bit for bit."""
        denoiser = self._denoiser() if self._denoiser is not None else None
        detach(denoiser, self._handles)
        self._handles = []


@contextmanager
def with_adapters(denoiser: nn.Module, correction: Correction) -> Iterator[nn.Module]:
    """Inside, the denoiser has these adapters and is recognised as another one than without.

    Whatever is measured or fitted inside is so for the denoiser with its adapters.

    Raises:
        Incompatible: a layer is missing, or of another size; or it has adapters already.

    """
    model = uncompiled(denoiser)
    if getattr(model, BESIDE, ""):
        raise Incompatible(
            f"this {type(model).__name__} has adapters already; put all of them in one correction: "
            f"Composite((first, second))."
        )
    handles = attach(denoiser, correction.beside)
    if correction.beside:
        setattr(model, BESIDE, correction.digest()[:16])
    try:
        yield denoiser
    finally:
        detach(denoiser, handles)
        if hasattr(model, BESIDE):
            delattr(
                model, BESIDE
            )  # it is the network that it was, to whoever looks at its attributes


def attach(
    denoiser: nn.Module, adapters: Sequence[LayerAdapter], turn: Turn | None = None
) -> list[Any]:
    """Hooks that add the adapters' outputs; ``detach`` restores the denoiser.

    With ``turn`` they do so in its calls only, without in all of them.

    Raises:
        Incompatible: a layer is missing, or of another size.

    """
    layers = [layer_beside(denoiser, adapter) for adapter in adapters]
    if adapters:
        forget_graphs(denoiser, *uncompiled(denoiser).modules())
    return [
        layer.register_forward_hook(_Addition(adapter, layer, turn), with_kwargs=True)
        for adapter, layer in zip(adapters, layers, strict=True)
    ]


def detach(denoiser: nn.Module | None, handles: Sequence[Any]) -> None:
    """Take off what ``attach`` gave."""
    for handle in handles:
        handle.remove()
    if handles and denoiser is not None:
        forget_graphs(denoiser, *uncompiled(denoiser).modules())


def layer_beside(denoiser: nn.Module, adapter: LayerAdapter) -> nn.Module:
    """The layer that an adapter belongs to.

    Raises:
        Incompatible: this denoiser has no such layer, or one of another size.

    """
    model = uncompiled(denoiser)
    layer: Any = dict(model.named_modules()).get(adapter.name)
    expected = (adapter.up.width, adapter.down.width)
    found = None if layer is None else shape_of(layer)
    if found != expected:
        raise Incompatible(
            f"an adapter of {expected} (outputs, features) stands beside {adapter.name!r}; "
            f"{type(model).__name__} has "
            f"{'no such layer' if found is None else f'one of {found} there'}. It was made for another "
            f"network."
        )
    return layer  # type: ignore[no-any-return]


def shape_of(layer: Any) -> tuple[int, int] | None:
    """Outputs and features (in_channels x kernel) of a linear layer or an ungrouped 2D convolution.

    >>> shape_of(nn.Conv2d(3, 4, 3)), shape_of(nn.Linear(5, 6)), shape_of(nn.ReLU())
    ((4, 27), (6, 5), None)

    """
    if all(hasattr(layer, key) for key in ("in_features", "out_features")):
        return int(layer.out_features), int(layer.in_features)
    if not all(hasattr(layer, key) for key in ("in_channels", "out_channels", "kernel_size")):
        return None
    kernel = sizes(layer.kernel_size)
    plain = getattr(layer, "groups", 1) == 1 and not getattr(layer, "transposed", False)
    if len(kernel) != 2 or not plain:
        return None
    return int(layer.out_channels), int(layer.in_channels) * kernel[0] * kernel[1]


class _Addition:
    """A forward hook: the layer's output plus ``up^T (down x)``, computed in the input's dtype.

    Factors stay packed in memory as in their file; their values are made when they are used. Where no
    gradient is asked for, the output is added to in place: another tensor of its size costs more than the
    products.
    """

    def __init__(self, adapter: LayerAdapter, layer: Any, turn: Turn | None) -> None:
        self.adapter, self.convolution = adapter, hasattr(layer, "in_channels")
        self._turn, self.is_dead = turn, False
        self._on: dict[torch.device, LayerAdapter] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Beside a copied or pickled layer it is silent until the copy's own correction takes over.
        silent = {} if self._turn is None else {"_turn": Turn(), "is_dead": True}
        return {**self.__dict__, "_on": {}, **silent}

    def __deepcopy__(self, memo: Any) -> _Addition:
        return copy.copy(self)  # nobody writes to the factors

    @keyworded
    def __call__(
        self, layer: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> Tensor:
        if self._turn is not None and not self._turn.here():
            return output
        x = input_of(arguments, named)
        down, up = (f.dense(x.dtype) for f in self._factors(x.device))
        if not self.convolution:
            inner = F.linear(x, down)
            own = output is not x and not output.requires_grad and output.is_contiguous()
            if not own or inner.requires_grad or output.dtype != x.dtype:
                return output + F.linear(inner, up.T).to(output.dtype)
            output.view(-1, output.shape[-1]).addmm_(inner.flatten(0, -2), up)
            return output
        kernel = sizes(layer.kernel_size)
        mode = str(layer.padding_mode)
        padded = F.pad(x, border(layer, kernel), mode="constant" if mode == "zeros" else mode)
        down = down.reshape(len(down), x.shape[1], *kernel)
        stride, dilation = sizes(layer.stride), sizes(layer.dilation)
        inner = F.conv2d(padded, down, stride=stride, dilation=dilation)
        return output + F.conv2d(inner, up.T[:, :, None, None]).to(output.dtype)

    def _factors(self, device: torch.device) -> tuple[Any, Any]:
        if device not in self._on:
            self._on[device] = self.adapter.to(device)
        found = self._on[device]
        return found.down, found.up


def input_of(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What a layer was called with, by position or by name."""
    found = arguments[0] if arguments else next(iter(named.values()))
    assert isinstance(found, Tensor)
    return found
