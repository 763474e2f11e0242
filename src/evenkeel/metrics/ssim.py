"""Structural similarity, image by image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.estimate import Estimate
from evenkeel.metrics.inputs import check_paired, checked_images
from evenkeel.metrics.mean import mean_estimate

WINDOW = 11
SIGMA = 1.5
C1 = 0.01**2
C2 = 0.03**2
_BATCH = 64  # images at a time: bounds memory, changes nothing else


def per_image_ssim(images: Tensor, reference: Tensor) -> Tensor:
    """How alike each image and its reference are in local mean, contrast and structure; 1 is equal.

    SSIM = (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))

    with local moments under a Gaussian window of 11 x 11 pixels and sigma 1.5, C1 = 0.01^2 and
    C2 = 0.03^2 for a peak of 1, averaged over all pixels and the three channels.

    images, reference: (n, 3, H, W) in [0, 1], H and W at least 11, any floating dtype. Returns
    (n,), float64. Raises MetricError for NaN, values outside [0, 1] and shapes that do not match.

    Source: Wang et al. 2004, equation 13. Implementations differ at the border and in colour: this
    one mirrors the border and averages the channels, like torchmetrics; scikit-image leaves the
    border out; the original works on grey images.

    >>> grey = torch.full((1, 3, 16, 16), 0.5)
    >>> per_image_ssim(grey, grey).tolist()
    [1.0]
    """
    images, reference = checked_images(images, "images"), checked_images(reference, "reference")
    check_paired(images, reference, ("images", "reference"))
    if min(images.shape[2:]) < WINDOW:
        raise MetricError(
            f"SSIM looks through a window of {WINDOW} x {WINDOW} pixels, so images must be at "
            f"least that large; these are {images.shape[2]} x {images.shape[3]}. Use psnr for them."
        )
    pairs = zip(torch.split(images, _BATCH), torch.split(reference, _BATCH), strict=True)
    return torch.cat([_ssim(x, y) for x, y in pairs])


def ssim(images: Tensor, reference: Tensor) -> Estimate:
    """How alike images and their references are on average: the mean of `per_image_ssim`.

    Compare two arms by `mean_difference(per_image_ssim(a, r), per_image_ssim(b, r))`. Shapes, range
    and refusals as for `per_image_ssim`.

    >>> grey = torch.full((2, 3, 16, 16), 0.5)
    >>> ssim(grey, grey).value
    1.0
    """
    return mean_estimate(per_image_ssim(images, reference))


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y = _blur(x), _blur(y)
    # Cancellation here is 1e-16 in float64, far below C2 = 9e-4; in float32 it would show.
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * cov + C2) / (var_x + var_y + C2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """The Gaussian window, along one axis and then the other, with mirrored borders."""
    reach = WINDOW // 2
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    window = window / window.sum()
    planes = F.pad(x.flatten(0, 1)[:, None], (reach,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(planes, window[None, None, None, :]), window[None, None, :, None])
    return blurred.view_as(x)
