"""ViDiT-Q: every token on its own scale, and channels brought closer together, for transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import DynamicInput
from evenkeel.quantizers.layers.patterns import DEFAULT_SKIP, first_match
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    copied,
)
from evenkeel.quantizers.methods.base import Method, check_bits
from evenkeel.quantizers.methods.mixdq import check_candidates
from evenkeel.quantizers.methods.sensitivity import (
    CONTENT,
    RATIOS,
    Trial,
    layer_damage,
    searched_bits,
)
from evenkeel.quantizers.numbers.formats import Integer, wide
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.rounding.smoothing import channel_span, factors
from evenkeel.quantizers.workspace.workspace import Workspace


@dataclass(frozen=True)
class ViDiTQ(Method):
    """Asymmetric weights by output channel, dynamic asymmetric inputs by token, channels smoothed.

    ViDiT-Q (arXiv:2406.02540). Nearest, minimum to maximum, nothing is clipped. In ``smoothed``
    layers x / s meets W diag(s), s = max|x|^alpha / max|w|^(1 - alpha) by input channel. The paper
    smooths all layers, as is the default; its released text-to-image script smooths the
    down-projection of the last block only, and is worse.

    Below 8 bits the weights are mixed: as in MixDQ, by the same authors, each layer alone is tried
    at each number of bits and an integer program spends the budget (see
    :mod:`evenkeel.quantizers.methods.sensitivity`). The paper gives each range of time steps an allocation
    of its own, which needs the weights of all of them in memory; here sensitivities are averaged over
    the steps, and one allocation serves all.

    Its released code takes the range of a token over all samples of the batch, so a picture
    depends on what is made beside it; ``across_batch`` does that. Where one scale of a layer is
    below 1e-6, the code sets all of them to that; here each is guarded by itself.

    Attributes:
        weight_bits: 2 to 8, the mean over all weights that are quantized where they are mixed; or 16.
        activation_bits: 3 to 8, or 16.
        candidates: bits that a layer may have besides ``weight_bits``, where the largest of them is
            above it; none gives ``weight_bits`` to all.
        alpha: how much of the spread of the inputs goes to the weights, in [0, 1].
        momentum: of the running average of max|x| over calibration calls; 0 keeps the largest.
        smoothed: name patterns of layers to smooth.
        across_batch: pool ranges of tokens over the batch.
        content: name patterns of the layers that decide about content.
        ratios: mean bits of content over those of the others, to try.
        sensitivity_calls: calibration calls, evenly spaced, for each measurement.
        skip: name patterns of layers that stay in full precision.

    Raises:
        QuantizationError: a field out of range.

    >>> ViDiTQ(weight_bits=4).calibrated
    True

    """

    name: ClassVar[str] = "vidit-q"

    weight_bits: int = 8
    activation_bits: int = 8
    candidates: tuple[int, ...] = (2, 4, 8)
    alpha: float = 0.3
    momentum: float = 0.95
    smoothed: tuple[str, ...] = ("*",)
    across_batch: bool = False
    content: tuple[str, ...] = CONTENT
    ratios: tuple[float, ...] = RATIOS
    sensitivity_calls: int = 4
    skip: tuple[str, ...] = DEFAULT_SKIP

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits, 3)
        if self.candidates:
            check_candidates("candidates", self.candidates)
        if not 0 <= self.alpha <= 1 or not 0 <= self.momentum < 1:
            raise QuantizationError(
                "alpha must be in [0, 1] and momentum in [0, 1), got "
                f"{self.alpha!r} and {self.momentum!r}."
            )
        if not self.ratios or not all(ratio > 0 for ratio in self.ratios):
            raise QuantizationError(f"ratios must be positive numbers, got {self.ratios!r}.")
        if self.sensitivity_calls < 1:
            raise QuantizationError(
                f"sensitivity_calls must be at least 1, got {self.sensitivity_calls!r}."
            )

    @property
    def calibrated(self) -> bool:
        """False where nothing is smoothed and all layers have the same bits."""
        return bool(self.smoothed) or self._mixed

    @property
    def _mixed(self) -> bool:
        return bool(self.candidates) and self.weight_bits < max(self.candidates)

    def quantize(self, workspace: Workspace) -> None:
        """Smooth, allocate bits, and round layer by layer."""
        workspace.keep_matching(self.skip)
        units = workspace.units(workspace.open)
        names = [name for unit in units for name in unit.layers]
        smoothing = self._smoothing(workspace, names)

        def make(name: str, bits: int | None, *, rounded: bool = False) -> QuantizedLayer:
            old = workspace.layers[name]
            return self._layer(name, old, bits or 16, smoothing.get(name), rounded=rounded)

        bits = dict.fromkeys(names, self.weight_bits)
        if self._mixed:
            trial = Trial(workspace, self.sensitivity_calls)
            tried = tuple(sorted({*self.candidates, self.weight_bits}))
            found = layer_damage(workspace, units, trial, make, lambda _: tried, self.content)
            damage = {n: {b: found[n][b] for b in tried} for n in names}
            both = partial(make, rounded=True)
            bits = searched_bits(
                workspace, damage, self.weight_bits, trial, both, self.ratios, self.content
            )
        for unit in workspace.work(units):
            made = {name: make(name, bits[name], rounded=True) for name in unit.layers}
            notes = {name: "smoothed" for name in unit.layers if name in smoothing}
            workspace.replace(unit, made, notes=notes)

    def _smoothing(self, workspace: Workspace, names: Sequence[str]) -> dict[str, Tensor]:
        """By name, s of the layers to be smoothed."""
        chosen = [n for n in names if first_match(n, self.smoothed) and _smoothable(workspace, n)]
        if not chosen:
            return {}
        largest: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> None:
            convolved = isinstance(workspace.layers[name], nn.Conv2d)
            own = channel_span((x.movedim(-3, -1) if convolved else x).float())
            if name not in largest:
                largest[name] = own
            elif self.momentum == 0:
                largest[name] = torch.maximum(largest[name], own)
            else:
                largest[name] = self.momentum * largest[name] + (1 - self.momentum) * own

        workspace.visit(chosen, see)
        found = {}
        for name, span in largest.items():
            weight = workspace.layers[name].get_parameter("weight")
            columns = channel_span(weight.float().movedim(1, -1))
            found[name] = factors(span, columns, self.alpha, 1 - self.alpha).to(weight.dtype)
        return found

    def _layer(
        self, name: str, old: nn.Module, bits: int, smoothing: Tensor | None, *, rounded: bool
    ) -> QuantizedLayer:
        weight = old.get_parameter("weight").detach()
        values, stored = wide(weight), None
        if smoothing is not None:
            values = values * smoothing.reshape(-1, *(1,) * (weight.ndim - 2))
        if bits != 16:
            grid = Grid(Integer(bits, signed=False), zero_point=True)
            values, scales = snap_weight(values, grid, f"the weight of {name!r}")
            stored = (grid, scales)
        activation = None
        if rounded and self.activation_bits != 16:
            form = Integer(self.activation_bits, signed=False)
            activation = DynamicInput(form, zero_point=True, across_batch=self.across_batch)
        made, bias = values.to(weight.dtype, copy=True), copied(old.bias)  # type: ignore[arg-type]
        if isinstance(old, nn.Conv2d):
            return QuantizedConv2d(
                old, made, bias, activation=activation, smoothing=smoothing, stored=stored
            )
        return QuantizedLinear(
            made, bias, activation=activation, smoothing=smoothing, stored=stored
        )


def _smoothable(workspace: Workspace, name: str) -> bool:
    """Not convolutions with groups, whose weight has no column for each input channel."""
    layer = workspace.layers[name]
    return not isinstance(layer, nn.Conv2d) or layer.groups == 1
