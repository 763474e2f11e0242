"""What became of every layer, and how much memory the result would need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.spec import QuantizerSpec


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear or convolution layer: quantized, or kept for a ``reason``.

    ``weight_error`` is ||W - W_q|| / ||W|| (Frobenius, low-rank branch included; 0 for a zero
    weight). ``note`` says where a quantized layer departs from the specification.
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

    @property
    def kept(self) -> bool:
        """True when the layer stays in full precision."""
        return bool(self.reason)


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Every linear and convolution layer exactly once, and the memory before and after, in bytes.

    ``full_precision_bytes``: all parameters and stored buffers at 16 bits.
    ``stored_bytes``: the same with quantized weights as packed codes, one 16-bit scale per group
    and 16-bit low-rank factors. The simulation itself needs more than either.
    """

    spec: QuantizerSpec
    layers: tuple[LayerReport, ...]
    stored_bytes: int
    full_precision_bytes: int

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
            "spec": self.spec.to_dict(),
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
            layers = tuple(_layer(layer) for layer in found["layers"])
            sizes = {k: int(found[k]) for k in ("stored_bytes", "full_precision_bytes")}
            return cls(QuantizerSpec.from_dict(found["spec"]), layers, **sizes)
        except (KeyError, TypeError, AttributeError) as error:
            raise QuantizationError(
                f"This is not a quantization report: {type(error).__name__}: {error}. "
                "Quantize the model again."
            ) from error

    def __str__(self) -> str:
        lines = [
            f"{self.spec}: {len(self.quantized)} of {len(self.layers)} layers quantized, "
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


def _layer(found: Mapping[str, Any]) -> LayerReport:
    expected = {f.name for f in fields(LayerReport)}
    if set(found) != expected:
        raise KeyError(f"a layer has the fields {sorted(expected)}, found {sorted(found)}")
    return LayerReport(**{**found, "shape": tuple(found["shape"])})


def _mega(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
