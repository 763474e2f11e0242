"""What every picture has without a network: brightness, contrast, colour, sharpness."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.metrics.inputs import checked_images

STATISTICS = ("brightness", "contrast", "saturation", "sharpness")


def per_image_statistics(images: Tensor) -> dict[str, Tensor]:
    """(n,) float64 each: what drift of the sampler moves and feature distances hardly see.

    With Y = .2126 R + .7152 G + .0722 B (BT.709 weights on the values as they are): brightness mean(Y),
    contrast the standard deviation of Y over pixels, saturation mean(max(R, G, B) - min(R, G, B)), sharpness
    the root mean square of the Laplacian of Y (4-neighbour, inner pixels).

    Args:
        images: (n, 3, height, width) in [0, 1], at least 3 x 3.

    Raises:
        MetricError: another shape or range, NaN.

    >>> grey = torch.full((1, 3, 8, 8), 0.5)
    >>> {k: round(v.item(), 6) for k, v in per_image_statistics(grey).items()}
    {'brightness': 0.5, 'contrast': 0.0, 'saturation': 0.0, 'sharpness': 0.0}

    """
    x = checked_images(images, "images").double()
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64, device=x.device)
    y = (x * weights[:, None, None]).sum(1)
    inner = y[:, 1:-1, 1:-1]
    around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return {
        "brightness": y.mean((1, 2)),
        "contrast": y.flatten(1).std(1, correction=0),
        "saturation": (x.amax(1) - x.amin(1)).mean((1, 2)),
        "sharpness": (around - 4 * inner).square().mean((1, 2)).sqrt(),
    }
