"""Quantize a whole network: choose layers by name, replace them in a copy, report every one."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.quantized_layers import Quantized, QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.layers.replacing import refuse_irreplaceable, refuse_quantized
from evenkeel.quantizers.methods.spec import QuantizerSpec, first_match
from evenkeel.quantizers.saved.report import LayerReport, QuantizationReport, kept_layer, report_of

Progress = Callable[[int, int, str], None]


def quantize_module(
    module: nn.Module, spec: QuantizerSpec, progress: Progress | None = None
) -> tuple[nn.Module, QuantizationReport]:
    """A copy of ``module`` whose chosen linear and convolution layers are (simulated) integer.

    The copy has the same class, configuration and dtype, is in evaluation mode and takes no
    gradients; ``module`` is not changed. ``copy.evenkeel_quantizer`` is ``str(spec)``.

    Args:
        module: any network, usually a diffusers denoiser.
        spec: bits, groups, rank and name patterns.
        progress: called with (layers done, layers in all, name) after each layer.

    Returns:
        The copy, and a report on every linear and convolution layer.

    Raises:
        QuantizationError: nothing matches; a weight is not finite; the rank leaves no residual;
            a layer was quantized before, has hooks, or has its weights elsewhere (offloading).

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> quantized, report = quantize_module(net, QuantizerSpec(4, only=("0",)))
    >>> [layer.reason for layer in report.layers]
    ['', 'matched by no `only` pattern']

    """
    # named_modules gives a module that is shared under several names once, by its first name.
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    refuse_quantized(module)
    reasons = [_reason_to_keep(name, layer, spec) for name, layer in found]
    if all(reasons):
        raise _nothing_matches([name for name, _ in found], spec)
    replaced: dict[int, nn.Module] = {}
    layers: list[LayerReport] = []
    for done, ((name, layer), reason) in enumerate(zip(found, reasons, strict=True), start=1):
        if reason:
            layers.append(kept_layer(name, layer, reason))
        else:
            new = _quantize(name, layer, spec)
            replaced[id(layer)] = new
            layers.append(report_of(name, layer, new, note=_note(layer, spec)))
        if progress is not None:
            progress(done, len(found), name)
    quantized = _copy_with(module, replaced, spec)
    return quantized, QuantizationReport.measured(spec, tuple(layers), module, quantized)


def _copy_with(module: nn.Module, replaced: dict[int, nn.Module], spec: QuantizerSpec) -> nn.Module:
    # deepcopy takes what its memo already holds for the copy: every reference to a replaced layer,
    # shared ones included, leads to its replacement, and the old weight is never duplicated.
    quantized: nn.Module = copy.deepcopy(module, dict(replaced))
    quantized.eval().requires_grad_(False)
    quantized.evenkeel_quantizer = str(spec)  # type: ignore[assignment]
    return quantized


def _reason_to_keep(name: str, layer: nn.Module, spec: QuantizerSpec) -> str:
    # Subclasses have a forward of their own (LoRA, other quantizers): not ours to replace.
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"type {type(layer).__name__} is not quantized"
    if spec.only and first_match(name, spec.only) is None:
        return "matched by no `only` pattern"
    pattern = first_match(name, spec.skip)
    return "" if pattern is None else f"skip pattern {pattern!r}"


def _quantize(name: str, layer: nn.Module, spec: QuantizerSpec) -> Quantized:
    refuse_irreplaceable(name, layer)
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d.of(layer, spec, name)
    assert isinstance(layer, nn.Linear)  # by _reason_to_keep
    return QuantizedLinear.of(layer, spec, name)


def _note(layer: nn.Module, spec: QuantizerSpec) -> str:
    notes = []
    if isinstance(layer, nn.Conv2d) and spec.rank:
        notes.append("convolution: no low-rank branch")
    if isinstance(layer, nn.Conv2d) and layer.groups > 1 and spec.group is not None:
        notes.append("grouped convolution: one weight scale per output channel")
    return "; ".join(notes)


def _nothing_matches(found: list[str], spec: QuantizerSpec) -> QuantizationError:
    names = ", ".join(repr(name) for name in found[:5]) or "none at all"
    return QuantizationError(
        f"No layer is left to quantize: {len(found)} linear and convolution layers ({names}"
        f"{', ...' if len(found) > 5 else ''}), only={spec.only}, skip={spec.skip}. A pattern is "
        "for the whole dotted name, and '*' also matches dots: '*.attn1' is every block's attn1."
    )
