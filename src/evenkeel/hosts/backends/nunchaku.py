"""nunchaku, and diffusers' loader for its checkpoints: SVDQuant and AWQ in packed weights.

Read as the sources lay the layers out; the kernels need a GPU and were not run.
"""

from __future__ import annotations

from typing import Any

from evenkeel.hosts.backends.base import Backend, comes_from, joined, written


class Nunchaku(Backend):
    """Recognised by ``qweight`` in a layer of either package."""

    name = "nunchaku"

    def owns(self, layer: Any) -> bool:
        places = ("nunchaku", "diffusers.quantizers.nunchaku")
        return any(comes_from(layer, place) for place in places) and hasattr(layer, "qweight")

    def format(self, layer: Any) -> str:
        group = getattr(layer, "group_size", None)
        if not type(layer).__name__.startswith("SVDQ"):
            return joined("awq-int4", g=group)
        precision = getattr(layer, "precision", "int4")
        return joined(f"svdq-{precision}", g=group, r=getattr(layer, "rank", None), a=4)

    def settings(self, module: Any) -> str:
        if not self.owns(module) or not hasattr(module, "precision"):
            return ""
        # The scale of a whole nvfp4 weight is a plain number in one loader, a parameter in the other.
        keys = ("precision", "act_unsigned", "wtscale")
        return written({key: vars(module).get(key) for key in keys})

    def hidden(self, module: Any) -> str:
        if not type(vars(module).get("m")).__module__.startswith("nunchaku._C"):
            return ""
        return (
            "inside a C++ object of nunchaku, so this denoiser cannot be told from another one. Load "
            "it with NunchakuFluxTransformer2DModelV2, or with diffusers' own nunchaku loader."
        )
