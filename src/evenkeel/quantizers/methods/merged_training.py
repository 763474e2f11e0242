"""What EfficientDM and SA-QLoRA share: settings of a trained quantizer, and the network that is trained."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.merged_layers import MergedLayer, merged_layer
from evenkeel.quantizers.layers.quantized_layers import Quantized
from evenkeel.quantizers.layers.replacing import swap
from evenkeel.quantizers.layers.static_ranges import searched
from evenkeel.quantizers.layers.timed_inputs import TimedInput
from evenkeel.quantizers.layers.told_timestep import tell
from evenkeel.quantizers.methods.base import Method, check_bits
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, snap_weight
from evenkeel.quantizers.workspace.workspace import Workspace

WIDE_BITS = 8
SHORTCUTS_AND_RESAMPLING = ("*conv_shortcut", "*downsamplers.*", "*upsamplers.*")
LEAST = 1 / 16  # of its start: a learned scale never falls below


@dataclass(frozen=True)
class TrainedMethod(Method):
    """Base of methods that train low-rank adapters which are merged into the weights before rounding.

    Layer: y = Q_a(x; s_t, z_t) Q_w(W_0 + B A; s_w)^T. Trained are A, B, s_w and, for each timestep that the
    denoiser is told, s_t and z_t; the rest of the denoiser stays as it is. Gradients pass rounding straight
    through (:func:`~evenkeel.quantizers.rounding.straight_through.straight_through`). Weights have integers
    with a zero point and one scale per output channel, inputs one scale and zero per layer and step; both
    start from a search for the least |error|^``exponent``. AdamW, rates that fall to zero in a straight line,
    no warm-up. What is kept is what held-out final samples say, never the loss.

    ``evenkeel.quantize`` trains it; it is no method for ``quantize_module``.

    Attributes:
        weight_bits, activation_bits: 2 to 8; activations 3 to 8, or 16.
        rank: of A and B, less where a weight has less.
        base: W_0: the ``dequantized`` start, or the ``original`` weight. Both start from the same rounded
            weight; only the original's adapter can find again what rounding lost.
        first, last: so many layers in module order, from the beginning and the end, have 8 bits.
        skip: name patterns of layers that stay in full precision.
        exponent: of the searches for the ranges.
        steps: numbers of inference steps that are trained with, one after another, each for the same share
            of the optimizer's steps; () is the method's own rule.
        optimizer_steps: in all; the runs of a pipeline are whole ones.
        batch_size: prompts of one run.
        eta: of the training runs' scheduler where it takes one; None is the pipeline's.
        adapter_rate: times the mean weight scale of a layer, is the rate of its A and B. What they can reach
            is the product with ``optimizer_steps``, and a dequantized weight lies in the middle of its cell:
            of the published 1/2500 and 16,000 steps a tenth of the steps leaves almost every weight where
            it was. With fewer steps raise it, for example 1,600 and 1/80, with activation_rate 1e-4.
        weight_rate, activation_rate: of weight scales, and of the scales and zeros of inputs.
        weight_decay: of AdamW.
        reduction, cosine, guided: of the loss, see ``Loss``.
        weighting: of the steps in the loss: ``even`` as published, or ``step-law`` (ours), each by what its
            output moves in the final sample.
        calibration_runs: batches of prompts whose calls the ranges of inputs start from.
        evaluations: how often the held-out error is measured.
        seed: of A, of the prompts that are drawn and of their noise.

    Raises:
        QuantizationError: a field out of range.

    """

    weight_bits: int = 4
    activation_bits: int = 4
    rank: int = 32
    base: Literal["dequantized", "original"] = "dequantized"
    first: int = 3
    last: int = 1
    skip: tuple[str, ...] = SHORTCUTS_AND_RESAMPLING
    exponent: float = 2.4
    steps: tuple[int, ...] = ()
    optimizer_steps: int = 16_000
    batch_size: int = 2
    eta: float | None = None
    adapter_rate: float = 1 / 2500
    weight_rate: float = 1e-6
    activation_rate: float = 5e-4
    weight_decay: float = 0.01
    reduction: Literal["sum", "mean"] = "mean"
    cosine: float = 0.0
    guided: bool = True
    weighting: Literal["even", "step-law"] = "even"
    calibration_runs: int = 4
    evaluations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits, 3)
        if self.weight_bits == 16:
            raise QuantizationError(f"{self.name} rounds weights: weight_bits is 2 to 8, got 16.")
        if self.base not in ("dequantized", "original"):
            raise QuantizationError(f"base is 'dequantized' or 'original', got {self.base!r}.")
        if self.weighting not in ("even", "step-law"):
            raise QuantizationError(f"weighting is 'even' or 'step-law', got {self.weighting!r}.")
        for field, least in (
            ("rank", 0),
            ("first", 0),
            ("last", 0),
            ("optimizer_steps", 0),
            ("batch_size", 1),
            ("calibration_runs", 1),
            ("evaluations", 1),
        ):
            if type(found := getattr(self, field)) is not int or found < least:
                raise QuantizationError(
                    f"{field} is an integer of at least {least}, got {found!r}."
                )
        if any(type(s) is not int or s < 1 for s in self.steps):
            raise QuantizationError(f"steps are positive integers, got {self.steps}.")
        for field in ("adapter_rate", "weight_rate", "activation_rate", "weight_decay", "cosine"):
            if not 0 <= (found := getattr(self, field)) < float("inf"):
                raise QuantizationError(f"{field} is finite and not negative, got {found!r}.")

    def schedule(self, deployed: int) -> tuple[int, ...]:
        """Numbers of steps to train with, where ``deployed`` is the one to sample with later."""
        return self.steps or (deployed,)

    def quantize(self, workspace: Workspace) -> None:
        """Not by itself: it needs runs of a pipeline."""
        raise QuantizationError(
            f"{self.name} is trained on runs of a pipeline; use evenkeel.quantize(pipeline, method)."
        )

    def wide_layers(self, names: Sequence[str]) -> set[str]:
        """Of these layers those with 8 bits."""
        return {*names[: self.first], *names[len(names) - self.last :]}

    def starts(
        self, workspace: Workspace, levels: Sequence[float], inputs: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, MergedLayer]:
        """The layers as training finds them; layers of the workspace that match ``skip`` are kept.

        Args:
            workspace: nothing in it is replaced.
            levels: the timesteps that students are told.
            inputs: by layer, for each level the values that enter it, in any shape.

        """
        names, made = list(inputs), {}
        wide = self.wide_layers(names)
        for name in names:
            layer: Any = workspace.layers[name]
            weight_bits, input_bits = (
                max(bits, WIDE_BITS) if name in wide else bits
                for bits in (self.weight_bits, self.activation_bits)
            )
            grid = Grid(
                Integer(weight_bits, signed=False),
                zero_point=True,
                range="mse",
                exponent=self.exponent,
            )
            weight = layer.weight.detach().float()
            rounded, scales = snap_weight(weight, grid, name)
            seed = (self.seed << 32) + zlib.crc32(name.encode())
            made[name] = merged_layer(
                layer,
                rounded if self.base == "dequantized" else weight,
                grid,
                Scales(scales.scale, scales.zero),
                rank=self.rank,
                activation=None
                if input_bits == 16
                else self._timed(input_bits, levels, inputs[name]),
                generator=torch.Generator().manual_seed(seed),
            )
        return made

    def _timed(self, bits: int, levels: Sequence[float], inputs: Sequence[Tensor]) -> TimedInput:
        found = [searched(x.reshape(1, -1), bits, "mse", exponent=self.exponent) for x in inputs]
        scale, zero = (torch.cat([getattr(f, key) for f in found]) for key in ("scale", "zero"))
        device = inputs[0].device
        return TimedInput(bits, levels, scale.to(device), zero.to(device))


class Student:
    """A copy of a denoiser with layers that are trained.

    Attributes:
        network: the copy; only the layers' own parameters take gradients.
        layers: by name.

    """

    def __init__(self, original: nn.Module, layers: Mapping[str, MergedLayer]) -> None:
        self.network = copy.deepcopy(original).eval().requires_grad_(False)
        self.layers = dict(layers)
        for name, layer in layers.items():
            swap(self.network, self.network.get_submodule(name), layer)
        tell(self.network)
        self._original = original
        inputs = [m.activation.scale for m in layers.values() if m.activation is not None]
        self._positive = [*(m.scale for m in layers.values()), *inputs]
        self._least = [p.detach() * LEAST for p in self._positive]

    def groups(self, method: TrainedMethod) -> list[dict[str, Any]]:
        """Parameters and their rates, as an optimizer takes them."""
        layers = self.layers.values()
        adapters = [
            {"params": [m.down, m.up], "lr": method.adapter_rate * float(m.scale.detach().mean())}
            for m in layers
            if len(m.down)
        ]
        inputs = [m.activation for m in layers if m.activation is not None]
        return [
            *adapters,
            {"params": [m.scale for m in layers], "lr": method.weight_rate},
            {
                "params": [p for a in inputs for p in (a.scale, a.zero)],
                "lr": method.activation_rate,
            },
        ]

    def settle(self) -> None:
        """After a step of the optimizer: scales stay positive."""
        with torch.no_grad():
            torch._foreach_maximum_(self._positive, self._least)

    def finished_layers(self) -> dict[str, Quantized]:
        """The quantized layers as they are now."""
        return {name: layer.finished() for name, layer in self.layers.items()}

    def finished(self) -> nn.Module:
        """The quantized denoiser as it is now, in the original's dtype."""
        made = copy.deepcopy(self._original).eval().requires_grad_(False)
        for name, layer in self.finished_layers().items():
            swap(made, made.get_submodule(name), layer)
        tell(made)
        return made
