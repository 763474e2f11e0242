"""Keep a quantized denoiser: its tensors in one file, how to rebuild it in another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.layers.replacing import swap
from evenkeel.quantizers.saved.layer_files import read_layer, write_layer
from evenkeel.quantizers.saved.report import QuantizationReport, attach, report_on

FORMAT = "evenkeel-quantized"
VERSION = 3
TENSORS = "quantized.safetensors"
DESCRIPTION = "quantized.json"


def save_quantized(module: nn.Module, folder: str | Path) -> Path:
    """Write every parameter and buffer, the configuration and the report that the module carries.

    Quantized weights are written as packed codes with their scales, so the file is about as small as
    the report says (scales of float32 models take 32 bits). Buffers that ``state_dict`` leaves out are
    written too, so that the loaded model computes the same bits. Tensors are stored contiguously: a
    model in channels_last layout comes back without.

    Args:
        module: what ``quantize_module`` or ``quantize`` made of a diffusers model, a copy or a refit of
            it included.
        folder: made if missing; files in it are overwritten.

    Returns:
        The folder.

    Raises:
        QuantizationError: not a diffusers model, or not quantized by this library.

    """
    class_name = type(module).__name__
    _model_class(class_name)
    config = json.loads(module.to_json_string())  # type: ignore[operator]
    report = _report(module)
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise QuantizationError(f"{place} is a file; give a folder to save into.")
    place.mkdir(parents=True, exist_ok=True)
    layers, packed = {}, {}
    for layer in report.quantized:
        own, layers[layer.name] = write_layer(_quantized(module, layer.name))
        packed.update({f"{layer.name}.{k}": v for k, v in own.items()})
    inside = _prefixes(module)
    # clone: safetensors refuses tensors that share memory
    dense = {
        k: t.detach().cpu().clone().contiguous()
        for k, t in _tensors(module).items()
        if not k.startswith(inside)
    }
    save_file(dense | packed, place / TENSORS, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "class": class_name,
        "config": config,
        "layers": layers,
        "report": report.as_dict(),
    }
    (place / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return place


def load_quantized(folder: str | Path) -> tuple[nn.Module, QuantizationReport]:
    """Rebuild what :func:`save_quantized` wrote, on the CPU, in the dtype it was saved in.

    Returns:
        The model, in evaluation mode, and its report.

    Raises:
        QuantizationError: no such folder, a missing or foreign file, another format version, a
            class that this diffusers does not have, or tensors that do not fit the description.

    """
    place = Path(folder)
    description = _read_description(place)
    tensors = _read_tensors(place / TENSORS)
    report = QuantizationReport.from_dict(description["report"])
    model_class = _model_class(description["class"])
    # The random initialization is overwritten; the caller's random numbers must not notice it.
    with torch.random.fork_rng(devices=[]):
        module: nn.Module = model_class.from_config(description["config"])
    for layer in report.quantized:
        _put(module, layer.name, description["layers"], tensors)
    _fill(module, tensors, place)
    module.eval().requires_grad_(False)
    attach(report, module)
    return module, report


def _model_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise QuantizationError(
            f"{name!r} is not a model class of diffusers {diffusers.__version__}; only those can "
            "be saved and rebuilt. Use the diffusers version the file was written with."
        )
    return found


def _report(module: nn.Module) -> QuantizationReport:
    report = report_on(module)
    inside = {name for name, part in module.named_modules() if isinstance(part, QuantizedLayer)}
    if report is None:
        raise QuantizationError(
            f"This {type(module).__name__} carries no report ({len(inside)} quantized layers). Save "
            "what quantize_module or quantize returned, or a copy of it."
        )
    reported = {layer.name for layer in report.quantized}
    if inside != reported:
        raise QuantizationError(
            f"The report that this {type(module).__name__} carries ({report.quantizer}) is of other "
            f"layers: {sorted(inside ^ reported)[:5]} are quantized here or there alone. Save the "
            "module as quantize_module or quantize returned it."
        )
    return report


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _read_description(place: Path) -> dict[str, Any]:
    if not place.is_dir():
        raise QuantizationError(f"{place} is not a folder. Give the one save_quantized wrote.")
    path = place / DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QuantizationError(f"{path} is missing: not a folder of save_quantized.") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise QuantizationError(f"{path} is not JSON ({error}). Save the model again.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise QuantizationError(f"{path} does not describe a quantized model (format {FORMAT!r}).")
    if found.get("version") != VERSION:
        raise QuantizationError(
            f"{path} has format version {found.get('version')!r}; this library reads {VERSION}. "
            "Quantize the model again, or use the library version that wrote it."
        )
    missing = {"class", "config", "layers", "report"} - set(found)
    if missing:
        raise QuantizationError(f"{path} lacks {sorted(missing)}. Save the model again.")
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        # clone: the file's tensors sit wherever the header ends, and the same product rounds
        # differently in memory of another alignment
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise QuantizationError(f"{path} is missing: not a folder of save_quantized.") from error
    except SafetensorError as error:
        raise QuantizationError(f"{path} is damaged ({error}). Save the model again.") from error


def _put(
    module: nn.Module, name: str, descriptions: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Replace one layer by what the file says; its tensors are taken out of ``tensors``."""
    start = f"{name}."
    own = {k[len(start) :]: tensors.pop(k) for k in list(tensors) if k.startswith(start)}
    if name not in descriptions:
        raise QuantizationError(f"{DESCRIPTION} does not describe {name!r}. Save the model again.")
    try:
        old = module.get_submodule(name)
    except AttributeError as error:
        raise QuantizationError(
            f"{DESCRIPTION} describes a layer {name!r} that the class does not have. Use the "
            "diffusers version it was saved with."
        ) from error
    try:
        new = read_layer(descriptions[name], own, old)
    except QuantizationError as error:
        raise QuantizationError(f"{TENSORS}, {name!r}: {error}") from error
    swap(module, old, new)


def _quantized(module: nn.Module, name: str) -> QuantizedLayer:
    found = module.get_submodule(name)
    assert isinstance(found, QuantizedLayer)  # by _report
    return found


def _prefixes(module: nn.Module) -> tuple[str, ...]:
    """How names of tensors inside quantized layers begin."""
    names = module.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, part in names if isinstance(part, QuantizedLayer))


def _fill(module: nn.Module, tensors: dict[str, Tensor], place: Path) -> None:
    """Put every tensor of the file where it belongs, in the file's dtype; none may be left over."""
    inside = _prefixes(module)
    slots = {k: t for k, t in _tensors(module).items() if not k.startswith(inside)}
    missing, unknown = sorted(set(slots) - set(tensors)), sorted(set(tensors) - set(slots))
    different = sorted(k for k in set(slots) & set(tensors) if slots[k].shape != tensors[k].shape)
    if missing or unknown or different:
        raise QuantizationError(
            f"{place / TENSORS} does not fit the class in {DESCRIPTION}: missing {missing[:5]}, "
            f"unknown {unknown[:5]}, of another shape {different[:5]}. Save the model again, or "
            "use the diffusers version it was saved with."
        )
    for name, old in slots.items():
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent)
        if isinstance(old, nn.Parameter):
            owner._parameters[child] = nn.Parameter(tensors[name], requires_grad=False)
        else:
            owner._buffers[child] = tensors[name]
