"""Which layers may be replaced in a network, and how one is."""

from __future__ import annotations

from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer


def swap(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a layer in place of another, also where that is shared under several names.

    >>> net = nn.Sequential(nn.ReLU())
    >>> swap(net, net[0], nn.Tanh())
    >>> net[0]
    Tanh()

    """
    for owner in list(network.modules()):
        for name, inner in list(owner._modules.items()):
            if inner is old:
                owner._modules[name] = new


def refuse_quantized(network: nn.Module) -> None:
    """Raise where something was quantized before.

    Raises:
        QuantizationError: names the layer.

    """
    for name, part in network.named_modules():
        if isinstance(part, QuantizedLayer):
            raise QuantizationError(
                f"{name!r} is quantized already; quantizing its rounded weights again would be "
                "measured against the wrong original. Start from the full-precision module."
            )


def refuse_irreplaceable(name: str, layer: nn.Module) -> None:
    """Raise where replacing a layer would lose something.

    Raises:
        QuantizationError: it has hooks, or its weights are elsewhere.

    """
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        raise QuantizationError(
            f"{name!r} has hooks (offloading, a profiler, an adapter?) that its replacement would "
            "lose. Quantize before they are attached, or remove them first."
        )
    if any(tensor.is_meta for tensor in layer.parameters()):
        raise QuantizationError(
            f"The weights of {name!r} are not loaded (device 'meta'). Load the model completely, "
            "without offloading, before quantizing."
        )
