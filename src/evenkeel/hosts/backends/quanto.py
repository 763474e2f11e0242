"""optimum-quanto: wrapped weights once frozen, plain ones before; inputs in qint8 or qfloat8."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evenkeel.hosts.backends.base import Backend, comes_from, joined, number, written


class Quanto(Backend):
    """Recognised by ``weight_qtype``, which its modules have."""

    name = "quanto"

    def owns(self, layer: Any) -> bool:
        return comes_from(layer, "optimum.quanto") and hasattr(layer, "weight_qtype")

    def format(self, layer: Any) -> str:
        weight, activation = layer.weight_qtype, getattr(layer, "activation_qtype", None)
        if weight is None and activation is None:
            return ""
        group = getattr(layer, "weight_group_size", None)
        text = joined(getattr(weight, "name", "none"), g=group)
        frozen = weight is None or type(layer.weight) not in (Tensor, nn.Parameter)
        text = text if frozen else f"{text}-unfrozen"
        return joined(text, a=number(getattr(activation, "name", "")))

    def settings(self, module: Any) -> str:
        if not self.owns(module):
            return ""
        keys = ("weight_qtype", "weight_group_size", "activation_qtype")
        return written({key: getattr(module, key, None) for key in keys})
