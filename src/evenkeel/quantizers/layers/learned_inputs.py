"""Static scales of inputs that are learned by gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evenkeel.quantizers.layers.input_quantizers import StaticInput


class LearnedInput(StaticInput):
    """A static rounding of inputs whose scale can be learned: s = s_0 exp(u), u from 0.

    Rounding passes gradients through, clipping stops them (LSQ, arXiv:1902.08153). Q-Diffusion's code
    learns s itself; its logarithm makes the step relative, so that the result does not depend on
    the units of the input and s stays positive.

    >>> found = LearnedInput(StaticInput(4, torch.tensor([0.5]), torch.tensor([8.0])))
    >>> found(torch.tensor([1.2])).tolist(), found.fixed().scale.tolist()
    ([1.0], [0.5])

    """

    def __init__(self, start: StaticInput) -> None:
        super().__init__(start.bits, start.scale.clone(), start.zero.clone(), start.split)
        self.log_ratio = nn.Parameter(torch.zeros_like(start.scale))

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> the same shape and dtype."""
        scale, zero = self.scale * self.log_ratio.exp(), self.zero
        if self.split is not None:
            sizes = torch.tensor([self.split, x.shape[-1] - self.split], device=x.device)
            scale, zero = scale.repeat_interleave(sizes), zero.repeat_interleave(sizes)
        units = x / scale
        codes = units + (units.round() - units).detach() + zero
        return ((codes.clamp(0, self.format.largest) - zero) * scale).to(x.dtype)

    def fixed(self) -> StaticInput:
        """With the scale as it is now."""
        with torch.no_grad():
            scale = self.scale * self.log_ratio.exp()
        return StaticInput(self.bits, scale.detach().clone(), self.zero.clone(), self.split)


class InputScales:
    """Adam on the scales of inputs, with a rate that falls to zero as a cosine."""

    def __init__(self, inputs: Sequence[LearnedInput], rate: float, iterations: int) -> None:
        self._adam = torch.optim.Adam([i.log_ratio for i in inputs], lr=rate)
        self._rate = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, iterations)

    def step(self) -> None:
        """One step along the gradients, which are then forgotten."""
        self._adam.step()
        self._adam.zero_grad()
        self._rate.step()
