"""Rounding with the gradients of LSQ: straight through inside the range, to scale and zero at its ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_INSIDE = 1e-4  # of a code: the ends of the range belong to it


def straight_through(x: Tensor, scale: Tensor, zero: Tensor, largest: float) -> Tensor:
    """x_q = s (clamp(round(x / s) + z, 0, n) - z), differentiable.

    With r = round(x / s) + z inside 0 .. n:  dx_q/dx = 1,  dx_q/ds = round(x / s) - x / s,  dx_q/dz = 0;
    clipped:  dx_q/dx = 0,  dx_q/ds = clamp(r) - z,  dx_q/dz = -s  (LSQ, arXiv:1902.08153, Eq. 3; LSQ+,
    arXiv:2004.09576, Eq. 7). The zero need not be a whole number.

    Args:
        x: float32.
        scale: positive, shape that broadcasts over ``x``.
        zero: codes of zero, the shape of ``scale``.
        largest: n = 2^b - 1.

    Returns:
        The shape of ``x``; the same bits as ``StaticInput`` and ``snap`` give.

    >>> x, s = torch.tensor([0.6, 9.0], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    >>> out = straight_through(x, s, torch.tensor([8.0]), 15)
    >>> out.sum().backward()
    >>> out.tolist(), x.grad.tolist(), round(s.grad.item(), 4)
    ([0.5, 3.5], [1.0, 0.0], 6.8)

    """
    found: Tensor = _Rounding.apply(x, scale, zero, largest)  # type: ignore[no-untyped-call]
    return found


class _Rounding(Function):
    """Few operations without masks: comparisons are the slowest of the elementwise ones on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, largest: float) -> Tensor:
        units = x / scale
        codes = units.round().add_(zero)
        steps = codes.clamp(0, largest).sub_(zero)
        ctx.largest = largest
        ctx.save_for_backward(units, codes, steps, scale)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = given
        units, codes, steps, scale = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(g, codes, -_INSIDE, ctx.largest + _INSIDE)
        of_scale = of_zero = None
        if ctx.needs_input_grad[1]:
            of_scale = _summed(torch.addcmul(g * steps, inside, units, value=-1), scale)
        if ctx.needs_input_grad[2]:
            of_zero = _summed(inside - g, scale) * scale
        return inside if ctx.needs_input_grad[0] else None, of_scale, of_zero, None


def _summed(found: Tensor, like: Tensor) -> Tensor:
    """Over whatever ``like`` was spread over."""
    return found.sum().reshape(like.shape) if like.numel() == 1 else found.sum_to_size(like.shape)
