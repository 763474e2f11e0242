"""Recovery adapters beside a quantized denoiser's layers while they are trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from evenkeel.hosts.actuators.beside import attach
from evenkeel.hosts.pipeline.pipelines import uncompiled
from evenkeel.low_rank.factors import Factor, LayerAdapter, on_grid, rounded
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer

_CONTAINER = "evenkeel_adapters"


class LearnedFactor(nn.Module):
    """One factor that is learned; used as it will be stored, the gradient passes rounding straight through.

    Args:
        start: what it begins with.
        zero: begin with zeros instead; ``start`` then gives shape, bits and size.

    """

    def __init__(self, start: Factor, *, zero: bool = False) -> None:
        super().__init__()
        values = start.dense()
        self.size = float(values.square().mean().sqrt())
        self.values = nn.Parameter(torch.zeros_like(values) if zero else values)
        self.bits, self.width = start.bits, start.width

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(r, n), the values of the packed factor."""
        with torch.no_grad():
            found = on_grid(self.values, self.bits)
        through: Tensor = _Through.apply(self.values, found)  # type: ignore[no-untyped-call]
        return through.to(dtype)

    def packed(self) -> Factor:
        """As it is now."""
        return rounded(self.values.detach(), self.bits)


class LearnedAdapter(nn.Module):
    """A ``LayerAdapter`` that is learned."""

    def __init__(self, start: LayerAdapter, *, zero: bool) -> None:
        super().__init__()
        self.name, self.kernel = start.name, start.kernel
        self.down, self.up = LearnedFactor(start.down), LearnedFactor(start.up, zero=zero)

    def packed(self) -> LayerAdapter:
        """As it is now."""
        return LayerAdapter(self.name, self.down.packed(), self.up.packed(), self.kernel)


class AdaptersBeside:
    """A copy of a quantized denoiser, differentiable in adapters beside its layers.

    Nothing but the adapters' factors takes gradients; those with respect to a layer's input pass the
    rounding of our own layers' inputs straight through.

    Args:
        quantized: not changed.
        adapters: where the factors begin.
        zero: begin with adapters that add nothing, of the same shapes.

    """

    def __init__(
        self, quantized: nn.Module, adapters: Sequence[LayerAdapter], *, zero: bool
    ) -> None:
        self.network = copy.deepcopy(uncompiled(quantized)).eval().requires_grad_(False)
        device = next(iter([*self.network.parameters(), *self.network.buffers()])).device
        self.adapters = [LearnedAdapter(a, zero=zero).to(device) for a in adapters]
        for part in list(self.network.modules()):
            if isinstance(part, QuantizedLayer) and part.activation is not None:
                part.activation.register_forward_hook(_straight)
        attach(self.network, self.adapters)  # type: ignore[arg-type]
        self.network.add_module(_CONTAINER, nn.ModuleList(self.adapters))

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameters; a factor's rate is relative to the size that its values have, or would have."""
        factors = [f for a in self.adapters for f in (a.down, a.up)]
        return [{"params": [f.values], "lr": rate * f.size} for f in factors]

    def settle(self) -> None:
        """Nothing has bounds."""

    def finished(self) -> nn.Module:
        """The network itself: it computes with the packed factors' values already."""
        return self.network

    def packed(self) -> tuple[LayerAdapter, ...]:
        """The adapters as they are now."""
        return tuple(a.packed() for a in self.adapters)


class _Through(Function):
    """The second of two tensors, the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None]:
        return given[0], None


def _straight(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
    """A forward hook of what rounds an input."""
    if not given[0].requires_grad:
        return None
    found: Tensor = _Through.apply(given[0], out.detach())  # type: ignore[no-untyped-call]
    return found
