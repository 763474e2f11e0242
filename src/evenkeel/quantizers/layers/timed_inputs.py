"""Inputs that are rounded on scales of their own at each sampling step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.told_timestep import spread, told
from evenkeel.quantizers.numbers.formats import Integer, wide
from evenkeel.quantizers.rounding.straight_through import straight_through


class TimedInput(nn.Module):
    """All values are rounded on one scale per sampling step; what lies outside is clipped.

    x_q = s_t (clip(round(x / s_t) + z_t, 0, 2^b - 1) - z_t)  (temporal activation quantization of
    EfficientDM, arXiv:2310.03270). t is the timestep that the denoiser is told: one that has no entry takes
    that of the nearest. Rows of one batch may be told different ones.

    Args:
        bits: 2 to 8.
        levels: told timesteps, each once, in any order.
        scale: (levels,), positive, float32.
        zero: codes of zero, same shape; not necessarily whole numbers, as they are learned.

    Raises:
        QuantizationError: a scale that is not positive and finite, or shapes that do not fit.

    """

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, levels: Sequence[float], scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        expected = (len(levels),)
        if tuple(scale.shape) != expected or tuple(zero.shape) != expected:
            raise QuantizationError(
                f"expected scale and zero of shape {expected}, one per told timestep, got "
                f"{tuple(scale.shape)} and {tuple(zero.shape)}."
            )
        if not levels or len(set(levels)) < len(levels):
            raise QuantizationError(f"told timesteps must differ from each other, got {levels}.")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise QuantizationError(f"scales must be positive and finite, got {scale.tolist()}.")
        self.format = Integer(bits, signed=False)
        self.levels = tuple(map(float, levels))
        self._keep(scale, zero)

    def _keep(self, scale: Tensor, zero: Tensor) -> None:
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @property
    def bits(self) -> int:
        """Of one value."""
        return self.format.bits

    @property
    def group(self) -> None:
        """There is none; the scales do not depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) -> the same shape and dtype."""
        units, entry = wide(x), told().entry(self.levels)
        scale, zero = (spread(t.to(units), entry, x) for t in (self.scale, self.zero))
        steps = (units / scale).round_().add_(zero).clamp_(0, self.format.largest).sub_(zero)
        return (steps * scale).to(x.dtype)

    def as_dict(self) -> dict[str, Any]:
        """In types that JSON knows; ``input_from`` is the inverse, given the tensors."""
        return {"kind": "timed", "bits": self.bits, "levels": list(self.levels)}

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        return f"{self.format.name}, {len(self.levels)} steps"


class LearnedTimedInput(TimedInput):
    """The same while scales and zeros are learned, with the gradients of ``straight_through``."""

    def __init__(self, start: TimedInput) -> None:
        super().__init__(start.bits, start.levels, start.scale.clone(), start.zero.clone())

    def _keep(self, scale: Tensor, zero: Tensor) -> None:
        self.scale, self.zero = nn.Parameter(scale), nn.Parameter(zero)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) -> the same shape; float32."""
        entry = told().entry(self.levels)
        scale, zero = spread(self.scale, entry, x), spread(self.zero, entry, x)
        return straight_through(x, scale, zero, self.format.largest)

    def fixed(self) -> TimedInput:
        """As it is now."""
        scale, zero = (t.detach().clone() for t in (self.scale, self.zero))
        return TimedInput(self.bits, self.levels, scale, zero)
