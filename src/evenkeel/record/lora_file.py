"""Recovery adapters as an ordinary LoRA file, for loaders that know nothing of this library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from evenkeel.corrections.recovery_adapters import RecoveryAdapters
from evenkeel.errors import RecordError
from evenkeel.low_rank.factors import LayerAdapter
from evenkeel.record.comfyui_lora import in_comfyui
from evenkeel.storage import safetensors_bytes, write_atomically

LAYOUTS = ("peft", "kohya", "comfyui")
FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # what peft looks for
_PEFT_PREFIX = "base_model.model"
_DIFFUSERS_METADATA = "lora_adapter_metadata"


def write_lora(
    adapters: RecoveryAdapters,
    path: str | os.PathLike[str],
    layout: str = "peft",
    recognition: Mapping[str, Any] | None = None,
) -> Path:
    """The same values in 16 bits, as a LoRA: ``pipe.load_lora_weights`` loads it.

    It belongs beside the quantized layers it was fitted for: fused into them and quantized again, most of
    what it brings is lost, and beside other weights it is wrong. The metadata say so.

    Args:
        adapters: at least one.
        path: a file; with layout ``peft`` usually ``<folder>/pytorch_lora_weights.safetensors``.
        layout: ``peft`` (diffusers, peft: ``transformer.<layer>.lora_A.weight``) or ``kohya``
            (``lora_unet_<layer with underscores>.lora_down.weight``, with ``.alpha``) or ``comfyui``
            (the names of ComfyUI's own model: ``diffusion_model.<its layer>.lora_down.weight``).
        recognition: how the quantized denoiser is recognised there, see ``hosts.recognition``.

    Raises:
        RecordError: no adapters, an unknown layout, or layers whose place in ComfyUI is not known.

    """
    if layout not in LAYOUTS or not adapters.layers:
        raise RecordError(
            f"expected a layout out of {LAYOUTS} and adapters of at least one layer; got {layout!r} and "
            f"{len(adapters.layers)} layers."
        )
    tensors: dict[str, Tensor] = {}
    denoiser = adapters.provenance.denoiser
    if layout == "comfyui":
        tensors = _comfyui(adapters)
    else:
        for layer in adapters.layers:
            tensors |= _peft(layer, denoiser) if layout == "peft" else _kohya(layer)
    metadata = {"format": "pt", **_said(adapters)}
    if recognition:
        metadata["evenkeel.recognition"] = json.dumps(recognition, sort_keys=True)
    if layout == "peft":
        config = {f"{denoiser}.{key}": value for key, value in _config(adapters).items()}
        metadata[_DIFFUSERS_METADATA] = json.dumps(config, sort_keys=True)
    return write_atomically(Path(path), safetensors_bytes(tensors, metadata))


def peft_files(adapters: RecoveryAdapters, base_model: str | None = None) -> dict[str, bytes | str]:
    """The two files of a folder that ``peft.PeftModel.from_pretrained(denoiser, folder)`` loads.

    Args:
        adapters: of at least one layer.
        base_model: hub id of the pipeline, where it has one.

    """
    tensors: dict[str, Tensor] = {}
    for layer in adapters.layers:
        tensors |= _peft(layer, _PEFT_PREFIX)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "inference_mode": True,
        **_config(adapters),
    }
    return {
        PEFT_FILE: safetensors_bytes(tensors, {"format": "pt", **_said(adapters)}),
        PEFT_CONFIG: json.dumps(config, indent=1, sort_keys=True) + "\n",
    }


def _config(adapters: RecoveryAdapters) -> dict[str, Any]:
    """What peft's ``LoraConfig`` needs so that every layer's scale is 1.

    peft takes a plain name for the end of one: ``proj_out`` for ``blocks.0.proj_out``, too. As
    patterns they are exact.
    """
    ranks = {layer.name: layer.rank for layer in adapters.layers}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": "|".join(map(re.escape, sorted(ranks))),
        "lora_bias": False,
        "use_dora": False,
    }


def _peft(layer: LayerAdapter, prefix: str) -> dict[str, Tensor]:
    down, up = _pair(layer)
    name = f"{prefix}.{layer.name}"
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def _kohya(layer: LayerAdapter) -> dict[str, Tensor]:
    # Loaders scale by alpha / rank. diffusers loses alphas that differ from layer to layer, without an
    # error of its own, so that they are all 1 and the rank stands in the factor.
    down, up = _pair(layer)
    name = f"lora_unet_{layer.name.replace('.', '_')}"
    return {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": (up.float() * layer.rank).half(),
        f"{name}.alpha": torch.tensor(1.0),
    }


def _comfyui(adapters: RecoveryAdapters) -> dict[str, Tensor]:
    pairs = ((layer.name, _pair(layer)) for layer in adapters.layers)
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in in_comfyui(pairs, adapters.provenance.pipeline_class).items():
        tensors |= {
            f"diffusion_model.{layer}.lora_down.weight": down,
            f"diffusion_model.{layer}.lora_up.weight": up,
            f"diffusion_model.{layer}.alpha": torch.tensor(float(len(down))),
        }
    return tensors


def _pair(layer: LayerAdapter) -> tuple[Tensor, Tensor]:
    """Down (r, F) and up (O, r); of a convolution (r, C, k, k) and (O, r, 1, 1)."""
    down, up = layer.down.dense().half(), layer.up.dense().T.contiguous().half()
    if layer.kernel:
        down = down.reshape(len(down), -1, *layer.kernel)
        up = up.reshape(*up.shape, *(1 for _ in layer.kernel))
    return down.contiguous(), up


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether `write_lora` wrote this file, by what it says itself."""
    try:
        with safe_open(Path(path), framework="pt") as file:
            return "evenkeel.digest" in (file.metadata() or {})
    except Exception:  # no file, or whatever a hostile one provokes in the parser
        return False


def _said(adapters: RecoveryAdapters) -> dict[str, str]:
    made_for = adapters.provenance
    return {
        "evenkeel.quantized": made_for.quantized,
        "evenkeel.reference": made_for.reference,
        "evenkeel.quantizer": made_for.quantizer,
        "evenkeel.digest": adapters.digest(),
        "evenkeel.use": "beside the quantized layers; never fuse it into them",
    }
