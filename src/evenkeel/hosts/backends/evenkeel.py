"""Our own quantizers, which simulate: layers that hold rounded weights in full precision."""

from __future__ import annotations

from typing import Any

from evenkeel.hosts.backends.base import Backend, comes_from, joined, written

_TIMED = "evenkeel.quantizers.layers.timed_inputs"


class Evenkeel(Backend):
    """Its layers say everything by their tensors and by the text that the denoiser carries."""

    name = "evenkeel"

    def owns(self, layer: Any) -> bool:
        return comes_from(layer, "evenkeel.quantizers")

    def format(self, layer: Any) -> str:
        stored = getattr(layer, "stored", None)
        bits = getattr(getattr(stored[0], "format", None), "bits", None) if stored else None
        activation = getattr(layer, "activation_bits", 16)
        return joined(
            f"int{bits}" if bits else "simulated",
            r=getattr(layer, "rank", 0) or None,
            a=activation if activation != 16 else None,
        )

    def settings(self, module: Any) -> str:
        """Of inputs with scales for each sampling step, the timesteps that these belong to."""
        return written(getattr(module, "levels", "")) if comes_from(module, _TIMED) else ""
