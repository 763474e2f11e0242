"""AdaRound: learn for every weight whether it is rounded up or down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import Integer, wide
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, last, snap, spread, unlast

Mode = Literal["soft", "hard", "nearest"]

# The sigmoid is stretched beyond [0, 1], so that it reaches both ends where it has a slope.
ZETA, GAMMA = 1.1, -0.1


class SoftRounding(nn.Module):
    """A weight that moves continuously between the two grid values around it.

    codes = clamp(floor(w / scale) + h(alpha) + zero),  h = clip(sigmoid(alpha)(1.1 + 0.1) - 0.1, 0, 1)
    (Nagel et al., arXiv:2004.10568, the rectified sigmoid). alpha starts where the soft weight is
    the weight itself, inside the range of the grid.

    Calling the module returns the weight of its ``mode``: "soft" (differentiable in ``alpha``),
    "hard" (up where alpha >= 0) or "nearest" (what plain rounding gives, whatever alpha).

    Args:
        weight: (out, in), or (out, in, height, width) for a convolution; finite.
        grid: integers, with or without zero point.
        scales: of ``last(weight, grid)``, from ``snap_weight`` or ``fit``.

    Attributes:
        alpha: the only parameter, in the layout of ``last(weight, grid)``.
        mode: which weight a call returns; "soft" at first.

    Raises:
        QuantizationError: not an integer format, NaN or infinity, or scales of another shape.

    >>> grid = Grid(Integer(4))
    >>> rounding = SoftRounding(torch.tensor([[7.0, 2.6]]), grid, Scales(torch.tensor([[1.0]])))
    >>> rounding.soft(), rounding.hard()
    (tensor([[7.0000, 2.6000]], grad_fn=<ViewBackward0>), tensor([[7., 3.]]))

    """

    floor: Tensor
    scale: Tensor
    zero: Tensor | None
    plain: Tensor

    def __init__(self, weight: Tensor, grid: Grid, scales: Scales) -> None:
        super().__init__()
        if not isinstance(grid.format, Integer):
            raise QuantizationError(
                f"AdaRound chooses between neighbouring integers, got the grid {grid}. Use an "
                "integer format, or another rounding for this one."
            )
        if not bool(torch.isfinite(weight).all()):
            raise QuantizationError("The weight to round holds NaN or infinity. Load it again.")
        self.mode: Mode = "soft"
        self.grid, self.shape = grid, weight.shape
        x = wide(last(weight.detach(), grid))
        scale, zero = spread(scales, grid, x.shape)
        floor = (x / scale).floor()
        rest = x / scale - floor
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1))
        self.register_buffer("floor", floor if zero is None else floor + zero)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("plain", snap(x, grid, scales))

    def forward(self) -> Tensor:
        """The weight of the mode, in the shape of the original."""
        if self.mode == "soft":
            return self.soft()
        return self.hard() if self.mode == "hard" else self.nearest()

    def up(self) -> Tensor:
        """How much of a step each weight is rounded up, 0 to 1: h(alpha).

        >>> SoftRounding(torch.tensor([[7.0, 2.6]]), Grid(Integer(4)),
        ...              Scales(torch.tensor([[1.0]]))).up().detach().round(decimals=4)
        tensor([[0.0000, 0.6000]])
        """
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft(self) -> Tensor:
        """The weight in between, with a gradient for alpha."""
        return self._weight(self.up())

    def hard(self) -> Tensor:
        """The weight on the grid, up where alpha >= 0; no gradient."""
        return self._weight((self.alpha.detach() >= 0).to(self.floor.dtype))

    def nearest(self) -> Tensor:
        """The weight rounded to the nearest, as :func:`evenkeel.quantizers.numbers.scales.snap` does it."""
        return unlast(self.plain, self.shape, self.grid)

    def reset(self) -> None:
        """Set alpha so that the hard weight is the nearest one."""
        zero = 0 if self.zero is None else self.zero
        code = (self.plain / self.scale).round() + zero
        with torch.no_grad():
            # Far enough for a decided h. Codes beyond floor .. floor + 1 saturate either way.
            self.alpha.copy_(torch.where(code > self.floor, 4.0, -4.0))

    def regularizer(self, beta: float) -> Tensor:
        """What pushes h to 0 or 1: sum of 1 - |2 h - 1|^beta; flat for large beta.

        Returns:
            0-dimensional, from 0 (all decided) to the number of weights.

        """
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def _weight(self, up: Tensor) -> Tensor:
        # The clamp is not the grid's own: it must let the gradient through.
        codes = (self.floor + up).clamp(self.grid.format.lowest, self.grid.format.largest)
        values = (codes if self.zero is None else codes - self.zero) * self.scale
        return unlast(values, self.shape, self.grid)


def temperature(
    step: int, iterations: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0
) -> float:
    """The beta of the regularizer: ``start`` during the warm-up, then a straight line to ``end``.

    The paper anneals without a formula; the line is that of the released code of BRECQ and
    Q-Diffusion.

    >>> [temperature(step, 100) for step in (0, 20, 60, 100)]
    [20.0, 20.0, 11.0, 2.0]
    """
    first = warmup * iterations
    if step < first or iterations <= first:
        return start
    return end + (start - end) * max(0.0, 1 - (step - first) / (iterations - first))


def random_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of ``size`` different indices out of ``count``, each drawn anew.

    Raises:
        QuantizationError: nothing to draw from.

    >>> next(random_batches(5, 2, torch.Generator().manual_seed(0))).shape
    torch.Size([2])

    """
    if count < 1 or size < 1:
        raise QuantizationError(f"Batches need samples, got {size} out of {count}.")

    def draw() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(count, generator=generator, device=generator.device)
            yield order[:size]

    return draw()


@dataclass(frozen=True)
class Reconstruction:
    """What learning the rounding brought, on the objective over all the data.

    ``losses``: the batch loss at every iteration, without the regularizer. ``nearest`` and
    ``learned``: the objective with plain and with learned rounding. ``kept``: which one the
    roundings now have.
    """

    losses: tuple[float, ...]
    nearest: float
    learned: float
    kept: Literal["learned", "nearest"]


def reconstruct(
    forward: Callable[[Tensor], Tensor],
    roundings: Sequence[SoftRounding],
    batches: Iterator[Tensor],
    iterations: int,
    *,
    objective: Callable[[], float],
    rate: float = 1e-3,
    weight: float = 0.01,
    warmup: float = 0.2,
) -> Reconstruction:
    """Learn several roundings together, and keep them only if they beat the nearest.

    Adam on all alpha of  forward(batch) + weight * sum of regularizers,  the regularizer only
    after the warm-up. At the end the objective over all the data, with the weights as they will
    be used, decides between learned and nearest rounding: never worse than nearest. Afterwards
    every rounding is in mode "hard".

    Args:
        forward: the loss of one batch of indices; it takes its weights by calling the roundings.
            The regularizer is a sum over weights, so the loss is best a sum over outputs, averaged
            over samples (and positions).
        roundings: what to learn.
        batches: index tensors, such as :func:`random_batches`.
        iterations: steps of Adam; the papers take 10 000 to 20 000.
        objective: the loss over all the data, called without gradient in modes "nearest" and
            "hard".
        rate: step size of Adam.
        weight: of the regularizer.
        warmup: share of the iterations without regularizer.

    Returns:
        The history and the two objectives.

    Raises:
        QuantizationError: nothing to learn, or a loss or objective that is not finite.

    >>> w, x = torch.tensor([[1.4, 1.4]]), torch.ones(4, 2)
    >>> grid = Grid(Integer(4))
    >>> rounding = SoftRounding(w, grid, Scales(torch.tensor([[1.0]])))
    >>> def loss(batch=slice(None)):
    ...     return (x[batch] @ (rounding() - w).T).square().sum(1).mean()
    >>> draws = random_batches(4, 2, torch.Generator().manual_seed(0))
    >>> found = reconstruct(loss, [rounding], draws, 50, objective=lambda: loss().item())
    >>> found.learned <= found.nearest
    True

    """
    if not roundings or iterations < 1:
        raise QuantizationError(
            f"Reconstruction needs roundings and iterations, got {len(roundings)} and {iterations}."
        )
    _switch(roundings, "soft")
    optimizer = torch.optim.Adam([r.alpha for r in roundings], lr=rate)
    losses = []
    for step in range(iterations):
        loss = forward(next(batches))
        losses.append(loss.detach())
        if step >= warmup * iterations:
            beta = temperature(step, iterations, warmup)
            for rounding in roundings:
                loss = loss + weight * rounding.regularizer(beta)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    history = tuple(torch.stack(losses).tolist())
    nearest = _objective(objective, roundings, "nearest")
    learned = _objective(objective, roundings, "hard")
    if not all(v == v and abs(v) != float("inf") for v in (*history, nearest, learned)):
        raise QuantizationError(
            f"The loss of the reconstruction is not finite (last batch {history[-1]}, nearest "
            f"{nearest}, learned {learned}). Compute it in float32, and check the calibration data."
        )
    if learned > nearest:
        for rounding in roundings:
            rounding.reset()
    return Reconstruction(history, nearest, learned, "nearest" if learned > nearest else "learned")


def _switch(roundings: Sequence[SoftRounding], mode: Mode) -> None:
    for rounding in roundings:
        rounding.mode = mode


def _objective(
    objective: Callable[[], float], roundings: Sequence[SoftRounding], mode: Mode
) -> float:
    _switch(roundings, mode)
    with torch.no_grad():
        return float(objective())
