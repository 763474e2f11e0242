"""What a metric accepts, refused in one voice otherwise. Everything leaves here in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.statistics.exact import at_home


class BlackImages(UserWarning):
    """Some images are black in every pixel: in 8 bits that is what NaN becomes."""


def black_rows(images: Tensor) -> list[int]:
    """Which of the images (n, ...) are black in every pixel, for whoever scores them to count.

    >>> black_rows(torch.tensor([[0, 1], [0, 0]], dtype=torch.uint8))
    [1]
    """
    return torch.nonzero((images == 0).flatten(1).all(1)).flatten().tolist()


def black_text(rows: list[int], n: int) -> str:
    """How many images are black, and which."""
    shown = f"{', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}"
    return (
        f"{len(rows)} of {n} images are black in every pixel (number {shown}): that is what NaN, or a safety "
        "checker, leaves of a picture. Unless black was asked for, scores with them mean nothing."
    )


def checked_features(features: Tensor, name: str) -> Tensor:
    """Features (n, d) with n >= 3 and d >= 1, finite, as float64 and without gradient."""
    _check_floating(features, name, "features (n, d)", ndim=2)
    n, d = features.shape
    if n < 3 or d < 1:
        # Three, not two: a covariance needs two rows, and the jackknife leaves at least one out.
        raise MetricError(
            f"{name} must hold at least 3 rows (images) of at least 1 feature, so that the value "
            f"and its standard error exist; it holds {n} rows of {d}. Generate more images."
        )
    return _checked_finite(features, name)


def checked_images(images: Tensor, name: str) -> Tensor:
    """Images (n, 3, H, W) with n >= 1 and values in [0, 1], as float64 and without gradient."""
    _check_floating(images, name, "images (n, 3, height, width) in [0, 1]", ndim=4)
    if images.shape[1] != 3 or images.numel() == 0:
        raise MetricError(
            f"{name} must hold at least one image of 3 channels, as (n, 3, height, width); "
            f"it has shape {tuple(images.shape)}. Move the channels to dimension 1."
        )
    images = _checked_finite(images, name)
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise MetricError(
            f"{name} must lie in [0, 1], where the peak of PSNR and SSIM is 1; it reaches from "
            f"{low:g} to {high:g}. Map [-1, 1] by x / 2 + 1/2, bytes by x / 255, and clamp a "
            "pipeline's output where the images are made."
        )
    return images


def checked_values(values: Tensor, name: str) -> Tensor:
    """Values (n,) with n >= 1, finite, as float64 and without gradient."""
    _check_floating(values, name, "one value per image (n,)", ndim=1)
    if values.shape[0] < 1:
        raise MetricError(f"{name} must hold at least one value to have a mean; it is empty.")
    return _checked_finite(values, name)


def check_paired(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Row i of both must belong to the same prompt and noise, so the shapes must be equal."""
    if a.shape != b.shape:
        raise MetricError(
            f"{names[0]} and {names[1]} are compared row by row and must have the same shape; they "
            f"have {tuple(a.shape)} and {tuple(b.shape)}. Pass the same prompts and seeds in both."
        )


def check_same_width(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Both must come from the same feature network."""
    if a.shape[1] != b.shape[1]:
        raise MetricError(
            f"{names[0]} and {names[1]} must have the same number of features; they have "
            f"{a.shape[1]} and {b.shape[1]}. Take both from the same layer of the same network."
        )


def _check_floating(values: Tensor, name: str, expected: str, ndim: int) -> None:
    if values.ndim != ndim:
        raise MetricError(
            f"{name} must be {expected}, with {ndim} dimensions; its shape is "
            f"{tuple(values.shape)}. Reshape or stack it first."
        )
    if not values.is_floating_point():
        raise MetricError(
            f"{name} must be {expected}, in a floating point dtype; it is {values.dtype}. "
            "Convert it explicitly, since only you know its scale."
        )


def _checked_finite(values: Tensor, name: str) -> Tensor:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        rows = (~finite).flatten(1).any(1) if values.ndim > 1 else ~finite
        first = int(rows.nonzero()[0])
        raise MetricError(
            f"{name} must be finite; {int(rows.sum())} of {len(rows)} rows hold NaN or infinity, "
            f"the first is row {first}. Find out what made that row; leaving it out biases the "
            "comparison."
        )
    return at_home(values.detach()).to(torch.float64)
