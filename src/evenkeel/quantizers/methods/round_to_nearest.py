"""Plain rounding in every common number format: the baseline of all methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import DynamicInput, Input
from evenkeel.quantizers.layers.patterns import DEFAULT_SKIP, check_patterns
from evenkeel.quantizers.layers.quantized_layers import (
    Quantized,
    QuantizedConv2d,
    QuantizedLinear,
    copied,
    weight_group,
)
from evenkeel.quantizers.layers.static_ranges import RunningRange, Search, searched
from evenkeel.quantizers.methods.base import Method, check_bits
from evenkeel.quantizers.numbers.formats import Format, Integer, format_named, wide
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.rounding.gptq import gptq, hessian_of
from evenkeel.quantizers.rounding.low_rank_refinement import branch_of
from evenkeel.quantizers.workspace.workspace import Workspace

# Block formats: element, values per scale, format of the scale.
_BLOCKS: dict[str, tuple[str, int, Literal["fp8_e4m3", "e8m0"]]] = {
    "nvfp4": ("fp4_e2m1", 16, "fp8_e4m3"),
    "mxfp4": ("fp4_e2m1", 32, "e8m0"),
}


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Weights and inputs to the nearest value of a grid; GPTQ and a low-rank branch on request.

    Weights: one scale per ``group`` input features of an output channel (None: the whole channel).
    Inputs: ``dynamic`` per group or token, or ``static`` per layer from calibration calls.
    ``w3a4-g32-r16`` (:class:`QuantizerSpec`) is the short form of the most common of these.

    Attributes:
        weight_bits, activation_bits: 2 to 8 (activations from 3), or 16.
        weight_format: ``int``, or a floating format of that many bits: ``fp8_e4m3``, ``fp8_e5m2``,
            ``fp6_e2m3``, ``fp6_e3m2``, ``fp4_e2m1``, ``nf4``, or the block formats ``nvfp4`` (16
            values share an fp8 scale) and ``mxfp4`` (32 values share a power of two).
        activation_format: the same for inputs.
        group: input features per scale of weights; block formats have their own.
        activation: ``token`` and ``group`` are dynamic, ``static`` is one fixed range per layer.
        zero_point: asymmetric weight grids (integers).
        activation_zero_point: the same for dynamic inputs; static ones always have it.
        range: how scales of weights and static inputs are found: ``absmax``, ``mse``, ``percentile``.
        rounding: ``nearest``, or ``gptq`` (arXiv:2210.17323) for linear layers.
        skip: name patterns of layers that stay in full precision.
        rank: width of a branch beside the rounded weight of a linear layer, which carries the best
            low-rank part of it in the model's dtype; 0 is none.
        only: where given, layers that match none of these patterns stay in full precision too.

    Raises:
        QuantizationError: a field out of range, or fields that do not go together.

    >>> str(RoundToNearest.of_bits("w4a16", weight_format="nf4"))
    'rtn-w4a16-weight_format=nf4'

    """

    name: ClassVar[str] = "rtn"

    weight_bits: int = 4
    activation_bits: int = 8
    weight_format: str = "int"
    activation_format: str = "int"
    group: int | None = 64
    activation: Literal["token", "group", "static"] = "token"
    zero_point: bool = False
    activation_zero_point: bool = False
    range: Search = "absmax"
    rounding: Literal["nearest", "gptq"] = "nearest"
    skip: tuple[str, ...] = DEFAULT_SKIP
    rank: int = 0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits, 3)
        for field, allowed in (
            ("activation", ("token", "group", "static")),
            ("range", ("absmax", "mse", "percentile")),
            ("rounding", ("nearest", "gptq")),
        ):
            if getattr(self, field) not in allowed:
                raise QuantizationError(
                    f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}."
                )
        if self.activation == "static" and self.activation_format != "int":
            raise QuantizationError(
                f"Static inputs are integers, got activation_format={self.activation_format!r}."
            )
        if type(self.rank) is not int or self.rank < 0:
            raise QuantizationError(f"rank must be an integer of at least 0, got {self.rank!r}.")
        if self.rank and self.weight_bits == 16:
            raise QuantizationError(
                f"rank is {self.rank} but the weights stay at 16 bits: there is no residual to "
                "carry. Use rank 0, or weight_bits from 2 to 8."
            )
        check_patterns("skip", self.skip)
        check_patterns("only", self.only)
        self.weight_grid(None)
        self._dynamic()

    def as_dict(self) -> dict[str, Any]:
        """As every method; ``rank`` and ``only``, which are younger than the rest, where used."""
        found = super().as_dict()
        return {k: v for k, v in found.items() if v or k not in ("rank", "only")}

    @property
    def calibrated(self) -> bool:
        """True for GPTQ and for static inputs."""
        static = self.activation == "static" and self.activation_bits != 16
        return static or (self.rounding == "gptq" and self.weight_bits != 16)

    def weight_grid(self, layer: nn.Module | None) -> Grid | None:
        """The grid for the weight of a layer; None at 16 bits."""
        if self.weight_bits == 16:
            return None
        element, group, scale = self.weight_format, self.group, "float32"
        if element in _BLOCKS:
            element, group, scale = _BLOCKS[element]
        return Grid(
            _format(element, self.weight_bits, signed=not self.zero_point),
            group if layer is None else weight_group(layer, group),
            zero_point=self.zero_point,
            range=self.range,
            scale=scale,  # type: ignore[arg-type]
        )

    def quantize(self, workspace: Workspace) -> None:
        """Layer by layer, independently of each other."""
        workspace.keep_matching(self.skip, self.only)
        layers = workspace.layers
        for name in workspace.open:
            self._refuse_rank(name, layers[name])
        for unit in workspace.work(workspace.units(workspace.open)):
            hessians, inputs = self._observed(workspace, unit.layers)
            made = {n: self._layer(n, layers[n], hessians, inputs) for n in unit.layers}
            workspace.replace(unit, made, notes={n: self.note(layers[n]) for n in unit.layers})

    def layer(
        self, old: nn.Module, name: str = "layer", hessian: Tensor | None = None
    ) -> Quantized:
        """One linear or convolution layer quantized without calibration; it is not changed.

        Args:
            old: the layer.
            name: for errors.
            hessian: (in, in) second moment of what enters a linear layer; with it ``rounding="gptq"``
                rounds by GPTQ, without it to the nearest.

        Raises:
            QuantizationError: NaN or infinity in the weight, or a rank that leaves no residual.

        >>> RoundToNearest(3, 16, group=4, rank=1).layer(nn.Linear(8, 3))
        QuantizedLinear(in_features=8, out_features=3, bias=True, rank=1)

        """
        self._refuse_rank(name, old)
        by_gptq = self.rounding == "gptq" and isinstance(old, nn.Linear)
        hessians = {name: hessian} if by_gptq and hessian is not None else {}
        return self._layer(name, old, hessians, {})

    def _observed(
        self, workspace: Workspace, names: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], dict[str, Input]]:
        """Second moments for GPTQ and ranges of the inputs, whichever is asked for."""
        hessians: dict[str, Tensor] = {}
        rows: Counter[str] = Counter()
        ranges = {name: RunningRange(0.0) for name in names}
        if not self.calibrated:
            return {}, {}
        linear = {n for n in names if isinstance(workspace.layers[n], nn.Linear)}

        def see(name: str, x: Tensor) -> None:
            ranges[name].add(x)
            if self.rounding == "gptq" and name in linear:
                x = x.reshape(-1, x.shape[-1])
                rows[name] += len(x)  # a running mean over the rows of all calls
                share = len(x) / rows[name]
                before = hessians.get(name, 0.0)
                hessians[name] = before + share * (hessian_of(x) - before)

        workspace.visit(names, see)
        if self.activation != "static" or self.activation_bits == 16:
            return hessians, {}
        if self.range == "absmax":
            return hessians, {n: r.quantizer(self.activation_bits) for n, r in ranges.items()}
        found = workspace.layer_inputs(names)
        return hessians, {
            name: searched(_last(x), self.activation_bits, self.range) for name, x in found.items()
        }

    def _layer(
        self,
        name: str,
        layer: nn.Module,
        hessians: Mapping[str, Tensor],
        inputs: Mapping[str, Input],
    ) -> Quantized:
        weight, grid = layer.get_parameter("weight").detach(), self.weight_grid(layer)
        values, branch, scales = wide(weight), None, None
        if self.rank and isinstance(layer, nn.Linear):
            branch = branch_of(weight, self.rank, weight.dtype)
            # The factors as they are stored: the residual also absorbs their own rounding.
            values = values - branch.product(values.dtype)
        if grid is not None and name in hessians:
            values, scales = gptq(values, hessians[name], grid)
        elif grid is not None:
            values, scales = snap_weight(values, grid, f"The weight of {name!r}")
        rest: dict[str, Any] = {
            "activation": inputs.get(name, self._dynamic()),
            "stored": None if grid is None or scales is None else (grid, scales),
        }
        rounded = values.to(weight.dtype, copy=True)
        bias = copied(layer._parameters["bias"])
        if isinstance(layer, nn.Conv2d):
            return QuantizedConv2d(layer, rounded, bias, **rest)
        down, up = (None, None) if branch is None else (branch.down, branch.up)
        return QuantizedLinear(rounded, bias, down, up, **rest)

    def _refuse_rank(self, name: str, layer: nn.Module) -> None:
        shape = tuple(layer.get_parameter("weight").shape)
        if self.rank and isinstance(layer, nn.Linear) and self.rank >= min(shape):
            raise QuantizationError(
                f"The weight of {name!r} is {shape}: a branch of rank {self.rank} would carry all "
                "of it and leave nothing to quantize. Lower the rank, or add the layer to `skip`."
            )

    def note(self, layer: nn.Module) -> str:
        """Where a layer departs from what was asked for."""
        if not isinstance(layer, nn.Conv2d):
            return ""
        gptq_asked = self.rounding == "gptq" and self.weight_bits != 16
        notes = (
            "convolution: nearest" if gptq_asked else "",
            "convolution: no low-rank branch" if self.rank else "",
            "grouped convolution: one weight scale per output channel"
            if layer.groups > 1 and self.group is not None
            else "",
        )
        return "; ".join(filter(None, notes))

    def _dynamic(self) -> DynamicInput | None:
        if self.activation_bits == 16 or self.activation == "static":
            return None
        element, group = self.activation_format, self.group
        if element in _BLOCKS:
            element, group, _ = _BLOCKS[element]
        elif self.activation == "token":
            group = None
        form = _format(element, self.activation_bits, signed=not self.activation_zero_point)
        return DynamicInput(form, group, zero_point=self.activation_zero_point)


def _format(name: str, bits: int, *, signed: bool) -> Format:
    if name == "int":
        return Integer(bits, signed=signed)
    found = format_named(name)
    if found.bits != bits:
        raise QuantizationError(f"{name} has {found.bits} bits, {bits} were asked for.")
    return found


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1) if x.ndim == 4 else x
