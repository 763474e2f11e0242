"""Recognise a quantized denoiser in another program, which has other names and fuses layers.

A fingerprint of bytes is of no use there. What a layer gives for a fixed input is the same wherever it is
computed, up to rounding, and another for other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.record.comfyui_names import place_of

LAYERS, ROWS = 16, 4
RECOGNITION = "recognition.json"  # in the folder that ``restore`` writes

# A layer's size, the first of the compared rows, and their outputs.
Entry = dict[str, Any]


def recognition(denoiser: nn.Module, names: list[str]) -> dict[str, Entry]:
    """Some outputs of up to 16 of these layers, spread evenly; of linear layers alone.

    Args:
        denoiser: quantized, as it is used.
        names: of layers.

    Example: see ``distance``.

    """
    layers: dict[str, Any] = dict(denoiser.named_modules())
    linear = [n for n in names if hasattr(layers.get(n), "in_features")]
    chosen = linear[:: max(1, -(-len(linear) // LAYERS))]
    return {
        name: {
            "inputs": int(layers[name].in_features),
            "outputs": int(layers[name].out_features),
            "row": 0,
            "values": [round(v, 6) for v in _outputs(layers[name]).tolist()[:ROWS]],
        }
        for name in chosen
    }


def in_comfyui(known: Mapping[str, Entry], pipeline_class: str) -> dict[str, Entry]:
    """The same with the names of ComfyUI's model, where they are known; rows of a fused layer shift."""
    namer = place_of(pipeline_class)
    found: dict[str, Entry] = {}
    for name, entry in known.items():
        place = None if namer is None else namer(name)
        if place is None or place.layer in found:
            continue
        row = sum(place.widths[: place.part]) * entry["inputs"]
        if place.halves and entry["outputs"] == 2 * entry["inputs"]:
            row += entry["inputs"]
        found[place.layer] = {**entry, "row": row}
    return found


def distance(denoiser: nn.Module, known: Mapping[str, Entry]) -> float:
    """Relative distance of all compared outputs; infinite where a layer lacks.

    >>> net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    >>> known = recognition(net, ["0", "1"])
    >>> distance(net, known) < 1e-5
    True
    >>> _ = net[0].weight.data.mul_(1.1)
    >>> distance(net, known) > 0.01
    True

    """
    apart = size = 0.0
    layers: dict[str, Any] = dict(denoiser.named_modules())
    for name, entry in known.items():
        layer = layers.get(name)
        if layer is None or int(getattr(layer, "in_features", 0)) != entry["inputs"]:
            return float("inf")
        expected = torch.tensor(entry["values"])
        outputs = _outputs(layer)[entry["row"] :][: len(expected)]
        if outputs.shape != expected.shape:
            return float("inf")
        apart += float((outputs - expected).square().sum())
        size += float(expected.square().sum())
    return (apart / size) ** 0.5 if size > 0 else float("inf" if apart else 0.0)


@torch.no_grad()
def _outputs(layer: Any) -> Tensor:
    """(outputs,) float32 for an input that depends on the layer's width alone."""
    width = int(layer.in_features)
    seed = int.from_bytes(hashlib.sha256(f"evenkeel {width}".encode()).digest()[:7], "big")
    x = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(seed))
    first = next(iter((*layer.parameters(), *layer.buffers())), None)
    if first is not None and first.device.type != "meta":
        half = first.dtype in (torch.float16, torch.bfloat16)
        x = x.to(first.device, first.dtype if half else torch.float32)
    out: Tensor = layer(x)
    return out.flatten().float().cpu()
