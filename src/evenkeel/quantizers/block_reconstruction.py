"""Rounding learned one block at a time: what is fitted is what the block puts out.

BRECQ (arXiv:2102.05426) with AdaRound (arXiv:2004.10568) inside, as Q-Diffusion and PTQ4DiT use it:
inputs come from the copy quantized so far, targets from the full-precision denoiser, so a block
also learns to undo some of what the blocks before it did.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.adaround import SoftRounding, temperature
from evenkeel.quantizers.blocks import Unit
from evenkeel.quantizers.calibration_set import mapped, tensors_in
from evenkeel.quantizers.grids import Grid, Scales, last, snap, unlast
from evenkeel.quantizers.inputs import StaticInput
from evenkeel.quantizers.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, copied
from evenkeel.quantizers.workspace import BlockCall, Workspace

ROWS = 4096


@dataclass(frozen=True)
class Learning:
    """How long and how fast something is learned.

    Attributes:
        iterations: minibatches; 0 learns nothing.
        rounding_rate: of Adam on the rounding of weights; 0 leaves it.
        input_rate: of Adam on the logarithms of input scales, falling to 0 as a cosine; 0 leaves
            them.
        batch_size: rows in a minibatch.
        regularization: weight of the term that drives the rounding to 0 or 1.
        exponent: p of the loss, the mean over positions of the sum over features of |error|^p.

    Raises:
        QuantizationError: a value out of range.

    """

    iterations: int
    rounding_rate: float = 0.0
    input_rate: float = 0.0
    batch_size: int = 32
    regularization: float = 0.01
    exponent: float = 2.0

    def __post_init__(self) -> None:
        whole = {"iterations": (self.iterations, 0), "batch_size": (self.batch_size, 1)}
        for name, (value, least) in whole.items():
            if type(value) is not int or value < least:
                raise QuantizationError(
                    f"{name} must be an integer of at least {least}, got {value!r}."
                )
        for name in ("rounding_rate", "input_rate", "regularization"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise QuantizationError(f"{name} must be finite and not negative, got {value!r}.")
        if not 0 < self.exponent < math.inf:
            raise QuantizationError(f"exponent must be positive, got {self.exponent!r}.")


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


@dataclass(frozen=True)
class WeightPlan:
    """How one layer's weight is laid on a grid: W diag(smoothing) on ``grid`` with ``scales``."""

    grid: Grid
    scales: Scales
    smoothing: Tensor | None = None
    split: int | None = None


class Examples:
    """Calls of a block and the outputs it should give, for minibatches.

    Rows of different calls are mixed where every tensor has the batch as its first dimension, or is
    the same in all calls, and the block gives the same outputs for mixed rows (tried once);
    otherwise a minibatch is a whole call: one batch at one time step.

    Args:
        calls: what enters the block in the copy quantized so far, with what it puts out.
        targets: what the full-precision block puts out, one nest a call.
        block: the block that gave ``calls``, for the trial.

    Raises:
        QuantizationError: the block puts out no floating point tensor.

    """

    def __init__(self, calls: Sequence[BlockCall], targets: Sequence[Any], block: nn.Module) -> None:
        given = [(call.arguments, call.keywords) for call in calls]
        wanted = [_outputs(target) for target in targets]
        if not wanted or not wanted[0]:
            raise QuantizationError(
                f"{type(block).__name__} puts out no floating point tensor to fit. Skip its layers."
            )
        self.mixed = _mixes(given, [_outputs(call.output) for call in calls], block)
        if self.mixed:
            given, wanted = [_stacked(given)], [[torch.cat(t) for t in zip(*wanted, strict=True)]]
        self._given, self._wanted = given, wanted
        self.rows = len(wanted[0][0]) if self.mixed else len(wanted)

    def all(self, size: int) -> Iterator[tuple[Any, list[Tensor]]]:
        """Every example once, in order."""
        step = size if self.mixed else 1
        for start in range(0, self.rows, step):
            yield self._at(torch.arange(start, min(start + step, self.rows)))

    def some(self, size: int, generator: torch.Generator) -> tuple[Any, list[Tensor]]:
        """A minibatch: ``size`` different rows, or one call."""
        order = torch.randperm(self.rows, generator=generator)
        return self._at(order[: size if self.mixed else 1])

    def _at(self, index: Tensor) -> tuple[Any, list[Tensor]]:
        if not self.mixed:
            given, wanted = self._given[int(index)], self._wanted[int(index)]
        else:
            given = _rows(self._given[0], index, self.rows)
            wanted = [t[index.to(t.device)] for t in self._wanted[0]]
        return mapped(given, _wide), [_wide(t) for t in wanted]


class BlockTrial:
    """A copy of one block in which rounding is learned; the workspace is not changed.

    It starts with weights rounded to the nearest and inputs that are not rounded. All of it is
    computed in float32 (or wider), whatever the model's dtype.

    Args:
        workspace: what the unit is part of.
        unit: the block or layer.
        plans: for each layer of the unit, the grid of its weight.
        seed: of the minibatches, together with the unit's name.

    Attributes:
        layers: the quantized layers, by name.

    """

    def __init__(
        self, workspace: Workspace, unit: Unit, plans: Mapping[str, WeightPlan], seed: int = 0
    ) -> None:
        targets = [call.output for call in workspace.block_calls(unit.name, "original")]
        part = workspace.quantized.get_submodule(unit.name)
        self.examples = Examples(workspace.block_calls(unit.name, "quantized"), targets, part)
        self._originals = {name: workspace.layers[name] for name in unit.layers}
        self._keys = {name: name[len(unit.name) + 1 :] for name in unit.layers}
        self.roundings: dict[str, SoftRounding] = {}
        self.layers: dict[str, QuantizedLayer] = {}
        self._plans = dict(plans)
        self.block = _widened(copy.deepcopy(part))
        for name, layer in self._originals.items():
            weight = _wide(layer.get_parameter("weight").detach())
            plan = plans[name]
            if plan.smoothing is not None:
                weight = weight * plan.smoothing.reshape(-1, *[1] * (weight.ndim - 2))
            self.roundings[name] = SoftRounding(weight, plan.grid, plan.scales)
            laid = snap(last(weight, plan.grid), plan.grid, plan.scales)
            rounded = unlast(laid, weight.shape, plan.grid)
            self.layers[name] = quantized_like(layer, rounded, plan)
            self.block = _exchanged(self.block, self._keys[name], _widened(self.layers[name]))
        self._generator = torch.Generator().manual_seed(seed + zlib.crc32(unit.name.encode()))

    def objective(self, learning: Learning, weights: Mapping[str, Tensor] | None = None) -> float:
        """The loss over all examples without the regularizer, with hard (or these) weights."""
        total, count = 0.0, 0
        with torch.no_grad():
            for given, wanted in self.examples.all(learning.batch_size):
                found = self._run(given, weights or {})
                total += float(_loss(found, wanted, learning.exponent)) * len(wanted[0])
                count += len(wanted[0])
        return total / count

    def learn(self, learning: Learning) -> tuple[float, float]:
        """Learn weight rounding, input scales or both, and keep what was learned if it is better.

        Returns:
            The objective before and after; the second is never larger.

        """
        before = self.objective(learning)
        inputs = self._inputs() if learning.input_rate else {}
        roundings = self.roundings if learning.rounding_rate else {}
        if not learning.iterations or not (inputs or roundings):
            return before, before
        self._descend(learning, list(roundings.values()), list(inputs.values()))
        hard = {self._keys[n]: r.hard().detach() for n, r in roundings.items()}
        after = self.objective(learning, hard)
        if not after < before:
            for found in inputs.values():
                found.log_ratio.data.zero_()
            return before, before
        for name in roundings:
            self.layers[name].weight = hard[self._keys[name]]
        return before, after

    def observe(self, see: Callable[[str, Tensor, Tensor], None], batch_size: int = 32) -> None:
        """Run all examples and hand over each layer's name, input and output."""

        def hook_of(name: str) -> Callable[..., None]:
            return lambda _, given, out: see(name, given[0], out)

        hooks = [m.register_forward_hook(hook_of(n)) for n, m in self.layers.items()]
        try:
            with torch.no_grad():
                for given, _ in self.examples.all(batch_size):
                    self._run(given, {})
        finally:
            for hook in hooks:
                hook.remove()

    def round_inputs(self, found: Mapping[str, StaticInput]) -> None:
        """From now on layers round what enters them; the scales can be learned."""
        for name, start in found.items():
            self.layers[name].activation = LearnedInput(start)

    def finished(self) -> dict[str, QuantizedLayer]:
        """New layers in the model's own dtype, without anything left to learn."""
        made = {}
        for name, original in self._originals.items():
            layer = self.layers[name]
            activation = layer.activation
            fixed = activation.fixed() if isinstance(activation, LearnedInput) else None
            made[name] = quantized_like(original, layer.weight, self._plans[name], fixed)
        return made
