"""MixDQ: bits where they matter, for few-step text-to-image denoisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.blocks import Unit
from evenkeel.quantizers.layers.concatenations import skip_concatenations, split_scales
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    copied,
)
from evenkeel.quantizers.layers.static_ranges import RunningRange
from evenkeel.quantizers.methods.base import Method, check_bits
from evenkeel.quantizers.methods.sensitivity import (
    CONTENT,
    RATIOS,
    Trial,
    layer_damage,
    searched_bits,
)
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import last, snap, snap_weight, unlast
from evenkeel.quantizers.workspace.workspace import Workspace


@dataclass(frozen=True)
class MixDQ(Method):
    """Weights of 2, 4 or 8 bits by layer, static inputs, and a first text token that is left alone.

    MixDQ (arXiv:2405.17873). Weights: symmetric, one scale per output channel, nearest. Each layer
    alone is tried at each number of bits; cross-attention and feed-forward layers are judged by the
    structure of what comes out, the others by its noise; an integer program spends the budget
    within each of the two groups, for several splits between them, and the best split is taken
    (see :mod:`evenkeel.quantizers.methods.sensitivity`). Inputs: asymmetric, one range per layer fixed by
    calibration; the most sensitive ones stay in 16 bits. The first text token of causal encoders
    (CLIP) is the same for every prompt and far larger than the others: its keys and values are kept
    from full precision, and it does not count for the range. Shortcut convolutions of UNets have a
    range, and weights a scale, for each half of the concatenation.

    The published settings average the extremes of batches of one step (``momentum`` 0.95), and
    then run several. Where calibration calls cover several steps, whose ranges differ, an average
    clips the widest of them; so the default keeps the extremes.

    Attributes:
        weight_bits: the mean over all weights that are quantized, 2 to 8, or 16.
        activation_bits: 3 to 8, or 16.
        content_candidates: bits that layers of the content group may have, besides ``weight_bits``.
        quality_candidates: bits that the others may have, besides ``weight_bits``.
        content: name patterns of the content group.
        ratios: mean bits of content over quality, to try.
        kept_inputs: share of each group whose inputs stay in 16 bits, rounded up.
        momentum: of the running averages; 0 keeps the extremes of all calls.
        first_token: name patterns of layers to protect where their first token is always the same.
        sensitivity_calls: calibration calls, evenly spaced, for each measurement; there are three
            or four measurements for each layer.
        skip: name patterns of layers that stay in full precision.

    Raises:
        QuantizationError: a field out of range.

    >>> str(MixDQ(kept_inputs=0.0))
    'mixdq-w4a8-kept_inputs=0.0'

    """

    name: ClassVar[str] = "mixdq"

    weight_bits: int = 4
    activation_bits: int = 8
    content_candidates: tuple[int, ...] = (2, 4, 8)
    quality_candidates: tuple[int, ...] = (4, 8)
    content: tuple[str, ...] = CONTENT
    ratios: tuple[float, ...] = RATIOS
    kept_inputs: float = 0.01
    momentum: float = 0.0
    first_token: tuple[str, ...] = ("*.attn2.to_k", "*.attn2.to_v")
    sensitivity_calls: int = 4
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits, 3)
        check_candidates("content_candidates", self.content_candidates)
        check_candidates("quality_candidates", self.quality_candidates)
        if not self.ratios or not all(ratio > 0 for ratio in self.ratios):
            raise QuantizationError(f"ratios must be positive numbers, got {self.ratios!r}.")
        if not 0 <= self.kept_inputs <= 1:
            raise QuantizationError(f"kept_inputs must be in [0, 1], got {self.kept_inputs!r}.")
        if self.sensitivity_calls < 1:
            raise QuantizationError(
                f"sensitivity_calls must be at least 1, got {self.sensitivity_calls!r}."
            )
        RunningRange(self.momentum)

    def quantize(self, workspace: Workspace) -> None:
        """Observe inputs, measure sensitivities, allocate bits, and round layer by layer."""
        workspace.keep_matching(self.skip)
        units = workspace.units(workspace.open)
        seen = self._observed(workspace, [name for unit in units for name in unit.layers])
        bits, kept = self._decided(workspace, units, seen)
        notes = dict(seen.notes)
        for name in kept:
            notes[name] = "; ".join(filter(None, ("sensitive input: 16 bits", notes[name])))
        for unit in workspace.work(units):
            made = {n: seen.layer(n, bits[n], rounded=n not in kept) for n in unit.layers}
            workspace.replace(unit, made, notes=notes)

    def _observed(self, workspace: Workspace, names: Sequence[str]) -> _Seen:
        layers = workspace.layers
        shortcuts = skip_concatenations(workspace.original).items()
        splits = {n: at for n, at in shortcuts if n in names and n.endswith(".conv_shortcut")}
        ranges = {n: RunningRange(self.momentum, splits.get(n)) for n in names}
        guarded = {n: FirstToken(self.momentum) for n in names if first_match(n, self.first_token)}

        def see(name: str, x: Tensor) -> None:
            ranges[name].add(x.movedim(-3, -1) if isinstance(layers[name], nn.Conv2d) else x)
            if name in guarded:
                guarded[name].add(x)

        workspace.visit(names, see)
        notes = dict.fromkeys(names, "")
        tokens: dict[str, Tensor] = {}
        for name, token in guarded.items():
            if token.value is None:
                notes[name] = f"first token not protected: {token.reason}"
                continue
            notes[name] = "first token protected"
            ranges[name] = token.others
            with torch.no_grad():
                tokens[name] = layers[name](token.value)
        for name, at in splits.items():
            notes[name] = f"two ranges, from channel 0 and {at}"
        bits = self.activation_bits
        inputs = {} if bits == 16 else {n: r.quantizer(bits) for n, r in ranges.items()}
        return _Seen(layers, inputs, tokens, splits, notes)

    def _decided(
        self, workspace: Workspace, units: Sequence[Unit], seen: _Seen
    ) -> tuple[dict[str, int], set[str]]:
        """Bits of all weights, and the layers whose inputs are kept."""
        names = [name for unit in units for name in unit.layers]
        content = {name for name in names if first_match(name, self.content)}
        inputs = bool(self.activation_bits != 16 and self.kept_inputs)
        uniform = self.weight_bits >= max(*self.content_candidates, *self.quality_candidates)

        def candidates(name: str) -> tuple[int, ...]:
            own = self.content_candidates if name in content else self.quality_candidates
            return () if uniform else tuple(sorted({*own, self.weight_bits}))

        def choices(name: str) -> tuple[int | None, ...]:
            return (*candidates(name), *((None,) if inputs else ()))

        bits = dict.fromkeys(names, self.weight_bits)
        if uniform and not inputs:
            return bits, set()
        trial = Trial(workspace, self.sensitivity_calls)
        make = partial(_weights_or_input, seen)
        damage = layer_damage(workspace, units, trial, make, choices, self.content)
        kept: set[str] = set()
        for group in (content, set(names) - content) if inputs else ():
            worst = sorted(group, key=lambda name: (-damage[name][None], name))
            kept.update(worst[: ceil(self.kept_inputs * len(group))])
        if not uniform:
            weights = {n: {b: damage[n][b] for b in candidates(n)} for n in names}
            both = lambda n, b: seen.layer(n, b, rounded=n not in kept)  # noqa: E731
            bits = searched_bits(
                workspace, weights, self.weight_bits, trial, both, self.ratios, self.content
            )
        return bits, kept


class FirstToken:
    """Whether all sequences begin with the same token, while the rest of them differs.

    So it is with the begin-of-sentence token of a causal text encoder (CLIP). Equal up to the square
    root of the dtype's precision: an encoder rounds differently in another batch.

    Args:
        momentum: of the range of the other tokens.

    >>> found = FirstToken()
    >>> found.add(torch.tensor([[[9.0], [1.0]], [[9.0], [2.0]]]))
    >>> found.value
    tensor([9.])

    """

    def __init__(self, momentum: float = 0.0) -> None:
        self.others = RunningRange(momentum)
        self.reason = ""
        self._first: Tensor | None = None
        self._differ = False

    def add(self, x: Tensor) -> None:
        """Take in sequences (N, tokens, features)."""
        if self.reason:
            return
        if x.ndim != 3 or x.shape[1] < 2:
            self.reason = f"inputs of shape {tuple(x.shape)} are no sequences"
            return
        self._first = x[0, 0].clone() if self._first is None else self._first
        away = (x[:, 0] - self._first).abs().max()
        if away > torch.finfo(x.dtype).eps ** 0.5 * self._first.abs().max():
            self.reason = "it is not the same for all prompts"
            return
        self.others.add(x[:, 1:])
        self._differ = self._differ or bool((x[:, 1:] != x[:1, 1:]).any())

    @property
    def value(self) -> Tensor | None:
        """The token, (features,); None, with a ``reason``, where there is no such token."""
        if not self.reason and not self._differ:
            self.reason = "the calibration calls have one prompt only"
        return None if self.reason else self._first


@dataclass(frozen=True)
class _Seen:
    """What the calibration calls told about the layers, and how layers are made with it."""

    layers: Mapping[str, nn.Module]
    inputs: Mapping[str, StaticInput]
    tokens: Mapping[str, Tensor]
    splits: Mapping[str, int]
    notes: Mapping[str, str]

    def layer(self, name: str, bits: int, *, rounded: bool) -> QuantizedLayer:
        old = self.layers[name]
        weight = old.get_parameter("weight").detach()
        values, stored = weight, None
        if bits != 16:
            grid, split = Grid(Integer(bits)), self.splits.get(name)
            if split is None:
                values, scales = snap_weight(weight, grid, f"the weight of {name!r}")
            else:
                grid, scales = split_scales(weight, grid, split)
                values = unlast(snap(last(weight, grid), grid, scales), weight.shape, grid)
            stored = (grid, scales)
        made = values.to(weight.dtype, copy=True)
        activation = self.inputs.get(name) if rounded else None
        if isinstance(old, nn.Conv2d):
            return QuantizedConv2d(
                old, made, copied(old.bias), activation=activation, stored=stored
            )
        return QuantizedLinear(
            made,
            copied(old.bias),  # type: ignore[arg-type]
            activation=activation,
            first_token=self.tokens.get(name),
            stored=stored,
        )


def _weights_or_input(seen: _Seen, name: str, bits: int | None) -> QuantizedLayer:
    return seen.layer(name, bits or 16, rounded=bits is None)


def check_candidates(name: str, bits: tuple[int, ...]) -> None:
    """Raise unless these are different numbers from 2 to 8, the smallest first."""
    if not bits or any(type(b) is not int for b in bits) or list(bits) != sorted(set(bits)):
        raise QuantizationError(f"{name} must be rising whole numbers, got {bits!r}.")
    if not 2 <= bits[0] <= bits[-1] <= 8:
        raise QuantizationError(f"{name} must be from 2 to 8, got {bits!r}.")
