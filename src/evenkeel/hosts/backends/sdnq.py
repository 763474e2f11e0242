"""SDNQ: codes, scales and low-rank factors as parameters, the rest in a dequantizer."""

from __future__ import annotations

from typing import Any

from evenkeel.hosts.backends.base import Backend, joined, number, written


class SDNQ(Backend):
    """Recognised by ``sdnq_dequantizer``, which says everything."""

    name = "sdnq"

    def owns(self, layer: Any) -> bool:
        return hasattr(layer, "sdnq_dequantizer")

    def format(self, layer: Any) -> str:
        how = layer.sdnq_dequantizer
        rank = how.svd_rank if getattr(layer, "svd_up", None) is not None else None
        group = how.group_size if how.group_size and how.group_size > 0 else None
        activation = how.quantized_matmul_dtype if how.use_quantized_matmul else None
        return joined(str(how.weights_dtype), g=group, r=rank, a=number(str(activation)))

    def settings(self, module: Any) -> str:
        return written(vars(module.sdnq_dequantizer)) if self.owns(module) else ""
