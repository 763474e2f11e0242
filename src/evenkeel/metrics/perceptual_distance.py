"""A distance of two pictures in the activations of a network, layer by layer and place by place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.statistics.exact import at_home


def per_image_perceptual_distance(maps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """(n,) mean over layers of the mean over places of |u - v|^2, u and v of unit length over channels.

    LPIPS (Zhang et al. 2018, arXiv:1801.03924) with every channel's weight 1 and any network's activations:
    the numbers are LPIPS's only with LPIPS's network and weights. 0 for equal pictures, at most 4.

    Args:
        maps: activations (n, channels, height, width) of one picture per row, one tensor per layer.
        reference: the same of the pictures that they are compared with.

    Returns:
        float64.

    Raises:
        MetricError: no layers, unequal shapes, NaN.

    >>> x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> [round(per_image_perceptual_distance([x], [y]).mean().item(), 6) for y in (x, -x)]
    [0.0, 4.0]

    """
    shapes = [tuple(m.shape) for m in maps]
    if (
        not shapes
        or shapes != [tuple(m.shape) for m in reference]
        or any(len(s) != 4 for s in shapes)
    ):
        raise MetricError(
            f"expected activations (n, channels, height, width) of the same layers for both sides, got "
            f"{shapes} and {[tuple(m.shape) for m in reference]}."
        )
    layers = []
    for ours, theirs in zip(maps, reference, strict=True):
        wide = (at_home(m).double() for m in (ours, theirs))
        u, v = (m / (m.norm(dim=1, keepdim=True) + 1e-10) for m in wide)
        layers.append((u - v).square().sum(1).mean((1, 2)))
    found = torch.stack(layers).mean(0)
    if not bool(found.isfinite().all()):
        raise MetricError(
            f"{int((~found.isfinite()).sum())} of {len(found)} pictures have activations that are NaN or "
            "infinite."
        )
    return found
