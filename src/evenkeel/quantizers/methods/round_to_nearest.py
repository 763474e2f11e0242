"""Plain rounding in every common number format: the baseline of all methods."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import DynamicInput, Input
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    copied,
    weight_group,
)
from evenkeel.quantizers.layers.static_ranges import RunningRange, Search, searched
from evenkeel.quantizers.methods.base import Method, check_bits
from evenkeel.quantizers.methods.spec import DEFAULT_SKIP
from evenkeel.quantizers.numbers.formats import Format, Integer, format_named
from evenkeel.quantizers.numbers.grids import Grid, snap_weight
from evenkeel.quantizers.rounding.gptq import gptq, hessian_of
from evenkeel.quantizers.workspace.workspace import Workspace

# Block formats: element, values per scale, format of the scale.
_BLOCKS: dict[str, tuple[str, int, Literal["fp8_e4m3", "e8m0"]]] = {
    "nvfp4": ("fp4_e2m1", 16, "fp8_e4m3"),
    "mxfp4": ("fp4_e2m1", 32, "e8m0"),
}


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Weights and inputs to the nearest value of a grid; GPTQ on request.

    Weights: one scale per ``group`` input features of an output channel (None: the whole channel).
    Inputs: ``dynamic`` per group or token, or ``static`` per layer from calibration calls.

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
        self.weight_grid(None)
        self._dynamic()

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
        workspace.keep_matching(self.skip)
        for unit in workspace.work(workspace.units(workspace.open)):
            hessians, inputs = self._observed(workspace, unit.layers)
            made, notes = {}, {}
            for name in unit.layers:
                made[name], notes[name] = self._layer(
                    workspace.layers[name], hessians.get(name), inputs.get(name)
                )
            workspace.replace(unit, made, notes=notes)

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
        self, layer: nn.Module, hessian: Tensor | None, static: Input | None
    ) -> tuple[QuantizedLayer, str]:
        weight = layer.get_parameter("weight").detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        grid, note = self.weight_grid(layer), ""
        values, scales = wide, None
        if grid is not None and hessian is not None:
            values, scales = gptq(wide, hessian, grid)
        elif grid is not None:
            values, scales = snap_weight(wide, grid)
            note = "convolution: nearest" if self.rounding == "gptq" else ""
        activation = static if static is not None else self._dynamic()
        rest = {
            "activation": activation,
            "stored": None if grid is None or scales is None else (grid, scales),
        }
        rounded = values.to(weight.dtype, copy=True)
        bias = copied(layer.bias)  # type: ignore[arg-type]
        if isinstance(layer, nn.Conv2d):
            return QuantizedConv2d(layer, rounded, bias, **rest), note  # type: ignore[arg-type]
        return QuantizedLinear(rounded, bias, **rest), note  # type: ignore[arg-type]

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
