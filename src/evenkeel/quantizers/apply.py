"""Quantize a whole network: choose layers by name, replace them in a copy, report every one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers import QuantizedConv2d, QuantizedLinear, weight_group
from evenkeel.quantizers.report import LayerReport, QuantizationReport
from evenkeel.quantizers.spec import QuantizerSpec, first_match
from evenkeel.quantizers.uniform import group_count

Quantized = QuantizedLinear | QuantizedConv2d
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
    _refuse_quantized(module)
    reasons = [_reason_to_keep(name, layer, spec) for name, layer in found]
    if all(reasons):
        raise _nothing_matches([name for name, _ in found], spec)
    replaced: dict[int, nn.Module] = {}
    layers: list[LayerReport] = []
    for done, ((name, layer), reason) in enumerate(zip(found, reasons, strict=True), start=1):
        if reason:
            layers.append(_kept(name, layer, reason))
        else:
            new = _quantize(name, layer, spec)
            replaced[id(layer)] = new
            layers.append(_report(name, layer, new, spec))
        if progress is not None:
            progress(done, len(found), name)
    size = _bytes_at_16_bits(module)
    saved = sum(_bytes_saved(layer) for layer in layers if not layer.kept)
    report = QuantizationReport(spec, tuple(layers), size - saved, size)
    return _copy_with(module, replaced, spec), report


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
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    if any(getattr(layer, h) for h in hooks) or "forward" in vars(layer):
        raise QuantizationError(
            f"{name!r} has hooks (offloading, a profiler, an adapter?) that its replacement would "
            "lose. Quantize before they are attached, or remove them first."
        )
    if any(tensor.is_meta for tensor in layer.parameters()):
        raise QuantizationError(
            f"The weights of {name!r} are not loaded (device 'meta'). Load the model completely, "
            "without offloading, before quantizing."
        )
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d.of(layer, spec, name)
    assert isinstance(layer, nn.Linear)  # by _reason_to_keep
    return QuantizedLinear.of(layer, spec, name)


def _report(name: str, layer: nn.Module, new: Quantized, spec: QuantizerSpec) -> LayerReport:
    old = layer.get_parameter("weight").detach()
    notes = []
    if isinstance(layer, nn.Conv2d) and spec.rank:
        notes.append("convolution: no low-rank branch")
    if isinstance(layer, nn.Conv2d) and layer.groups > 1 and spec.group is not None:
        notes.append("grouped convolution: one weight scale per output channel")
    return LayerReport(
        name=name,
        kind=type(layer).__name__,
        shape=tuple(old.shape),
        weight_bits=spec.weight_bits,
        activation_bits=spec.activation_bits,
        group=weight_group(layer, spec),
        rank=new.rank if isinstance(new, QuantizedLinear) else 0,
        weight_error=_relative_error(old, _effective_weight(new)),
        note="; ".join(notes),
    )


def _kept(name: str, layer: nn.Module, reason: str) -> LayerReport:
    shape = tuple(layer.get_parameter("weight").shape)
    return LayerReport(name, type(layer).__name__, shape, 16, 16, None, 0, 0.0, reason)


def _effective_weight(new: Quantized) -> Tensor:
    weight = new.weight.double()
    if isinstance(new, QuantizedLinear) and new.up is not None and new.down is not None:
        weight = weight + new.up.double() @ new.down.double()
    return weight


def _relative_error(old: Tensor, new: Tensor) -> float:
    norm = torch.linalg.vector_norm(old.double())
    error = torch.linalg.vector_norm(old.double() - new)
    return float(error / norm) if norm > 0 else 0.0


def _bytes_at_16_bits(module: nn.Module) -> int:
    """Every tensor of the state once, shared ones too; integers keep their own width."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values()}.values()
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)


def _bytes_saved(layer: LayerReport) -> int:
    if layer.weight_bits == 16:
        return 0
    shape = torch.Size(layer.shape)
    codes = -(-shape.numel() * layer.weight_bits // 8)
    scales = 2 * group_count(shape, layer.group)
    factors = 2 * layer.rank * (shape[0] + shape[1])
    return 2 * shape.numel() - codes - scales - factors


def _refuse_quantized(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, Quantized):
            raise QuantizationError(
                f"{name!r} is quantized already; quantizing its rounded weights again would be "
                "measured against the wrong original. Start from the full-precision module."
            )


def _nothing_matches(found: list[str], spec: QuantizerSpec) -> QuantizationError:
    names = ", ".join(repr(name) for name in found[:5]) or "none at all"
    return QuantizationError(
        f"No layer is left to quantize: {len(found)} linear and convolution layers ({names}"
        f"{', ...' if len(found) > 5 else ''}), only={spec.only}, skip={spec.skip}. A pattern is "
        "for the whole dotted name, and '*' also matches dots: '*.attn1' is every block's attn1."
    )
