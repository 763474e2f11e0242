"""Peak signal-to-noise ratio, image by image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evenkeel.estimate import Estimate
from evenkeel.metrics.inputs import check_paired, checked_images
from evenkeel.metrics.mean import mean_estimate


def per_image_psnr(images: Tensor, reference: Tensor) -> Tensor:
    """How far each image is from its reference, in dB; higher is closer, infinite is identical.

    -10 log10 mean((x - r)^2), the peak being 1 and the mean over channels and pixels.

    images, reference: (n, 3, H, W) in [0, 1], any floating dtype. Returns (n,), float64. Raises
    MetricError for NaN, values outside [0, 1] and shapes that do not match.

    >>> grey = torch.full((1, 3, 8, 8), 0.5)
    >>> per_image_psnr(grey, grey + 0.125).tolist()
    [18.06179973983887]
    """
    images, reference = checked_images(images, "images"), checked_images(reference, "reference")
    check_paired(images, reference, ("images", "reference"))
    mse = (images - reference).square().flatten(1).mean(1)
    return -10 * torch.log10(mse)


def psnr(images: Tensor, reference: Tensor) -> Estimate:
    """How far images are from their references on average, in dB: the mean of `per_image_psnr`.

    The mean of the logarithms, as is usual, not the logarithm of the mean error. Where an image is
    identical to its reference the mean is infinite and is reported so, with NaN as standard error
    and interval; compare such arms by `ssim`. Compare two arms by
    `mean_difference(per_image_psnr(a, r), per_image_psnr(b, r))`.

    Shapes, range and refusals as for `per_image_psnr`.

    >>> grey = torch.full((2, 3, 8, 8), 0.5)
    >>> psnr(grey, grey).value
    inf
    """
    values = per_image_psnr(images, reference)
    if bool(torch.isinf(values).any()):
        return Estimate(math.inf, math.nan, math.nan, math.nan, len(values))
    return mean_estimate(values)
