"""Recovery adapters beside the quantized layers of a model in ComfyUI."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from evenkeel.errors import Incompatible
from evenkeel.hosts.recognition import distance

from .beside import APPLY_MODEL, LowRank, add_once, attached, layer_of, refuse_compiled

PREFIX, DOWN, UP = "diffusion_model.", ".lora_down.weight", ".lora_up.weight"
RECOGNITION, DIGEST = "evenkeel.recognition", "evenkeel.digest"
#: Of the relative difference of some layers' outputs: 16-bit arithmetic stays below 0.01, another
#: quantization of 4 bits, or none, is above 0.05.
CLOSE = 0.02

Factors = dict[str, tuple[Tensor, Tensor]]


def read(path: str | os.PathLike[str]) -> tuple[Factors, dict[str, str]]:
    """Factors (down, up) by ComfyUI's layer, and what the file says of itself.

    Raises:
        Incompatible: not what ``evenkeel export --layout comfyui`` writes.

    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        names = [k for k in file.keys() if k.startswith(PREFIX) and k.endswith(DOWN)]  # noqa: SIM118
        factors = {}
        for name in names:
            layer = name[len(PREFIX) : -len(DOWN)]
            down, up = file.get_tensor(name), file.get_tensor(PREFIX + layer + UP)
            alpha = float(file.get_tensor(f"{PREFIX}{layer}.alpha"))
            factors[layer] = down, up * (alpha / len(down))
    if not factors or DIGEST not in metadata:
        raise Incompatible(
            f"{path} holds no recovery adapters with ComfyUI's names; expected what evenkeel export "
            f"FOLDER --layout comfyui --out FILE writes. An ordinary LoRA belongs to Load LoRA."
        )
    return factors, metadata


def recover(model: Any, path: str | os.PathLike[str], strength: float, check_base: bool) -> Any:
    """A clone of the model with the adapters of this file beside its layers.

    Args:
        model: of ComfyUI, quantized.
        path: of the file.
        strength: factor on what is added; 0 adds nothing.
        check_base: refuse a model whose layers do not compute what the quantized ones did.

    Raises:
        Incompatible: another model, other weights, or adapters that are merged into it already.

    """
    factors, metadata = read(path)
    network = model.model.diffusion_model
    for name, (down, up) in factors.items():
        layer_of(network, name, (up.shape[0], down[0].numel()))
    _refuse_merged(model, factors)
    if check_base:
        _refuse_foreign(model, metadata, path)
    clone = model.clone()
    if strength == 0:
        return clone
    additions = {name: LowRank(down, up, strength) for name, (down, up) in factors.items()}

    def wrapper(executor: Any, x: Any, t: Any, *arguments: Any, **named: Any) -> Any:
        options = arguments[3] if len(arguments) > 3 else named.get("transformer_options", {})
        refuse_compiled(options)
        with attached(executor.class_obj.diffusion_model, additions):
            return executor(x, t, *arguments, **named)

    add_once(clone, APPLY_MODEL, f"Evenkeel Recover {metadata[DIGEST][:16]}", wrapper)
    return clone


def _refuse_foreign(model: Any, metadata: dict[str, str], path: Any) -> None:
    if RECOGNITION not in metadata:
        raise Incompatible(
            f"{path} does not say how to recognise the quantized model that it was fitted for: it was "
            f"restored by an older version. Restore and export it again, or turn check_base off."
        )
    # Where a LoRA is merged at the moment, the weights are not the model's own.
    merged = set(getattr(model, "backup", ()))
    known = {
        name: entry
        for name, entry in json.loads(metadata[RECOGNITION]).items()
        if f"{PREFIX}{name}.weight" not in merged
    }
    found = distance(model.model.diffusion_model, known) if known else 0.0
    if not found <= CLOSE:
        raise Incompatible(
            f"these adapters belong to another quantization ({metadata.get('evenkeel.quantizer', '')}) of "
            f"this model: its layers' outputs differ by {100 * found:.0f} % from those that the adapters "
            f"were fitted for, expected at most {100 * CLOSE:.0f} %. Load the file that was restored, or "
            f"restore this one."
        )


def _refuse_merged(model: Any, factors: Factors) -> None:
    for key, patches in getattr(model, "patches", {}).items():
        name = str(key).removeprefix(PREFIX).removesuffix(".weight")
        if name in factors and any(_holds(p, factors[name][0]) for p in patches):
            raise Incompatible(
                f"these adapters are merged into {name} by a LoRA loader already, where quantizing it again "
                f"loses most of what they bring. Take that loader out; this node is enough."
            )


def _holds(patch: Any, down: Tensor) -> bool:
    """Whether a weight patch is made of this factor."""
    weights = getattr(patch[1], "weights", ()) if len(patch) > 1 else ()
    return any(
        isinstance(w, Tensor)
        and w.shape == down.shape
        and torch.equal(w.float().cpu(), down.float())
        for w in weights
    )
