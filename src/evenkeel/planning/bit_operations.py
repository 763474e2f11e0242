"""How many bit operations a call of a quantized denoiser takes, counted on a network without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.planning.blueprint import read_blueprint
from evenkeel.planning.denoiser_inputs import Shapes, Size
from evenkeel.planning.plan import folder_of, size_of
from evenkeel.quantizers.saved.report import QuantizationReport


@dataclass(frozen=True)
class BitOperations:
    """Of one call with one row: multiplications of linear and convolution layers times both factors' bits.

    Products inside attention are left out, as the papers' BOPs are of layers. Branches of low rank count
    with 16 x 16 bits.

    Attributes:
        quantized: of the quantized denoiser.
        full_precision: of the same layers with 16 x 16 bits.

    """

    quantized: int
    full_precision: int

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {"quantized": self.quantized, "full_precision": self.full_precision}

    def __str__(self) -> str:
        share = self.quantized / self.full_precision
        return (
            f"bit operations per call and image: {self.quantized / 1e9:.4g} G, {share:.1%} of those with "
            f"16 x 16 bits"
        )


def bit_operations(
    source: str,
    report: QuantizationReport,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
) -> BitOperations | None:
    """Counted from the configurations of a pipeline; None where its denoiser's inputs are not known.

    Args:
        source: ``zoo:NAME``, a folder, or an id in the hub's cache.
        report: of its quantized denoiser.
        height: of what is made; None as the pipeline has it.
        width: the same.
        num_frames: the same.

    Raises:
        UnsupportedPipeline: no configurations there.

    >>> from evenkeel import zoo
    >>> from evenkeel.quantizers import QuantizerSpec, quantize_module
    >>> _, report = quantize_module(zoo.load("pixart-sigma").transformer, QuantizerSpec.parse("w4a8"))
    >>> str(bit_operations("zoo:pixart-sigma", report))  # doctest: +ELLIPSIS
    'bit operations per call and image: ... G, ...% of those with 16 x 16 bits'

    """
    blueprint = read_blueprint(folder_of(source))
    size: Size = size_of(blueprint, height, width, num_frames)
    shapes = Shapes(blueprint, size, torch.float32)
    if not shapes.known():
        return None
    denoiser, inputs = blueprint.denoiser.float(), shapes.inputs(1)
    positions = _positions(denoiser, lambda: denoiser(**inputs, return_dict=False))
    quantized = full = 0
    for layer in report.layers:
        weight = denoiser.get_submodule(layer.name).get_parameter("weight")
        times = positions.get(layer.name, 0)
        full += times * weight.numel() * 256
        quantized += times * weight.numel() * layer.weight_bits * layer.activation_bits
        quantized += times * layer.rank * (weight.shape[0] + weight[0].numel()) * 256
    return BitOperations(quantized, full)


def _positions(denoiser: nn.Module, call: Callable[[], Any]) -> dict[str, int]:
    """By layer, so many places at which its weight is applied."""
    found: dict[str, int] = {}
    hooks = []

    def counting(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(layer: nn.Module, given: Any, output: Tensor) -> None:
            channels = output.shape[-1 if isinstance(layer, nn.Linear) else 1]
            found[name] = found.get(name, 0) + output.numel() // channels

        return count

    for name, layer in denoiser.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            hooks.append(layer.register_forward_hook(counting(name)))
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return found
