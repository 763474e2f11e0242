"""Gaussian data and its exact denoiser: what calibration measures on it, without sampling error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers as d
import numpy as np
import torch
from synthetic_evidence import moments_of

from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.sampling.prediction import clean_output, epsilon_form
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.testing.scheduler_cases import SD_BETAS

SCALARS = LatentLayout(ndim=4, axis=1, channels=1, patch=1)


class Pipeline:
    """Stands for the pipeline that a correction is bound to."""


PIPELINE = Pipeline()


def denoiser(law: StepLaw, k: int, s: float) -> float:
    """g of the exact denoiser's output g x at step k, for data of standard deviation s."""
    a, n = law.alpha[k], law.sigma[k]
    total = a * a * s * s + n * n
    return clean_output(law.prediction, a, n, x0=a * s * s / total, eps=n / total)


def error_variance(law: StepLaw, v: float) -> Array:
    """White error of variance v on the noise prediction, in units of the raw output.

    Where the noise cannot be told from the output (flow matching at alpha = 0) v itself.
    """
    forms = [
        epsilon_form(law.prediction, a, n)
        for a, n in zip(law.alpha[:-1], law.sigma[:-1], strict=True)
    ]
    return np.array([v / f.to_eps**2 if abs(f.to_eps) > 0.01 else v for f in forms])


def karras(steps: int) -> Array:
    """14.6 to 0.03, rho = 7, and the final zero (Karras et al. 2022, Eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    levels = (14.6 ** (1 / 7) + ramp * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7
    return np.append(levels, 0.0)


def euler(steps: int) -> Any:
    scheduler = d.EulerDiscreteScheduler(**SD_BETAS)
    scheduler.set_timesteps(sigmas=karras(steps).tolist())
    return scheduler


def autoregressive(steps: int, rho: float) -> np.ndarray:
    lags = np.abs(np.subtract.outer(np.arange(steps), np.arange(steps)))
    return np.asarray(rho**lags, dtype=np.float64)


def evidence(law: StepLaw, s: float, errors: np.ndarray, rho: float, gain: float = 0.0) -> Evidence:
    """What calibration measures on Gaussian data with these errors, without sampling error."""
    slope = np.array([denoiser(law, k, s) for k in range(law.steps)])
    xx = (law.alpha[:-1] * s) ** 2 + law.sigma[:-1] ** 2
    xe, ee = slope * xx, slope**2 * xx
    dd = errors + gain**2 * ee
    moments = moments_of(
        *(a[None, :, None] for a in (ee, gain * ee, dd)), xx=xx[None, :, None], xe=xe[None, :, None]
    )
    xd = torch.from_numpy(gain * xe)[None, :, None] * moments.count
    covariance = autoregressive(law.steps, rho) * np.sqrt(np.outer(errors, errors))
    gram = torch.from_numpy(covariance)[None].float()
    return Evidence(
        law.prediction, law.alpha[:-1], law.sigma[:-1], replace(moments, s_xd=xd), gram=gram
    )
