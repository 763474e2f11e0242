"""diffusers' layerwise casting: weights kept as float8 and widened before each call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evenkeel.hosts.backends.base import Backend, dtype_text


class Casting(Backend):
    """An ordinary layer with a weight of one byte per number."""

    name = "casting"

    def owns(self, layer: Any) -> bool:
        weight: Any = getattr(layer, "weight", None)
        if type(weight) not in (Tensor, nn.Parameter):
            return False
        dtype = weight.dtype
        return bool(dtype.itemsize == 1 and dtype.is_floating_point)

    def format(self, layer: Any) -> str:
        return dtype_text(layer.weight.dtype)
