"""Keep a quantized denoiser: its tensors in one file, how to rebuild it in another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.layers.replacing import swap
from evenkeel.quantizers.layers.timed_inputs import TimedInput
from evenkeel.quantizers.layers.told_timestep import tell
from evenkeel.quantizers.saved.layer_files import read_layer, write_layer
from evenkeel.quantizers.saved.report import QuantizationReport, attach, report_on
from evenkeel.storage import (
    Kind,
    Number,
    check_configuration,
    check_json,
    read_folder,
    write_folder,
)
from evenkeel.storage.atomic import Content
from evenkeel.threads import sensible_threads

TENSORS, DESCRIPTION = "quantized.safetensors", "quantized.json"
KIND = Kind(
    "quantized",
    3,
    "quantize the model again",
    keys=("class", "config", "layers", "report"),
)
_LAYER = {
    "weight": {
        "shape": [Number(int, low=1)],
        "dtype": {"float16", "bfloat16", "float32", "float64"},
        "grid": (None, dict),
    },
    "activation": (None, dict),
}
_SCHEMA = {"class": str, "config": dict, "layers": {str: _LAYER}, "report": dict}


def save_quantized(
    module: nn.Module, folder: str | Path, beside: Mapping[str, Content] | None = None
) -> Path:
    """Write every parameter and buffer, the configuration and the report that the module carries.

    Quantized weights are written as packed codes with their scales, so the file is about as small as
    the report says (scales of float32 models take 32 bits). Buffers that ``state_dict`` leaves out are
    written too, so that the loaded model computes the same bits. Tensors are stored contiguously: a
    model in channels_last layout comes back without. The description holds digests of both files; a
    crash leaves the old folder or the new one.

    Args:
        module: what ``quantize_module`` or ``quantize`` made of a diffusers model, a copy or a refit of
            it included.
        folder: made if missing; files in it are overwritten.
        beside: further files of the same result, as ``storage.write_folder`` takes them.

    Returns:
        The folder.

    Raises:
        QuantizationError: not a diffusers model, or not quantized by this library.
        StorageError: the place is a file.

    """
    class_name = type(module).__name__
    _model_class(class_name)
    config = json.loads(module.to_json_string())  # type: ignore[operator]
    config.pop("quantization_config", None)  # diffusers' format of the same
    report = _report(module)
    layers, packed = {}, {}
    with sensible_threads(module):
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
    tensors = dense | packed
    header = {"class": class_name, "config": config, "layers": layers, "report": report.as_dict()}
    files: dict[str, Content] = {TENSORS: partial(save_file, tensors, metadata={"format": "pt"})}
    return write_folder(folder, KIND, header, files | dict(beside or {}))


def load_quantized(folder: str | Path) -> tuple[nn.Module, QuantizationReport]:
    """Rebuild what :func:`save_quantized` wrote, on the CPU, in the dtype it was saved in.

    Returns:
        The model, in evaluation mode, and its report.

    Raises:
        StorageError: no such folder, a missing, foreign or changed file, another format version, a
            class that this diffusers does not have, or tensors that do not fit the description.

    """
    place = Path(folder)
    found, files = read_folder(place, KIND)
    with KIND.valid(place):
        check_json(found, _SCHEMA)
        check_configuration(found["config"])
        report = QuantizationReport.from_dict(found["report"])
        # clone: the file's tensors sit wherever the header ends, and the same product rounds
        # differently in memory of another alignment
        tensors = {name: tensor.clone() for name, tensor in load_file(files[TENSORS]).items()}
        model_class = _model_class(found["class"])
        # The random initialization is overwritten; the caller's random numbers must not notice it.
        with torch.random.fork_rng(devices=[]):
            module: nn.Module = model_class.from_config(found["config"])
        for layer in report.quantized:
            _put(module, layer.name, found["layers"], tensors)
        _fill(module, tensors)
        if any(isinstance(part, TimedInput) for part in module.modules()):
            tell(module)
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


def _put(
    module: nn.Module, name: str, descriptions: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Replace one layer by what the file says; its tensors are taken out of ``tensors``."""
    start = f"{name}."
    own = {k[len(start) :]: tensors.pop(k) for k in list(tensors) if k.startswith(start)}
    if name not in descriptions:
        raise QuantizationError(f"{DESCRIPTION} does not describe {name!r}")
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


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put every tensor of the file where it belongs, in the file's dtype; none may be left over."""
    inside = _prefixes(module)
    slots = {k: t for k, t in _tensors(module).items() if not k.startswith(inside)}
    missing, unknown = sorted(set(slots) - set(tensors)), sorted(set(tensors) - set(slots))
    different = sorted(k for k in set(slots) & set(tensors) if slots[k].shape != tensors[k].shape)
    if missing or unknown or different:
        raise QuantizationError(
            f"{TENSORS} does not fit the class in {DESCRIPTION}: missing {missing[:5]}, "
            f"unknown {unknown[:5]}, of another shape {different[:5]}. Use "
            "the diffusers version it was saved with."
        )
    for name, old in slots.items():
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent)
        if isinstance(old, nn.Parameter):
            owner._parameters[child] = nn.Parameter(tensors[name], requires_grad=False)
        else:
            owner._buffers[child] = tensors[name]
