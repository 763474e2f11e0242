"""Weights that accelerate keeps elsewhere until a layer is called."""

from __future__ import annotations

from torch import Tensor, nn

from evenkeel.errors import UnsupportedPipeline


def present(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, read from where sequential or disk offloading keeps it if it is not here.

    Only this one is read: a network of which no more than a layer fits can be gone through.

    Args:
        module: the network.
        name: dotted name of the tensor in it.
        tensor: what the network has there; on the meta device while offloaded.

    Raises:
        UnsupportedPipeline: it is on the meta device and no hook has it.

    """
    if tensor.device.type != "meta":
        return tensor
    path, _, leaf = name.rpartition(".")
    layer = dict(module.named_modules()).get(path)  # parts of a tensor subclass are in none
    hook = getattr(layer, "_hf_hook", None)
    for found in getattr(hook, "hooks", (hook,)):
        weights = getattr(found, "weights_map", None)
        if weights is not None:
            kept: Tensor = weights[leaf]
            return kept
    raise UnsupportedPipeline(
        f"{name} of {type(module).__name__} is on the meta device and no offloading hook keeps it; load "
        f"the weights first, or offload with accelerate (enable_sequential_cpu_offload, disk_offload)."
    )
