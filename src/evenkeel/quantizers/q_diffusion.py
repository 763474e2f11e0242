"""Q-Diffusion: block reconstruction of few-bit weights, and two ranges where a skip comes in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.block_examples import features_last
from evenkeel.quantizers.block_reconstruction import BlockTrial, Learning, WeightPlan
from evenkeel.quantizers.formats import Integer
from evenkeel.quantizers.grids import Grid, Scales, fit, last
from evenkeel.quantizers.inputs import StaticInput
from evenkeel.quantizers.method import Method, check_bits
from evenkeel.quantizers.spec import first_match
from evenkeel.quantizers.static_ranges import RunningRange, searched
from evenkeel.quantizers.workspace import Workspace


@dataclass(frozen=True)
class QDiffusion(Method):
    """Post-training quantization of Li et al., ICCV 2023 (arXiv:2302.04304).

    Weights: integers with zero point, one scale per output channel, AdaRound block by block against
    the full-precision block's output. Inputs: one static range per layer, the same at every time
    step; its scale is then learned. Calibration calls are uniform in time, as
    ``evenkeel.quantize`` takes them; with all of the sampler's steps the time embedding, which sees
    one input a step, meets nothing new later. All linear and convolution layers, the first, the last and the
    time embedding too. Where a residual block of a UNet reads the concatenation of hidden state and
    skip, both channel ranges have scales of their own, for inputs and weights (Eq. 7).

    Differences from the paper or its code. The operands of the attention products and the softmax
    stay as they are: only layers are quantized, so the inputs of the q, k and v projections are
    rounded and their outputs are not. The code regularizes the rounding of the first half of a
    split weight only and thresholds the second at the end; here both are regularized. The code
    rounds the inputs of no block until the weights of all blocks are learned; here a block sees the
    finished blocks before it, inputs rounded. The paper splits shortcuts; the first convolution
    reads the same concatenation (normalized), and is split too unless ``split`` says otherwise. In
    the files a split weight is a grid with equal scales in neighbouring groups.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 3 to 8, or 16.
        weight_range: ``mse`` searches 80 shrink factors for the least |error|^``exponent``;
            ``absmax`` is minimum to maximum (the paper's CIFAR models).
        activation_range: ``mse`` is the same search; ``running`` averages minimum and maximum of
            successive batches with momentum 0.95.
        exponent: of the searches and of the loss that input scales are learned with.
        iterations: minibatches per block; 0 rounds to the nearest.
        rounding_rate: of Adam. What it can reach is the product with ``iterations``, about 20: with
            few iterations raise it, for example 300 and 0.02.
        batch_size: rows per minibatch.
        regularization: weight of the AdaRound regularizer.
        activation_iterations: minibatches per block for the scales of inputs; 0 learns none.
        activation_rate: of Adam, on the logarithm of a scale (see ``LearnedInput``).
        split: ``concatenations``, ``shortcuts`` or ``none``.
        skip: name patterns of layers that stay in full precision.
        seed: of the minibatches.

    Raises:
        QuantizationError: a field out of range.

    >>> str(QDiffusion.of_bits("w3a8", iterations=300))
    'q-diffusion-w3a8-iterations=300'

    """

    name: ClassVar[str] = "q-diffusion"

    weight_bits: int = 4
    activation_bits: int = 8
    weight_range: Literal["mse", "absmax"] = "mse"
    activation_range: Literal["mse", "running"] = "mse"
    exponent: float = 2.4
    iterations: int = 20_000
    rounding_rate: float = 1e-3
    batch_size: int = 32
    regularization: float = 0.01
    activation_iterations: int = 5_000
    activation_rate: float = 4e-4
    split: Literal["concatenations", "shortcuts", "none"] = "concatenations"
    skip: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits, 3)
        if self.weight_bits == 16:
            raise QuantizationError("Q-Diffusion rounds weights: weight_bits is 2 to 8, got 16.")
        for field, allowed in (
            ("weight_range", ("mse", "absmax")),
            ("activation_range", ("mse", "running")),
            ("split", ("concatenations", "shortcuts", "none")),
        ):
            if getattr(self, field) not in allowed:
                raise QuantizationError(
                    f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}."
                )
        _ = self._rounding, self._scaling

    @property
    def grid(self) -> Grid:
        """Of a weight that is not split."""
        exponent = self.exponent if self.weight_range == "mse" else 2.0
        integer = Integer(self.weight_bits, signed=False)
        return Grid(integer, zero_point=True, range=self.weight_range, exponent=exponent)

    def quantize(self, workspace: Workspace) -> None:
        """Block by block in the order of the calls."""
        for name in workspace.open:
            pattern = first_match(name, self.skip)
            if pattern is not None:
                workspace.keep(name, f"skip pattern {pattern!r}")
        splits = self._splits(workspace.original)
        for unit in workspace.work(workspace.units(workspace.open)):
            plans = {n: self._plan(workspace.layers[n], splits.get(n)) for n in unit.layers}
            trial = BlockTrial(workspace, unit, plans, self.seed)
            found = trial.learn_rounding(self._rounding)
            if self.activation_bits != 16:
                trial.round_inputs(self._ranges(trial, {n: splits.get(n) for n in unit.layers}))
                trial.learn_inputs(self._scaling)
            nearest = found is not None and found.kept == "nearest"
            notes = {n: _note(splits.get(n), nearest) for n in unit.layers}
            errors = trial.output_errors()
            workspace.replace(unit, trial.finished(), notes=notes, output_errors=errors)

    @property
    def _rounding(self) -> Learning:
        return Learning(
            self.iterations,
            rounding_rate=self.rounding_rate,
            batch_size=self.batch_size,
            regularization=self.regularization,
        )

    @property
    def _scaling(self) -> Learning:
        return Learning(
            self.activation_iterations,
            input_rate=self.activation_rate,
            batch_size=self.batch_size,
            exponent=self.exponent,
        )

    def _splits(self, net: nn.Module) -> dict[str, int]:
        found = {} if self.split == "none" else skip_concatenations(net)
        shortcut = self.split == "shortcuts"
        return {n: at for n, at in found.items() if not shortcut or n.endswith(".conv_shortcut")}

    def _plan(self, layer: nn.Module, split: int | None) -> WeightPlan:
        weight = layer.get_parameter("weight").detach()
        if split is None:
            return WeightPlan(self.grid, fit(last(weight, self.grid), self.grid))
        return WeightPlan(*split_scales(weight, self.grid, split))

    def _ranges(self, trial: BlockTrial, splits: dict[str, int | None]) -> dict[str, StaticInput]:
        bits = self.activation_bits
        if self.activation_range == "mse":
            return {
                n: searched(x, bits, "mse", exponent=self.exponent, split=splits[n])
                for n, x in trial.inputs().items()
            }
        ranges = {n: RunningRange(0.95, at) for n, at in splits.items()}
        trial.observe(lambda name, x, _: ranges[name].add(features_last(x)))
        return {n: found.quantizer(bits) for n, found in ranges.items()}


def skip_concatenations(net: nn.Module) -> dict[str, int]:
    """Convolutions that read a hidden state and a skip connection side by side, and where they meet.

    In a diffusers UNet every residual block on the way up reads torch.cat([hidden, skip], dim=1). The
    hidden state has the channels that the residual block called before it puts out; what its first
    convolution reads beyond that is the skip.

    Args:
        net: a denoiser; without ``up_blocks`` of ``resnets`` there is nothing to find.

    Returns:
        By layer name, the number of channels of the hidden state, which come first.

    """
    channels, found = 0, dict[str, int]()
    for name, first, second in _resnets(net):
        if name.startswith("up_blocks.") and 0 < channels < first.in_channels:
            layers = (f"{name}.conv1", f"{name}.conv_shortcut")
            found |= {n: channels for n, _ in net.named_modules() if n in layers}
        channels = second.out_channels
    return found


def split_scales(weight: Tensor, grid: Grid, split: int) -> tuple[Grid, Scales]:
    """Two scales per output channel, for input channels before and from ``split`` on.

    Files know grids of equal groups only: this is the grid whose group divides both ranges, with equal
    scales in all groups of a range.

    Args:
        weight: (out, in, height, width) or (out, in).
        grid: how the scales of either range are found; one group.
        split: first input channel of the second range.

    Returns:
        A grid by groups, and scales of ``last(weight, grid)``.

    >>> grid, scales = split_scales(torch.tensor([[3.0, -3, 9, 9, 9, 9]]), Grid(Integer(3)), 2)
    >>> grid.group, scales.scale
    (2, tensor([[1., 3., 3.]]))

    """
    width = weight.shape[1]
    grouped = Grid(grid.format, math.gcd(split, width - split), zero_point=grid.zero_point)
    *rows, _ = last(weight, grouped).shape
    parts = [fit(last(part, grid), grid) for part in (weight[:, :split], weight[:, split:])]
    counts = torch.tensor([split, width - split], device=weight.device) // cast(int, grouped.group)

    def spread(found: list[Tensor]) -> Tensor:
        """(out, 1) twice, to (out, ..., groups)."""
        own = torch.cat(found, -1).repeat_interleave(counts, -1)
        return own.reshape(len(own), *[1] * (len(rows) - 1), -1).expand(*rows, -1).contiguous()

    zeros = [p.zero for p in parts if p.zero is not None]
    return grouped, Scales(spread([p.scale for p in parts]), spread(zeros) if zeros else None)


def _resnets(net: nn.Module) -> Iterator[tuple[str, nn.Conv2d, nn.Conv2d]]:
    """Both convolutions of the residual blocks of a UNet, in the order they are called in."""
    stages = [f"down_blocks.{i}" for i in range(len(getattr(net, "down_blocks", ())))]
    stages += ["mid_block"] if isinstance(getattr(net, "mid_block", None), nn.Module) else []
    stages += [f"up_blocks.{i}" for i in range(len(getattr(net, "up_blocks", ())))]
    for stage in stages:
        for index, resnet in enumerate(getattr(net.get_submodule(stage), "resnets", ())):
            first, second = (getattr(resnet, n, None) for n in ("conv1", "conv2"))
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d):
                yield f"{stage}.resnets.{index}", first, second


def _note(split: int | None, nearest: bool) -> str:
    parts = ["input channels split in two ranges"] if split else []
    if nearest:
        parts.append("nearest: learning did not lower the error of the block's output")
    return "; ".join(parts)
