"""Scales for inputs, fixed beforehand from what entered a layer during calibration."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, fit

Search = Literal["absmax", "mse", "percentile"]


class RunningRange:
    """Smallest and largest value of a stream of batches, averaged with momentum.

    m <- momentum m + (1 - momentum) min(batch), the same for the maximum; the first batch as it is.
    The range is widened to contain zero. Q-Diffusion and MixDQ use momentum 0.95, in the order of
    the calls; momentum 0 keeps the extremes of all batches.

    Args:
        momentum: in [0, 1).
        split: features before and from this one on have ranges of their own; None is one range.

    >>> found = RunningRange(0.5)
    >>> found.add(torch.tensor([[-1.0, 3.0]]))
    >>> found.add(torch.tensor([[-2.0, 5.0]]))
    >>> found.low.tolist(), found.high.tolist()
    ([-1.5], [4.0])

    """

    def __init__(self, momentum: float = 0.95, split: int | None = None) -> None:
        if not 0 <= momentum < 1:
            raise QuantizationError(f"momentum must be in [0, 1), got {momentum}.")
        self.momentum, self.split = momentum, split
        self.low = self.high = torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """Take in a batch (..., features).

        Raises:
            QuantizationError: NaN or infinity in it.

        """
        parts = _halves(x, self.split)
        low = torch.stack([p.min() for p in parts]).float().cpu()
        high = torch.stack([p.max() for p in parts]).float().cpu()
        if not bool(torch.isfinite(low + high).all()):
            raise QuantizationError(
                "what enters this layer holds NaN or infinity. Calibrate in float32 or bfloat16."
            )
        if not len(self.low):
            self.low, self.high = low, high
        elif self.momentum == 0:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low = self.momentum * self.low + (1 - self.momentum) * low
            self.high = self.momentum * self.high + (1 - self.momentum) * high

    def quantizer(self, bits: int) -> StaticInput:
        """Rounds on these ranges: s = (max - min) / (2^b - 1), z = round(-min / s).

        Raises:
            QuantizationError: nothing was added.

        """
        if not len(self.low):
            raise QuantizationError("no batch was seen, so there is no range to round on.")
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
        return StaticInput(bits, scale, (-low / scale).round(), self.split)


def searched(
    x: Tensor, bits: int, search: Search, *, exponent: float = 2.0, split: int | None = None
) -> StaticInput:
    """Scales for inputs like these, found by :func:`evenkeel.quantizers.numbers.scales.fit` on all of them.

    Args:
        x: (..., features), what entered the layer.
        bits: 2 to 8.
        search: ``absmax`` (smallest to largest), ``mse`` or ``percentile``; see ``Grid.range``.
        exponent: of the error in the mse search; Q-Diffusion uses 2.4.
        split: see :class:`RunningRange`.

    Raises:
        QuantizationError: NaN or infinity, or a setting out of range.

    >>> round(255 * searched(torch.linspace(-1, 2, 50)[None], 8, "absmax").scale.item(), 4)
    3.0

    """
    grid = Grid(
        Integer(bits, signed=False),
        per_tensor=True,
        zero_point=True,
        range=search,
        exponent=exponent,
    )
    found: list[Scales] = [fit(part.reshape(1, -1), grid) for part in _halves(x, split)]
    scale = torch.cat([f.scale.reshape(1) for f in found]).float()
    zero = torch.cat([f.zero.reshape(1) for f in found if f.zero is not None]).float()
    return StaticInput(bits, scale, zero, split)


def _halves(x: Tensor, split: int | None) -> list[Tensor]:
    return [x] if split is None else [x[..., :split], x[..., split:]]
