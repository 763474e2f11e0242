"""A denoiser's cheap identity: whether its weights or adapters moved, without reading the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.hosts.pipeline.pipelines import uncompiled

_LOOKED_AT, _ENTRIES = 24, 16


@dataclass(frozen=True)
class Identity:
    """What changes when a denoiser does.

    Attributes:
        weights: which tensors there are, how often each was written, and a few of their entries.
        adapters: which are loaded, active and how strongly, as PEFT keeps it in the layers.

    """

    weights: tuple[Any, ...]
    adapters: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Identity:
        """Of a denoiser as it is now, compiled or not."""
        model = uncompiled(module)
        offloaded = any(hasattr(part, "_hf_hook") for part in model.modules())
        tensors = [*model.named_parameters(), *model.named_buffers()]
        weights = tuple(_entry(name, tensor, offloaded) for name, tensor in tensors)
        return cls((weights, _sample([t for _, t in tensors])), _adapters(model))


def _entry(name: str, tensor: Tensor, offloaded: bool) -> tuple[Any, ...]:
    if tensor.device.type == "meta":  # its weights are brought for every call, each time anew
        return name, tuple(tensor.shape)
    version = 0 if tensor.is_inference() else tensor._version
    place = 0 if offloaded or type(tensor) not in (nn.Parameter, Tensor) else tensor.data_ptr()
    return name, id(tensor), version, place


def _sample(tensors: list[Tensor]) -> tuple[float, ...]:
    """Entries of some tensors: what is written through ``.data`` raises no version."""
    plain = [
        t
        for t in tensors
        if type(t) in (nn.Parameter, Tensor)
        and t.device.type != "meta"
        and t.is_floating_point()
        and t.numel()
        and t.element_size() >= 2
    ]
    chosen = plain[:: max(1, len(plain) // _LOOKED_AT)] + plain[-2:]
    with torch.no_grad():
        parts = [t.detach().reshape(-1)[:_ENTRIES].float() for t in chosen if t.is_contiguous()]
        by_device: dict[torch.device, list[Tensor]] = {}
        for part in parts:
            by_device.setdefault(part.device, []).append(part)
        return tuple(v for group in by_device.values() for v in torch.cat(group).tolist())


def _adapters(model: nn.Module) -> tuple[Any, ...]:
    found: list[Any] = []
    for name, part in model.named_modules():
        scaling = getattr(part, "scaling", None)
        if hasattr(part, "base_layer") and isinstance(scaling, dict):
            active = getattr(part, "active_adapters", ())
            merged = tuple(getattr(part, "merged_adapters", ()))
            off = bool(getattr(part, "disable_adapters", False))
            found.append((name, str(active), off, merged, tuple(sorted(scaling.items()))))
    return tuple(found)
