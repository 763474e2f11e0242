"""Recovery adapters that nobody fitted: random factors beside every layer that can have one."""

from __future__ import annotations

import torch
from synthetic_record import provenance
from torch import nn

from evenkeel.corrections import RecoveryAdapters
from evenkeel.hosts.actuators.beside import shape_of
from evenkeel.hosts.actuators.head_rows import sizes
from evenkeel.low_rank.factors import LayerAdapter, rounded

RANKS = (2, 3, 5)


def made_adapters(
    model: nn.Module,
    pipeline_class: str = "FluxPipeline",
    *,
    denoiser: str = "transformer",
    bits: int = 4,
    ranks: tuple[int, ...] = RANKS,
    size: float = 0.5,
) -> RecoveryAdapters:
    """Ranks change from layer to layer; ``size`` is that of the change over the weight's."""
    generator = torch.Generator().manual_seed(0)
    layers: list[LayerAdapter] = []
    for name, layer in model.named_modules():
        shape = shape_of(layer) if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
        if shape is None:
            continue
        outputs, features = shape
        rank = min(ranks[len(layers) % len(ranks)], features, outputs)
        down, up = (torch.randn(rank, n, generator=generator) for n in (features, outputs))
        kernel = tuple(sizes(layer.kernel_size)) if hasattr(layer, "kernel_size") else ()
        weight = layer.get_parameter("weight").detach().float()
        scale = (size * weight.std() / rank**0.5).sqrt()
        layers.append(
            LayerAdapter(name, rounded(down * scale, bits), rounded(up * scale, bits), kernel)
        )
    return RecoveryAdapters(
        provenance(pipeline_class=pipeline_class, denoiser=denoiser), "local", bits, tuple(layers)
    )
