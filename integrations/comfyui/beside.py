"""What is added to the output of layers while a model of ComfyUI computes, and to no weight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import Incompatible

APPLY_MODEL = "apply_model"  # comfy.patcher_extension.WrappersMP.APPLY_MODEL
Addition = Callable[[nn.Module, Tensor], "Tensor | None"]


def layer_of(diffusion_model: nn.Module, name: str, shape: tuple[int, int]) -> nn.Module:
    """The layer of that name and of (outputs, inputs) as given.

    Raises:
        Incompatible: there is none, or one of another size.

    """
    try:
        layer = diffusion_model.get_submodule(name)
    except AttributeError:
        layer = None
    found = None if layer is None else _shape(layer)
    if layer is None or found != shape:
        raise Incompatible(
            f"expected a layer {name!r} of {shape} (outputs, inputs) in this "
            f"{type(diffusion_model).__name__}, found {found or 'none'}: the file was made for another "
            f"model. Load the model that it was made for."
        )
    return layer


def _shape(layer: Any) -> tuple[int, int] | None:
    if hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)
    if not hasattr(layer, "out_channels"):
        return None
    area = 1
    for side in layer.kernel_size:
        area *= int(side)
    return int(layer.out_channels), int(layer.in_channels) * area


class LowRank:
    """``strength up (down x)``, of a linear layer or a convolution; computed in the input's dtype."""

    def __init__(self, down: Tensor, up: Tensor, strength: float) -> None:
        self._factors, self._strength = (down, up), strength
        self._at: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """What is added to the output."""
        key = (x.device, x.dtype)
        if key not in self._at:
            down, up = (f.to(x.device, x.dtype) for f in self._factors)
            self._at[key] = down, up * self._strength
        down, up = self._at[key]
        if down.dim() == 2:
            return F.linear(F.linear(x, down), up)
        inner = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        return F.conv2d(inner, up)


@contextmanager
def attached(diffusion_model: nn.Module, additions: Mapping[str, Addition]) -> Iterator[None]:
    """Inside, in this thread, the layers' outputs have something added.

    Hooks live as long as one call of the model: another workflow on the same weights sees none of it,
    and a model without the node is bit for bit what it was.
    """
    thread = threading.get_ident()

    def hook_of(addition: Addition) -> Any:
        def hook(layer: nn.Module, arguments: Any, named: Any, output: Tensor) -> Tensor:
            if threading.get_ident() != thread:
                return output
            added = addition(layer, arguments[0] if arguments else next(iter(named.values())))
            return output if added is None else output + added.to(output.dtype)

        return hook

    handles = [
        diffusion_model.get_submodule(name).register_forward_hook(hook_of(a), with_kwargs=True)
        for name, a in additions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_compiled(transformer_options: Mapping[str, Any]) -> None:
    """Hooks that come after torch.compile are not seen by its graphs.

    Raises:
        Incompatible: the model is compiled.

    """
    wrappers = transformer_options.get("wrappers", {}).get(APPLY_MODEL, {})
    if any("compile" in str(key) for key in wrappers):
        raise Incompatible(
            "the model is compiled, and a compiled graph leaves out what stands beside a layer. Take the "
            "node that compiles the model out of the workflow."
        )


def add_once(model: Any, kind: str, key: str, wrapper: Any) -> None:
    """Wrap this model's calls; a second time under the same key is refused.

    Raises:
        Incompatible: the same file is applied already.

    """
    if model.wrappers.get(kind, {}).get(key):
        raise Incompatible(
            f"{key} is applied to this model already: one node is enough. Take the second one out."
        )
    model.add_wrapper_with_key(kind, key, wrapper)
