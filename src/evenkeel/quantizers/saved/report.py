"""What became of every layer, and how much memory the result would need."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer, QuantizedLinear
from evenkeel.statistics.exact import at_home


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear or convolution layer: quantized, or kept for a ``reason``.

    ``weight_error`` is ||W - W_q|| / ||W|| (Frobenius, low-rank branch and smoothing taken back
    included; 0 for a zero weight). ``weight_format`` and ``activation_format`` say how
    (``int4/64``). ``output_error`` is the same ratio for the layer's output on the calibration
    inputs, None where nothing was measured. ``note`` says where a quantized layer departs from the
    specification.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int
    activation_bits: int
    group: int | None
    rank: int
    weight_error: float
    reason: str = ""
    note: str = ""
    weight_format: str = ""
    activation_format: str = ""
    output_error: float | None = None

    @property
    def kept(self) -> bool:
        """True when the layer stays in full precision."""
        return bool(self.reason)


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Every linear and convolution layer exactly once, and the memory before and after, in bytes.

    ``quantizer``: what was asked for, as it is written in short (``w3a4-g32-r16``); ``spec``: all of it
    in types that JSON knows, as ``as_dict`` of a specification or method gives it.
    ``full_precision_bytes``: all parameters and stored buffers at 16 bits.
    ``stored_bytes``: the same with quantized weights as packed codes, one 16-bit scale per group
    (8 bits where the format says so, and 8 bits for a zero point) and 16-bit low-rank factors. The
    simulation itself needs more than either.
    """

    quantizer: str
    spec: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    stored_bytes: int
    full_precision_bytes: int

    @classmethod
    def measured(
        cls,
        quantizer: str,
        spec: Mapping[str, Any],
        layers: tuple[LayerReport, ...],
        original: nn.Module,
        quantized: nn.Module,
    ) -> QuantizationReport:
        """A report with the sizes of these two networks."""
        size = _bytes_at_16_bits(original)
        saved = sum(
            _bytes_at_16_bits(original.get_submodule(layer.name))
            - stored_bytes(quantized.get_submodule(layer.name))
            for layer in layers
            if not layer.kept
        )
        return cls(quantizer, spec, layers, size - saved, size)

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were replaced."""
        return tuple(layer for layer in self.layers if not layer.kept)

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """The layers that stay in full precision, each with its reason."""
        return tuple(layer for layer in self.layers if layer.kept)

    def as_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows; :meth:`from_dict` is the inverse."""
        layers = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        return {
            "quantizer": self.quantizer,
            "spec": dict(self.spec),
            "layers": layers,
            "stored_bytes": self.stored_bytes,
            "full_precision_bytes": self.full_precision_bytes,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> QuantizationReport:
        """The inverse of :meth:`as_dict`.

        Raises:
            QuantizationError: the fields are not those of a report.

        """
        try:
            layers = tuple(layer_from(layer) for layer in found["layers"])
            sizes = {k: int(found[k]) for k in ("stored_bytes", "full_precision_bytes")}
            return cls(str(found["quantizer"]), dict(found["spec"]), layers, **sizes)
        except (KeyError, TypeError, ValueError) as error:
            raise QuantizationError(
                f"This is not a quantization report: {type(error).__name__}: {error}. "
                "Quantize the model again."
            ) from error

    def table(self) -> str:
        """One line per layer: bits, how, relative weight and output error, or why it was kept."""
        width = max(len(layer.name) for layer in self.layers)
        lines = []
        for layer in self.layers:
            if layer.kept:
                lines.append(f"{layer.name:<{width}}  kept: {layer.reason}")
                continue
            output = "" if layer.output_error is None else f"  output {layer.output_error:.2%}"
            rank = f"  rank {layer.rank}" if layer.rank else ""
            how = f"{layer.weight_format} x {layer.activation_format or '16 bits'}"
            note = f"  ({layer.note})" if layer.note else ""
            lines.append(
                f"{layer.name:<{width}}  w{layer.weight_bits}a{layer.activation_bits}  {how}{rank}  "
                f"weight {layer.weight_error:.2%}{output}{note}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [
            f"{self.quantizer}: {len(self.quantized)} of {len(self.layers)} layers quantized, "
            f"{_mega(self.stored_bytes)} stored, {_mega(self.full_precision_bytes)} at 16 bits"
        ]
        if self.quantized:
            errors = sorted((r.weight_error, r.name) for r in self.quantized)
            middle, (worst, name) = errors[len(errors) // 2][0], errors[-1]
            lines.append(
                f"  relative weight error: median {middle:.3g}, worst {worst:.3g} ({name})"
            )
        for label, texts in (
            ("kept", [r.reason for r in self.kept]),
            ("note", [r.note for r in self.quantized if r.note]),
        ):
            for text in dict.fromkeys(texts):
                lines.append(f"  {label} {texts.count(text):>4}  {text}")
        return "\n".join(lines)


def attach(report: QuantizationReport, module: nn.Module) -> None:
    """Let a quantized module say what it is: it carries its report wherever it is copied to."""
    module.evenkeel_quantizer = report.quantizer  # type: ignore[assignment]
    module.evenkeel_report = report  # type: ignore[assignment]
    if hasattr(
        module, "save_pretrained"
    ):  # of diffusers or transformers, who look here when saving
        # Asked for by name: that module reads reports itself.
        home = importlib.import_module("evenkeel.quantizers.saved.diffusers_format")
        module.hf_quantizer = home.EvenkeelQuantizer.on(module)


def report_on(module: nn.Module) -> QuantizationReport | None:
    """The report that a module carries; None for one that this library did not quantize."""
    found = getattr(module, "evenkeel_report", None)
    return found if isinstance(found, QuantizationReport) else None


def layer_from(found: Mapping[str, Any]) -> LayerReport:
    """The inverse of ``asdict``.

    Raises:
        KeyError: fields are missing or unknown.

    """
    expected = {f.name for f in fields(LayerReport)}
    if set(found) != expected:
        raise KeyError(f"a layer has the fields {sorted(expected)}, found {sorted(found)}")
    return LayerReport(**{**found, "shape": tuple(found["shape"])})


def kept_layer(name: str, layer: nn.Module, reason: str) -> LayerReport:
    """The report on a layer that stays in full precision."""
    shape = tuple(layer.get_parameter("weight").shape)
    return LayerReport(name, type(layer).__name__, shape, 16, 16, None, 0, 0.0, reason)


def report_of(
    name: str,
    old: nn.Module,
    new: QuantizedLayer,
    *,
    note: str = "",
    output_error: float | None = None,
) -> LayerReport:
    """The report on a layer that replaces another."""
    weight = old.get_parameter("weight").detach()
    grid = None if new.stored is None else new.stored[0]
    return LayerReport(
        name=name,
        kind=type(old).__name__,
        shape=tuple(weight.shape),
        weight_bits=16 if grid is None else grid.format.bits,
        activation_bits=new.activation_bits,
        group=None if grid is None else grid.group,
        rank=new.rank,
        weight_error=_relative_error(weight, effective_weight(new)),
        note=note,
        weight_format="" if grid is None else str(grid),
        activation_format="" if new.activation is None else new.activation.extra_repr(),
        output_error=output_error,
    )


def effective_weight(new: QuantizedLayer) -> Tensor:
    """What a full-precision layer would need as its weight to map as this one does, float64."""
    weight = at_home(new.weight).double()
    if isinstance(new, QuantizedLinear) and new.up is not None and new.down is not None:
        weight = weight + at_home(new.up).double() @ at_home(new.down).double()
    if new.smoothing is not None:
        shape = (-1,) + (1,) * (weight.ndim - 2)
        weight = weight / at_home(new.smoothing).double().reshape(shape)
    return weight


def _relative_error(old: Tensor, new: Tensor) -> float:
    wide = at_home(old).double()
    norm, error = torch.linalg.vector_norm(wide), torch.linalg.vector_norm(wide - new)
    return float(error / norm) if norm > 0 else 0.0


def _bytes_at_16_bits(module: nn.Module) -> int:
    """Every tensor of the state once, shared ones too; integers keep their own width."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values()}.values()
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)


def stored_bytes(layer: nn.Module) -> int:
    """Of a quantized layer: codes for its weight, 16 bits for everything else."""
    assert isinstance(layer, QuantizedLayer)
    size = _bytes_at_16_bits(layer)
    if layer.stored is None:
        return size
    grid, scales = layer.stored
    codes = -(-layer.weight.numel() * grid.format.bits // 8)
    each = 2 if grid.scale == "float32" else 1
    zeros = 0 if scales.zero is None else scales.zero.numel()
    return size - 2 * layer.weight.numel() + codes + each * scales.scale.numel() + zeros


def _mega(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
