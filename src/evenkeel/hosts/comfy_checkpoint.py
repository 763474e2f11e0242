"""ComfyUI's quantized checkpoints, read into a diffusers denoiser and written.

One safetensors file: of a quantized layer ``weight`` holds codes, beside it stand ``weight_scale`` and
what else the format needs, and its settings are JSON, either in the file's metadata
(``_quantization_metadata``) or as bytes in a tensor (``comfy_quant``). comfy-kitchen computes with them.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.backends.comfy_kitchen import FORMATS
from evenkeel.record.comfyui_names import Place, place_of
from evenkeel.storage import safetensors_bytes, write_atomically

_METADATA, _MARK = "_quantization_metadata", "comfy_quant"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_LAYOUTS = {text: layout for layout, (text, _) in FORMATS.items()}
_LAYOUTS["float8_e5m2"] = _LAYOUTS["float8_e4m3fn"]
# Field of comfy-kitchen's parameters -> end of its name in a file. What is optional may be missing.
_FIELDS = {
    "nvfp4": {"scale": "_scale_2", "block_scale": "_scale"},
    "awq_w4a16": {"scale": "_scale", "zeros": "_zeros"},
    "asym_w4a8_int8": {
        "scale": "_s_rel", "s_channel": "_s_channel", "correction": "_correction", "codebook": "_codebook"
    },
}  # fmt: skip
_OPTIONAL = ("correction", "codebook")
_SETTINGS = ("convrot", "convrot_groupsize", "quant_group_size", "linear_dtype", "group_size")
_BLOCKED = ("nvfp4", "mxfp8")  # their scales are stored in tiles of 128 rows


def is_comfy_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that some of its layers are quantized as ComfyUI does it."""
    place = Path(path)
    if place.suffix != ".safetensors" or not place.is_file():
        return False
    with safe_open(place, "pt") as file:
        return _METADATA in (file.metadata() or {}) or any(
            k.endswith(f".{_MARK}") for k in list(file.keys())
        )


def load_comfy(
    path: str | os.PathLike[str], reference: nn.Module, pipeline_class: str
) -> nn.Module:
    """A copy of the reference whose linear layers and convolutions are those of the file.

    Names are diffusers' own or ComfyUI's; of a layer that is fused there (q, k and v), every part gets its
    rows of codes and scales, nothing is quantized anew. What is no such layer (norms, tables) is the
    reference's.

    Args:
        path: of the file.
        reference: the pipeline's own denoiser.
        pipeline_class: of diffusers; says how ComfyUI names its layers.

    Raises:
        UnsupportedPipeline: comfy-kitchen is not installed, the file is of another network, or a format
            or a setting that is not known.

    """
    if importlib.util.find_spec("comfy_kitchen") is None:
        raise UnsupportedPipeline(
            f"{path} holds layers that comfy-kitchen computes, which is not installed: pip install "
            f"'evenkeel[comfy-kitchen]'."
        )
    with safe_open(Path(path), "pt") as file:
        found = _File(path, file, reference, pipeline_class)
        exchanged = dict(found.parameters())
    if not exchanged:
        raise UnsupportedPipeline(
            f"no layer in {path} is one of a {type(reference).__name__}; expected its names or those of "
            f"ComfyUI's model for a {pipeline_class}. Is it a checkpoint of another network?"
        )
    # A parameter that the copy finds in its memory is not copied.
    memory = {id(reference.get_parameter(name)): new for name, new in exchanged.items()}
    return copy.deepcopy(reference, memory)


def write_comfy(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], prefix: str = ""
) -> Path:
    """Write parameters, some of them comfy-kitchen's, as ComfyUI reads them.

    Args:
        weights: parameters by name, as of ``named_parameters``; quantized ones end in ``.weight``.
        path: of the file.
        prefix: of all names, such as ``model.diffusion_model.``

    Raises:
        UnsupportedPipeline: a layout that ComfyUI's files do not have.

    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in weights.items():
        if not hasattr(tensor, "layout_cls"):
            tensors[prefix + name] = tensor.detach().contiguous()
            continue
        weight: Any = tensor
        _, said = weight.__tensor_flatten__()
        text = FORMATS.get(said["layout_cls"], ("", None))[0]
        if text not in _LAYOUTS or text.startswith("svdquant"):
            raise UnsupportedPipeline(
                f"{name} has the layout {said['layout_cls']}, which ComfyUI's files do not hold; expected "
                f"one of {', '.join(_LAYOUTS)}."
            )
        if "e5m2" in str(weight.storage_dtype):
            text = "float8_e5m2"
        layer = (prefix + name).removesuffix(".weight")
        fields = said["non_tensor_fields"]
        layers[layer] = {"format": text, **{k: fields[k] for k in _SETTINGS if k in fields}}
        for end, part in weight.state_dict().items():
            tensors[f"{layer}.weight{end}"] = part.contiguous()
        tensors[f"{layer}.{_MARK}"] = _bytes_of(layers[layer])
    metadata = {"format": "pt", _METADATA: json.dumps({"format_version": "1.0", "layers": layers})}
    return write_atomically(Path(path), safetensors_bytes(tensors, metadata))


def _bytes_of(settings: dict[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)


class _File:
    """One checkpoint, and where in it the layers of a denoiser stand."""

    def __init__(self, path: Any, file: Any, reference: nn.Module, pipeline_class: str) -> None:
        self._path, self._file, self._keys = path, file, set(file.keys())
        self._layers = {
            name: layer
            for name, layer in reference.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        }
        said = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        self._settings: dict[str, Any] = said.get("layers", {})
        namer = place_of(pipeline_class)
        self._rows: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self._places: dict[str, Place] = {}
        for name in self._layers:
            own = self._known(name) is not None
            place = Place(name) if own or namer is None else namer(name)
            if place is not None and self._known(place.layer) is not None:
                self._places[name] = place
                self._rows[place.layer].append((place.part, name))

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name in the reference, and what the file has in its place."""
        for name, place in self._places.items():
            layer = self._layers[name]
            start = sum(
                self._layers[other].weight.shape[0]
                for part, other in self._rows[place.layer]
                if part < place.part
            )
            rows = torch.arange(start, start + layer.weight.shape[0])
            if place.halves and len(rows) == 2 * layer.weight.shape[1]:
                rows = torch.cat(rows.chunk(2)[::-1])
            stem = f"{self._known(place.layer)}{place.layer}"
            yield (
                f"{name}.weight",
                nn.Parameter(self._weight(stem, rows, layer), requires_grad=False),
            )
            if layer.bias is not None and f"{stem}.bias" in self._keys:
                bias = self._file.get_tensor(f"{stem}.bias")[rows].to(layer.bias.dtype)
                yield f"{name}.bias", nn.Parameter(bias, requires_grad=False)

    def _known(self, layer: str) -> str | None:
        """The prefix with which this layer is in the file; None if it is not."""
        return next((p for p in _PREFIXES if f"{p}{layer}.weight" in self._keys), None)

    def _weight(self, stem: str, rows: Tensor, layer: Any) -> Tensor:
        codes = self._file.get_tensor(f"{stem}.weight")
        settings = self._settings.get(stem)
        if f"{stem}.{_MARK}" in self._keys:
            settings = json.loads(self._file.get_tensor(f"{stem}.{_MARK}").numpy().tobytes())
        like: Tensor = layer.weight
        if settings is None:
            plain: Tensor = codes[rows].reshape(like.shape).to(like.dtype)
            return plain
        text = settings.get("format")
        if text not in _LAYOUTS or f"{stem}.pre_quant_scale" in self._keys:
            raise UnsupportedPipeline(
                f"{stem} in {self._path} has the format {text!r}"
                f"{'' if text not in _LAYOUTS else ' with scaled inputs (pre_quant_scale)'}; expected one of "
                f"{', '.join(_LAYOUTS)}, without."
            )
        kitchen = importlib.import_module("comfy_kitchen.tensor")
        fields: dict[str, Any] = {}
        for field, end in _FIELDS.get(text, {"scale": "_scale"}).items():
            if f"{stem}.weight{end}" in self._keys or field not in _OPTIONAL:
                fields[field] = self._file.get_tensor(f"{stem}.weight{end}")
        fields |= {key: settings[key] for key in _SETTINGS if key in settings}
        whole = codes.shape[0]
        fields = {key: _taken(text, key, value, rows, whole) for key, value in fields.items()}
        kind = kitchen.get_layout_class(_LAYOUTS[text]).Params
        known = {key: value for key, value in fields.items() if key in kind.__dataclass_fields__}
        params = kind(orig_dtype=like.dtype, orig_shape=tuple(like.shape), **known)
        if text in _BLOCKED:  # padded to whole blocks
            size = 16 if text == "nvfp4" else 32
            codes = torch.nn.functional.pad(
                codes[rows].view(torch.uint8), (0, 0, 0, -len(rows) % size)
            ).view(codes.dtype)
        else:
            codes = codes[rows]
        found: Tensor = kitchen.QuantizedTensor(codes, _LAYOUTS[text], params)
        return found


def _taken(text: str, field: str, value: Any, rows: Tensor, whole: int) -> Any:
    """These rows of a scale; what belongs to the whole tensor as it is."""
    if text == "mxfp8" and field == "scale":
        value = value.view(torch.float8_e8m0fnu)
    if field == "scale" and value.dtype == torch.uint8:  # bytes of float8
        value = value.view(torch.float8_e4m3fn)
    if text in _BLOCKED and field == ("block_scale" if text == "nvfp4" else "scale"):
        tiles = importlib.import_module("comfy_kitchen.float_utils")
        plain = tiles.from_blocked(value.view(torch.uint8), *value.shape)[rows]
        return tiles.to_blocked(plain, flatten=False).view(value.dtype)
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == whole and field != "codebook":
        return value[rows]
    return value
