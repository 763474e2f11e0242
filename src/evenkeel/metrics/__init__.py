"""Features or images in, `Estimate` out; feature networks are loaded elsewhere."""

from __future__ import annotations

from evenkeel.metrics.alignment import alignment as alignment
from evenkeel.metrics.alignment import per_image_alignment as per_image_alignment
from evenkeel.metrics.feature_moments import Gaussian as Gaussian
from evenkeel.metrics.frechet import frechet_between as frechet_between
from evenkeel.metrics.frechet import frechet_difference as frechet_difference
from evenkeel.metrics.frechet import frechet_distance as frechet_distance
from evenkeel.metrics.inception_score import inception_score as inception_score
from evenkeel.metrics.inception_score import (
    inception_score_difference as inception_score_difference,
)
from evenkeel.metrics.inputs import BlackImages as BlackImages
from evenkeel.metrics.inputs import black_rows as black_rows
from evenkeel.metrics.jackknife import jackknife as jackknife
from evenkeel.metrics.jackknife import jackknife_estimate as jackknife_estimate
from evenkeel.metrics.kernel_distance import cmmd as cmmd
from evenkeel.metrics.kernel_distance import cmmd_difference as cmmd_difference
from evenkeel.metrics.kernel_distance import kernel_difference as kernel_difference
from evenkeel.metrics.kernel_distance import kernel_distance as kernel_distance
from evenkeel.metrics.mean import mean_difference as mean_difference
from evenkeel.metrics.mean import mean_estimate as mean_estimate
from evenkeel.metrics.perceptual_distance import (
    per_image_perceptual_distance as per_image_perceptual_distance,
)
from evenkeel.metrics.picture_statistics import per_image_statistics as per_image_statistics
from evenkeel.metrics.precision_recall import per_image_precision as per_image_precision
from evenkeel.metrics.precision_recall import per_image_recall as per_image_recall
from evenkeel.metrics.psnr import per_image_psnr as per_image_psnr
from evenkeel.metrics.psnr import psnr as psnr
from evenkeel.metrics.shift import shift as shift
from evenkeel.metrics.shift import shift_difference as shift_difference
from evenkeel.metrics.ssim import per_image_ssim as per_image_ssim
from evenkeel.metrics.ssim import ssim as ssim

__all__ = [
    "BlackImages",
    "Gaussian",
    "alignment",
    "black_rows",
    "cmmd",
    "cmmd_difference",
    "frechet_between",
    "frechet_difference",
    "frechet_distance",
    "inception_score",
    "inception_score_difference",
    "jackknife",
    "jackknife_estimate",
    "kernel_difference",
    "kernel_distance",
    "mean_difference",
    "mean_estimate",
    "per_image_alignment",
    "per_image_perceptual_distance",
    "per_image_precision",
    "per_image_psnr",
    "per_image_recall",
    "per_image_ssim",
    "per_image_statistics",
    "psnr",
    "shift",
    "shift_difference",
    "ssim",
]
