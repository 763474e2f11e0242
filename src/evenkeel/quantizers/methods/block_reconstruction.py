"""Rounding learned one block at a time: what is fitted is what the block puts out.

BRECQ (arXiv:2102.05426) with AdaRound (arXiv:2004.10568) inside, as Q-Diffusion and PTQ4DiT use it:
inputs come from the copy quantized so far, targets from the full-precision denoiser, so a block
also learns to undo some of what the blocks before it did. Where the calibration set has teachers, targets
come from their calls, inputs from the students'.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.blocks import Unit
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.layers.learned_inputs import InputScales, LearnedInput
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    copied,
)
from evenkeel.quantizers.methods.block_examples import Examples, floats_in, widened
from evenkeel.quantizers.numbers.formats import wide
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales
from evenkeel.quantizers.rounding.adaround import Reconstruction, SoftRounding, reconstruct
from evenkeel.quantizers.workspace.workspace import Workspace

ROWS, BATCH = 4096, 32


@dataclass(frozen=True)
class Learning:
    """How long and how fast something is learned.

    Attributes:
        iterations: minibatches; 0 learns nothing.
        rounding_rate: of Adam on the rounding of weights.
        input_rate: of Adam on the logarithms of input scales, falling as a cosine; 0 leaves them.
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
        for name, least in (("iterations", 0), ("batch_size", 1)):
            if type(found := getattr(self, name)) is not int or found < least:
                raise QuantizationError(f"{name} is an integer of at least {least}, got {found!r}.")
        for name in ("rounding_rate", "input_rate", "regularization"):
            if not 0 <= (found := getattr(self, name)) < math.inf:
                raise QuantizationError(f"{name} is finite and not negative, got {found!r}.")
        if not 0 < self.exponent < math.inf:
            raise QuantizationError(f"exponent must be positive, got {self.exponent!r}.")


@dataclass(frozen=True)
class WeightPlan:
    """How one layer's weight is laid on a grid: W diag(smoothing) on ``grid`` with ``scales``."""

    grid: Grid
    scales: Scales
    smoothing: Tensor | None = None


class BlockTrial:
    """A copy of one block in which rounding is learned; the workspace is not changed.

    It starts with weights rounded to the nearest and inputs that are not rounded. All of it is
    computed in float32 (or wider), whatever the model's dtype.

    Args:
        workspace: what the unit is part of.
        unit: the block or layer.
        plans: for each layer of the unit, the grid of its weight.
        seed: of the minibatches, together with the unit's name.

    """

    def __init__(
        self, workspace: Workspace, unit: Unit, plans: Mapping[str, WeightPlan], seed: int = 0
    ) -> None:
        targets = workspace.block_targets(unit.name)
        part = workspace.quantized.get_submodule(unit.name)
        self.examples = Examples(workspace.block_calls(unit.name, "quantized"), targets, part)
        self._generator = torch.Generator().manual_seed(seed + zlib.crc32(unit.name.encode()))
        self._originals = {name: workspace.layers[name] for name in unit.layers}
        self._plans = plans
        self._block = widened(copy.deepcopy(part))
        self._layers: dict[str, QuantizedLayer] = {}
        self._roundings: dict[str, SoftRounding] = {}
        for name, layer in self._originals.items():
            key, plan, weight = (
                name[len(unit.name) + 1 :],
                plans[name],
                planned(layer, plans[name].smoothing),
            )
            rounding = SoftRounding(weight, plan.grid, plan.scales)
            rounding.mode = "nearest"
            self._roundings[f"{key}.weight".lstrip(".")] = rounding
            self._layers[name] = widened(quantized_like(layer, rounding(), plan))
            self._block = _exchanged(self._block, key, self._layers[name])

    def learn_rounding(self, learning: Learning) -> Reconstruction | None:
        """Learn which weights are rounded up; with ``input_rate`` the scales of inputs as well.

        Kept only where the objective over all examples is lower than before.

        Returns:
            None for 0 iterations.

        """
        if not learning.iterations:
            return None
        before = self.objective(learning)
        inputs = self._scales(learning) if learning.input_rate else None

        def loss(index: Tensor) -> Tensor:
            if inputs is not None:
                inputs.step()  # with the gradients of the batch before
            return self._loss(index, learning)

        with torch.enable_grad():
            found = reconstruct(
                loss,
                list(self._roundings.values()),
                self.examples.some(learning.batch_size, self._generator),
                learning.iterations,
                objective=lambda: self.objective(learning),
                rate=learning.rounding_rate,
                weight=learning.regularization,
            )
        if min(found.learned, found.nearest) > before:  # then the scales of inputs got worse
            for rounding in self._roundings.values():
                rounding.reset()
            for scale in self._inputs:
                scale.log_ratio.data.zero_()
            found = replace(found, kept="nearest")
        return replace(found, nearest=before)

    def learn_inputs(self, learning: Learning) -> tuple[float, float]:
        """Learn the scales of inputs alone; kept only where the objective falls.

        Returns:
            The objective before and after.

        """
        before = self.objective(learning)
        if not (learning.iterations and self._inputs):
            return before, before
        inputs = self._scales(learning)
        batches = self.examples.some(learning.batch_size, self._generator)
        with torch.enable_grad():
            for _ in range(learning.iterations):
                self._loss(next(batches), learning).backward()  # type: ignore[no-untyped-call]
                inputs.step()
        after = self.objective(learning)
        if after < before:
            return before, after
        for scale in self._inputs:
            scale.log_ratio.data.zero_()
        return before, before

    def objective(self, learning: Learning) -> float:
        """The loss over all examples without the regularizer, as the block is now."""
        total, count = 0.0, 0
        with torch.no_grad():
            for index in self.examples.all(learning.batch_size):
                total += float(self._loss(index, learning)) * len(index)
                count += len(index)
        return total / count

    def inputs(self) -> dict[str, Tensor]:
        """What enters each layer and is to be rounded, by name: (about 4096 rows, features)."""
        share = -(-ROWS // sum(1 for _ in self.examples.all(BATCH)))
        found: dict[str, list[Tensor]] = {name: [] for name in self._layers}

        def see(name: str, x: Tensor, _: Tensor) -> None:
            rows = self.rows_of(name, x)
            index = torch.linspace(0, len(rows) - 1, min(share, len(rows)), device=x.device)
            found[name].append(rows[index.long()].clone())

        self.observe(see)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def rows_of(self, name: str, x: Tensor) -> Tensor:
        """What enters a layer as (rows, features), smoothed; channels of a convolution are features."""
        layer = self._layers[name]
        rows = (x.movedim(-3, -1) if isinstance(layer, QuantizedConv2d) else x).flatten(0, -2)
        return rows if layer.smoothing is None else rows / layer.smoothing

    def output_errors(self) -> dict[str, float]:
        """||Q(x) - F(x)|| / ||F(x)|| of each layer over all examples, F in full precision."""
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in self._layers}

        def see(name: str, x: Tensor, out: Tensor) -> None:
            layer = self._originals[name]
            exact = wide(layer(x.to(layer.get_parameter("weight").dtype)))
            off = torch.stack([(out - exact).square().sum(), exact.square().sum()])
            sums[name] += off.cpu().double()

        self.observe(see)
        return {
            name: float((off / size).sqrt()) if size > 0 else 0.0
            for name, (off, size) in sums.items()
        }

    def observe(self, see: Callable[[str, Tensor, Tensor], None]) -> None:
        """Run all examples and hand over each layer's name, input and output, batch by batch."""

        def hook_of(name: str) -> Callable[..., None]:
            return lambda _, given, out: see(name, given[0], out)

        hooks = [m.register_forward_hook(hook_of(n)) for n, m in self._layers.items()]
        try:
            with torch.no_grad():
                for index in self.examples.all(BATCH):
                    self._outputs(index)
        finally:
            for hook in hooks:
                hook.remove()

    def round_inputs(self, found: Mapping[str, StaticInput]) -> None:
        """From now on these layers round what enters them; the scales can be learned."""
        for name, start in found.items():
            self._layers[name].activation = LearnedInput(start)

    def finished(self) -> dict[str, QuantizedLayer]:
        """New layers in the model's own dtype, without anything left to learn."""
        made = {}
        weights = zip(self._layers.items(), self._roundings.values(), strict=True)
        for (name, layer), rounding in weights:
            found = layer.activation
            fixed = found.fixed() if isinstance(found, LearnedInput) else None
            like, plan = self._originals[name], self._plans[name]
            made[name] = quantized_like(like, rounding().detach(), plan, fixed)
        return made

    @property
    def _inputs(self) -> list[LearnedInput]:
        found = [layer.activation for layer in self._layers.values()]
        return [a for a in found if isinstance(a, LearnedInput)]

    def _scales(self, learning: Learning) -> InputScales:
        return InputScales(self._inputs, learning.input_rate, learning.iterations)

    def _outputs(self, index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        (arguments, keywords), wanted = self.examples.at(index)
        weights = {key: rounding() for key, rounding in self._roundings.items()}
        return floats_in(functional_call(self._block, weights, arguments, keywords)), wanted

    def _loss(self, index: Tensor, learning: Learning) -> Tensor:
        found, wanted = self._outputs(index)
        parts = [
            (f - w).abs().pow(learning.exponent).sum(1 if f.ndim > 3 else -1).mean()
            for f, w in zip(found, wanted, strict=True)
        ]
        return torch.stack(parts).sum()


def planned(layer: nn.Module, smoothing: Tensor | None = None) -> Tensor:
    """The weight that is rounded: (out, in, ...) times ``smoothing`` along in, float32."""
    weight = wide(layer.get_parameter("weight").detach())
    if smoothing is None:
        return weight
    return weight * wide(smoothing).reshape(-1, *[1] * (weight.ndim - 2))


def quantized_like(
    layer: nn.Module, weight: Tensor, plan: WeightPlan, activation: StaticInput | None = None
) -> QuantizedLayer:
    """A quantized layer with the geometry, bias and dtype of this one."""
    like = layer.get_parameter("weight")
    rounded, bias = weight.to(like.dtype, copy=True), copied(layer.bias)  # type: ignore[arg-type]
    rest: dict[str, Any] = {
        "activation": activation,
        "smoothing": plan.smoothing,
        "stored": (plan.grid, plan.scales),
    }
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(layer, rounded, bias, **rest)
    return QuantizedLinear(rounded, bias, **rest)


def _exchanged(block: nn.Module, key: str, new: nn.Module) -> nn.Module:
    """The block with a new layer wherever it refers to the one of that name."""
    if not key:
        return new
    old = block.get_submodule(key)
    for owner in list(block.modules()):
        for name, inner in list(owner._modules.items()):
            if inner is old:
                owner._modules[name] = new
    return block
