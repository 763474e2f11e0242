"""SVDQuant: smooth the inputs, carry what is hard in a thin 16-bit branch, round the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import DynamicInput
from evenkeel.quantizers.layers.patterns import DEFAULT_SKIP, first_match
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer, weight_group
from evenkeel.quantizers.methods.base import Method, check_bits
from evenkeel.quantizers.methods.svdquant_layers import (
    NO_BRANCH,
    NORMS,
    SKIP,
    Joined,
    Part,
    Patterns,
    assembled,
    by_input,
    joined_by_module,
    note_whole,
    remainder,
    shifts_of,
    with_inputs,
)
from evenkeel.quantizers.numbers.formats import Integer, wide
from evenkeel.quantizers.numbers.grids import NVFP4, Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.rounding.gptq import gptq, hessian_of
from evenkeel.quantizers.rounding.low_rank_refinement import (
    Branch,
    Decomposition,
    branch_of,
    output_error,
    refined,
)
from evenkeel.quantizers.rounding.smoothing import channel_span, exponents, factors_as, search
from evenkeel.quantizers.workspace.workspace import ROWS, Workspace
from evenkeel.statistics.exact import at_home


@dataclass(frozen=True)
class SVDQuant(Method):
    """SVDQuant (arXiv:2411.05007), with what its released code adds to the paper.

    y = Q_a(x / s) Q_w(W diag(s) - U D)^T + ((x / s) D^T) U^T + b

    s smooths the inputs (:mod:`evenkeel.quantizers.rounding.smoothing`), U D is the branch
    (:mod:`evenkeel.quantizers.rounding.low_rank_refinement`); both minimize the squared error of the layer's
    output on calibration inputs, with the inputs rounded. Layers that read the same input share s;
    projections joined in one module (query, key and value) share D as well.

    Departures from the released code: attention projections are judged by their own output, not by
    the attention's, and both output projections of a joint attention are smoothed apart; the
    released shift for SiLU clips a sliver, this does not; FLUX's
    ``single_transformer_blocks.*.proj_out`` is not split at its concatenation: one branch, signed
    inputs; convolutions have no branch; scales of NVFP4 inputs are not rounded. Its split of a
    UNet's first convolutions at the skip concatenation changes nothing: scales are per pixel and
    group, and only a group across the boundary mixes both.

    Attributes:
        weight_bits, activation_bits: 2 to 8 (activations from 3, or 16).
        weight_format: ``int``, or ``nvfp4`` (4 bits, 16 values share a scale) for both operands.
        group: input features per scale, of weights and inputs; None is one scale per output channel
            and per token. ``paper``: 64, None at 8 bits, 16 for ``nvfp4``. Sana's is 32 in Q-Drift.
        rank: of the branch; 0 has none.
        iterations: of its refinement, at most; 1 has none.
        smoothing: search for s.
        grids: fineness of that search, see :func:`evenkeel.quantizers.rounding.smoothing.exponents`.
        shared: joined projections share the branch's down-projection.
        unsigned: inputs that a GELU, SiLU or Mish bounds below are shifted to be positive and use
            unsigned integers: down-projections of feed-forwards that are not gated, and the
            convolutions of residual blocks.
        rounding: of the residual: ``nearest``, or ``gptq`` (linear layers).
        decomposition: ``exact``, or ``randomized`` for speed.
        rows: input tokens that a layer is judged on.
        skip: patterns of layers that stay in full precision; None is the released table for the
            denoiser's class (UNet, PixArt, Sana, FLUX), else :data:`DEFAULT_SKIP`.
        branch_skip: the same for smoothing and branch, by default residual blocks and norms.
        activation_skip: the same for the rounding of inputs, by default norms.

    Raises:
        QuantizationError: a field out of range, or fields that do not go together.

    >>> str(SVDQuant.of_bits("w4a4", rounding="gptq")), SVDQuant.q_drift_flux().calibrated
    ('svdquant-w4a4-rounding=gptq', False)

    """

    name: ClassVar[str] = "svdquant"

    weight_bits: int = 4
    activation_bits: int = 4
    weight_format: Literal["int", "nvfp4"] = "int"
    group: int | Literal["paper"] | None = "paper"
    rank: int = 32
    iterations: int = 100
    smoothing: bool = True
    grids: int = 20
    shared: bool = True
    unsigned: bool = True
    rounding: Literal["nearest", "gptq"] = "nearest"
    decomposition: Decomposition = "exact"
    rows: int = ROWS
    skip: Patterns | None = None
    branch_skip: Patterns = NO_BRANCH
    activation_skip: Patterns = NORMS

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits, 3)
        for field, allowed in (
            ("weight_format", ("int", "nvfp4")),
            ("rounding", ("nearest", "gptq")),
            ("decomposition", ("exact", "randomized")),
        ):
            if getattr(self, field) not in allowed:
                raise QuantizationError(
                    f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}."
                )
        for field, least in (("rank", 0), ("iterations", 1), ("grids", 2), ("rows", 1)):
            if type(getattr(self, field)) is not int or getattr(self, field) < least:
                raise QuantizationError(
                    f"{field} must be an integer of at least {least}, got {getattr(self, field)!r}."
                )
        if self.weight_bits == 16:
            raise QuantizationError("SVDQuant rounds weights: weight_bits is 2 to 8, got 16.")
        fixed = (self.weight_bits, self.group) == (4, "paper") and self.activation_bits in (4, 16)
        if self.weight_format == "nvfp4" and not fixed:
            raise QuantizationError(
                "nvfp4 is w4a4 or w4a16 with groups of 16 (group='paper'), got "
                f"w{self.weight_bits}a{self.activation_bits}, group={self.group!r}."
            )
        self.weight_grid(None)  # refuses any other group

    @classmethod
    def q_drift_flux(cls) -> SVDQuant:
        """What Q-Drift's FLUX experiments release as SVDQuant W3A4: no smoothing and no branch.

        Plain rounding to the nearest in groups of 64 (its configuration switches both off).

        >>> SVDQuant.q_drift_flux().rank
        0
        """
        return cls(3, 4, smoothing=False, rank=0)

    @property
    def calibrated(self) -> bool:
        """False if nothing but plain rounding is left."""
        return self.smoothing or self.rank > 0 or self.rounding == "gptq"

    @property
    def values_per_scale(self) -> int | None:
        """Input features per integer scale, ``paper`` resolved; None is all of them."""
        return {8: None}.get(self.weight_bits, 64) if self.group == "paper" else self.group

    def weight_grid(self, layer: nn.Module | None) -> Grid:
        """The grid for the weight of a layer."""
        group = self.values_per_scale
        group = group if layer is None else weight_group(layer, group)
        return NVFP4 if self.weight_format == "nvfp4" else Grid(Integer(self.weight_bits), group)

    def input_rounding(self, shift: float, factors: Tensor | None) -> DynamicInput | None:
        """How a layer rounds its smoothed input that is never below ``-shift`` unsmoothed."""
        if self.activation_bits == 16:
            return None
        if self.weight_format == "nvfp4":
            return DynamicInput(NVFP4.format, NVFP4.group)
        if not shift:
            return DynamicInput(Integer(self.activation_bits), self.values_per_scale)
        unsigned = Integer(self.activation_bits, signed=False)
        return DynamicInput(
            unsigned, self.values_per_scale, shift=shift if factors is None else shift / factors
        )

    def quantize(self, workspace: Workspace) -> None:
        """Block by block, every layer on the inputs it has in full precision."""
        kind = type(workspace.original).__name__
        skip = SKIP.get(kind, DEFAULT_SKIP) if self.skip is None else self.skip
        origin = f" of SVDQuant's table for {kind}" if self.skip is None and kind in SKIP else ""
        for name in workspace.open:
            pattern = first_match(name, skip)
            if pattern is not None:
                workspace.keep(name, f"skip pattern {pattern!r}{origin}")
        unsigned = self.unsigned and self.weight_format == "int" and self.activation_bits != 16
        shifts = shifts_of(workspace.original) if unsigned else {}
        for unit in workspace.work(workspace.units(workspace.open)):
            parts = [self._part(name, workspace.layers[name], shifts) for name in unit.layers]
            note_whole(parts, kind)
            for readers in by_input(with_inputs(parts, workspace, self.rows)):
                sets = joined_by_module(readers, self.rank, self.shared)
                if self.smoothing:
                    self._smooth(sets)
                for joined in sets:
                    self._add_branch(joined)
            hessians = self._hessians(parts, workspace) if self.rounding == "gptq" else {}
            made = {p.name: self._layer(p, hessians.get(p.name)) for p in parts}
            workspace.replace(
                unit,
                made,
                notes={part.name: "; ".join(part.notes) for part in parts},
                output_errors={p.name: self._error(p, made[p.name]) for p in parts if p.seen},
            )

    def _part(self, name: str, layer: nn.Module, shifts: Mapping[str, float]) -> Part:
        part = Part(name, layer, self.weight_grid(layer), shifts.get(name, 0.0))
        if first_match(name, self.activation_skip) is not None:
            part.rounds_input = False
            part.notes += ["input not rounded"] if self.activation_bits != 16 else []
        if self.smoothing or self.rank:
            pattern = first_match(name, self.branch_skip)
            if pattern is not None:
                part.notes.append(f"no smoothing, no branch: skip pattern {pattern!r}")
            elif part.spatial:
                part.notes.append("no smoothing, no branch: convolution of several pixels")
            part.helped = pattern is None and not part.spatial
        return part

    def _hessians(self, parts: Sequence[Part], workspace: Workspace) -> dict[str, Tensor]:
        """Of every linear layer, over all tokens of its smoothed and rounded input."""
        linear = {part.name: part for part in parts if isinstance(part.layer, nn.Linear)}
        found: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> None:
            rounded = self._sides(linear[name], linear[name].factors, wide(x))[1]
            own = hessian_of(rounded) * rounded[..., 0].numel()
            found[name] = own + found[name] if name in found else own

        if linear:
            workspace.visit(list(linear), see)
        return found

    def _sides(self, part: Part, factors: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input as the branch sees it, and as the rounded weight does."""
        x = x if factors is None else x / factors
        rounding = self.input_rounding(part.shift, factors) if part.rounds_input else None
        return x, x if rounding is None else rounding(x)

    def _smooth(self, sets: Sequence[Joined]) -> None:
        """One search for all that read this input, every candidate with its first branch."""
        readers = [part for joined in sets for part in joined.parts]
        first = readers[0]

        def error(factors: Tensor) -> float:
            factors = factors_as(first.dtype, factors)
            sides, total = self._sides(first, factors, first.inputs), 0.0
            for joined in sets:
                weight, rank, branch = joined.weight * factors, joined.rank, None
                if rank:
                    branch = branch_of(weight, rank, first.dtype, self.decomposition)
                residual = joined.rounded(remainder(weight, branch))
                total += output_error(*sides, weight, branch, residual)
            return total

        span = channel_span(torch.cat([joined.weight for joined in sets]))
        best = search(channel_span(first.inputs + first.shift), span, error, exponents(self.grids))
        for part in readers:
            if best.alpha or best.beta:
                part.factors = factors_as(part.dtype, best.factors)

    def _add_branch(self, joined: Joined) -> None:
        first = joined.parts[0]
        if not joined.rank:
            return
        sides, weight = self._sides(first, first.factors, first.inputs), joined.smoothed
        found = refined(
            weight,
            joined.rank,
            first.dtype,
            joined.rounded,
            lambda branch, residual: output_error(*sides, weight, branch, residual),
            iterations=self.iterations,
            decomposition=self.decomposition,
        )
        for part, up in zip(joined.parts, joined.split(found.branch.up), strict=True):
            part.branch = Branch(found.branch.down, up.contiguous())

    def _error(self, part: Part, made: QuantizedLayer) -> float:
        """Of the layer's output on the calibration inputs, relative."""
        x, rounded = self._sides(part, part.factors, part.inputs)
        off = output_error(x, rounded, part.smoothed, part.branch, wide(made.weight.flatten(1)))
        whole = float(at_home((x @ part.smoothed.T).square()).sum(dtype=torch.float64))
        return math.sqrt(off / whole) if whole else 0.0

    def _layer(self, part: Part, hessian: Tensor | None) -> QuantizedLayer:
        left = remainder(part.smoothed, part.branch)
        if hessian is not None:
            values, scales = gptq(left, hessian, part.grid)
        else:
            part.notes += ["convolution: nearest"] if self.rounding == "gptq" else []
            like = part.layer.get_parameter("weight")
            values, scales = snap_weight(left.reshape(like.shape), part.grid, part.name)
        rounding = self.input_rounding(part.shift, part.factors) if part.rounds_input else None
        return assembled(part, values, scales, rounding)
