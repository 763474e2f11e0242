"""What a post-training quantization method is: a frozen configuration that works on a workspace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.saved.report import QuantizationReport
from evenkeel.quantizers.workspace.alignment import MixedOrder
from evenkeel.quantizers.workspace.workspace import Progress, Workspace
from evenkeel.threads import sensible_threads

if TYPE_CHECKING:
    from typing_extensions import Self

_BITS = re.compile(r"w(\d+)a(\d+)", re.ASCII)


class Quantizer(Protocol):
    """What decides about the layers of a workspace: a method, or the text form of one."""

    @property
    def calibrated(self) -> bool:
        """False if it needs no denoiser calls."""

    def quantize(self, workspace: Workspace) -> None:
        """Replace every layer, or keep it for a reason."""

    def as_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""


def quantized_on(
    workspace: Workspace, quantizer: Quantizer
) -> tuple[nn.Module, QuantizationReport]:
    """What the quantizer makes of the workspace's denoiser."""
    with sensible_threads(workspace.quantized):
        quantizer.quantize(workspace)
        return workspace.result(str(quantizer), quantizer.as_dict())


def quantize_module(
    module: nn.Module, spec: Quantizer, progress: Progress | None = None
) -> tuple[nn.Module, QuantizationReport]:
    """A copy of ``module`` whose chosen linear and convolution layers are (simulated) of few bits.

    The copy has the same class, configuration and dtype, is in evaluation mode and takes no
    gradients; ``module`` is not changed. ``copy.evenkeel_quantizer`` is ``str(spec)``, and the copy
    carries its report. For what calibrates on denoiser calls there is ``evenkeel.quantize``.

    Args:
        module: any network, usually a diffusers denoiser.
        spec: a :class:`QuantizerSpec`, or a method that needs no calibration.
        progress: called with (units done, units in all, name) after each block or single layer.

    Returns:
        The copy, and a report on every linear and convolution layer.

    Raises:
        QuantizationError: nothing matches; a weight is not finite; the rank leaves no residual;
            a layer was quantized before, has hooks, or has its weights elsewhere (offloading);
            the method needs calibration.

    >>> from evenkeel.quantizers import QuantizerSpec
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> quantized, report = quantize_module(net, QuantizerSpec(4, only=("0",)))
    >>> [layer.reason for layer in report.layers]
    ['', 'matched by no `only` pattern']

    """
    with sensible_threads(module):
        return quantized_on(Workspace(module, progress=progress), spec)


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses whose defaults are the paper's.

    Attributes:
        name: as the literature writes it, in lower case.

    """

    name: ClassVar[str]

    weight_bits: int
    activation_bits: int

    @property
    def calibrated(self) -> bool:
        """False if the method needs no denoiser calls to calibrate on."""
        return True

    @property
    def pairs(self) -> MixedOrder | None:
        """How the calls that it calibrates on are paired with teachers; None where they are not."""
        return None

    @classmethod
    def of_bits(cls, text: str, **options: Any) -> Self:
        """From the short form ``w4a8``, with other fields as keywords.

        Raises:
            QuantizationError: not of that form, an unknown field, or a value out of range.

        """
        found = _BITS.fullmatch(text)
        if found is None:
            raise QuantizationError(
                f"bits are written w<weights>a<activations>, for example w4a8; got {text!r}."
            )
        weight, activation = map(int, found.groups())
        return cls.from_dict({"weight_bits": weight, "activation_bits": activation, **options})

    def as_dict(self) -> dict[str, Any]:
        """Every field, and ``method``, in types that JSON knows."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"method": self.name, **{k: _plain(v) for k, v in own.items()}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_dict`; fields left out have their defaults.

        Raises:
            QuantizationError: an unknown field, or a value out of range.

        """
        known = [f.name for f in fields(cls)]
        given = {k: v for k, v in found.items() if k != "method"}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise QuantizationError(
                f"{cls.name} has no option {', '.join(unknown)}; it has {', '.join(known)}."
            )
        return cls(**{k: _frozen(v) for k, v in given.items()})

    def __str__(self) -> str:
        bits = ("weight_bits", "activation_bits")
        changed = [
            f"-{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in bits and getattr(self, f.name) != f.default
        ]
        return f"{self.name}-w{self.weight_bits}a{self.activation_bits}{''.join(changed)}"

    def quantize(self, workspace: Workspace) -> None:
        """Decide about every layer of the workspace: replace it, or keep it for a reason."""
        raise NotImplementedError


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    return value


def check_bits(name: str, bits: object, least: int = 2) -> None:
    """Raise unless ``bits`` is an integer from ``least`` to 8, or 16 for not quantized."""
    if type(bits) is not int or not (least <= bits <= 8 or bits == 16):
        raise QuantizationError(
            f"{name} must be an integer from {least} to 8, or 16 for not quantized, got {bits!r}."
        )
