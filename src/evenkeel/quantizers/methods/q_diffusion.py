"""Q-Diffusion: block reconstruction of few-bit weights, and two ranges where a skip comes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.concatenations import skip_concatenations, split_scales
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.layers.static_ranges import RunningRange, searched
from evenkeel.quantizers.methods.aligned import Aligned
from evenkeel.quantizers.methods.base import check_bits
from evenkeel.quantizers.methods.block_reconstruction import BlockTrial, Learning, WeightPlan
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import fit, last
from evenkeel.quantizers.workspace.workspace import Workspace


@dataclass(frozen=True)
class QDiffusion(Aligned):
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
        alignment, teacher, pair_at, counted: see :class:`evenkeel.quantizers.methods.aligned.Aligned`.

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
        super().__post_init__()
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
        return self.grid_of(self.weight_bits)

    def grid_of(self, bits: int) -> Grid:
        """The same with other bits."""
        exponent = self.exponent if self.weight_range == "mse" else 2.0
        integer = Integer(bits, signed=False)
        return Grid(integer, zero_point=True, range=self.weight_range, exponent=exponent)

    def bits_of(self, name: str, layers: Sequence[str]) -> tuple[int, int]:
        """Of one layer's weight and input; ``layers`` are all that are quantized, in module order."""
        return self.weight_bits, self.activation_bits

    def quantize(self, workspace: Workspace) -> None:
        """Block by block in the order of the calls."""
        workspace.keep_matching(self.skip)
        splits, names = self._splits(workspace.original), workspace.open
        for unit in workspace.work(workspace.units(names)):
            bits = {n: self.bits_of(n, names) for n in unit.layers}
            plans = {
                n: self._plan(workspace.layers[n], bits[n][0], splits.get(n)) for n in unit.layers
            }
            trial = BlockTrial(workspace, unit, plans, self.seed)
            found = trial.learn_rounding(self._rounding)
            if self.activation_bits != 16:
                inputs = {n: (bits[n][1], splits.get(n)) for n in unit.layers}
                trial.round_inputs(self._ranges(trial, inputs))
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

    def _plan(self, layer: nn.Module, bits: int, split: int | None) -> WeightPlan:
        weight, grid = layer.get_parameter("weight").detach(), self.grid_of(bits)
        if split is None:
            return WeightPlan(grid, fit(last(weight, grid), grid))
        return WeightPlan(*split_scales(weight, grid, split))

    def _ranges(
        self, trial: BlockTrial, layers: dict[str, tuple[int, int | None]]
    ) -> dict[str, StaticInput]:
        if self.activation_range == "mse":
            return {
                n: searched(x, layers[n][0], "mse", exponent=self.exponent, split=layers[n][1])
                for n, x in trial.inputs().items()
            }
        ranges = {n: RunningRange(0.95, at) for n, (_, at) in layers.items()}
        trial.observe(lambda name, x, _: ranges[name].add(trial.rows_of(name, x)))
        return {n: found.quantizer(layers[n][0]) for n, found in ranges.items()}


def _note(split: int | None, nearest: bool) -> str:
    parts = ["input channels split in two ranges"] if split else []
    if nearest:
        parts.append("nearest: learning did not lower the error of the block's output")
    return "; ".join(parts)
