"""What the denoisers of the zoo are trained to predict: noise, noise and its variance, or velocity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# (noisy sample, timestep in [0, 1000)) -> model output, for the conditions of one batch
Predict = Callable[[Tensor, Tensor], Tensor]

# Noise-to-signal ends at 14.6, as in Stable Diffusion, also where the original has 157 (linear betas). A
# small network's error in eps is multiplied by that number in its guess of the clean latent; at 157
# colours are lost.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 1000
VARIANCE_WEIGHT = 1e-3  # of the variational bound (Nichol & Dhariwal 2021, section 3.1)


def alphas_cumprod(betas: dict[str, Any] = BETAS) -> Tensor:
    """(1000,) float32, as diffusers' own schedulers compute them."""
    from diffusers import DDPMScheduler

    products: Tensor = DDPMScheduler(**betas).alphas_cumprod
    return products


def stratified(n: int, rng: np.random.Generator) -> Tensor:
    """``n`` numbers in [0, 1), one in every stretch of length 1/n: less noise in the gradient."""
    return torch.from_numpy((rng.permutation(n) + rng.random(n)) / n)


def epsilon_loss(
    predict: Predict,
    x: Tensor,
    rng: np.random.Generator,
    signal: Tensor,
    heaviest: float = math.inf,
) -> Tensor:
    """Squared error of the predicted noise, weighted as an error of v = alpha eps - sigma x0.

    Every noise level counts about the same. Where the network predicts twice the channels, the
    second half is the variance (:func:`variance_bound`).

    Args:
        predict: the denoiser with its conditions.
        x: clean latents (n, channels, h, w).
        rng: of the timesteps; the noise comes from torch's generator.
        signal: (1000,) cumulative products of alphas.
        heaviest: the weight of a level, 1 / alpha^2, is at most this.

    """
    t = (stratified(len(x), rng) * STEPS).long().to(x.device)
    noise, kept = torch.randn_like(x), signal.to(x.device)[t]
    noisy = kept.sqrt()[:, None, None, None] * x + (1 - kept).sqrt()[:, None, None, None] * noise
    output = predict(noisy, t)
    predicted, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
    squared = (predicted - noise).square().mean((1, 2, 3))
    loss: Tensor = (squared / kept.clamp_min(1 / heaviest)).mean()
    if variance.shape[1]:
        bound = variance_bound(x, noisy, predicted.detach(), variance, t, signal.to(x.device))
        loss = loss + VARIANCE_WEIGHT * STEPS * bound.mean()
    return loss


def variance_bound(
    x: Tensor, noisy: Tensor, predicted: Tensor, variance: Tensor, t: Tensor, signal: Tensor
) -> Tensor:
    r"""Divergence of the learned reverse step from the true one, in nats per element, (n,).

    The learned variance is :math:`\exp(v \log \beta_t + (1 - v) \log \tilde\beta_t)` with v in [0, 1]
    (Nichol & Dhariwal 2021, equation 15), the network's output mapped from [-1, 1]; only it gets a
    gradient. At t = 0, where the true variance is 0, that of t = 1 is used, as their code does; their
    likelihood of 8-bit pixels makes no sense for latents and is left out.
    """

    def at(values: Tensor) -> Tensor:
        return values[t][:, None, None, None]

    before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
    betas = 1 - signal / before
    true = betas * (1 - before) / (1 - signal)
    true = torch.cat([true[1:2], true[1:]])
    share = (variance + 1) / 2
    log_variance = share * at(betas.log()) + (1 - share) * at(true.log())
    clean = (noisy - at((1 - signal).sqrt()) * predicted) / at(signal.sqrt())
    error = at(before.sqrt() * betas / (1 - signal)) * (x - clean)  # of the mean
    divergence = (
        -1
        + log_variance
        - at(true.log())
        + (at(true.log()) - log_variance).exp()
        + error.square() * (-log_variance).exp()
    )
    return 0.5 * divergence.mean((1, 2, 3))


def velocity_loss(predict: Predict, x: Tensor, rng: np.random.Generator, signal: Tensor) -> Tensor:
    r"""Squared error of the predicted v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D).

    Args:
        predict: the denoiser with its conditions.
        x: clean latents (n, channels, h, w).
        rng: of the timesteps, stratified; the noise comes from torch's generator.
        signal: (1000,) cumulative products of alphas.

    """
    t = (stratified(len(x), rng) * STEPS).long().to(x.device)
    noise, kept = torch.randn_like(x), signal.to(x.device)[t][:, None, None, None]
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    output = predict(alpha * x + sigma * noise, t)
    squared: Tensor = (output - (alpha * noise - sigma * x)).square().mean()
    return squared


def flow_point(x: Tensor, rng: np.random.Generator, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Noisy samples on straight lines, their timesteps, and the velocity noise - x.

    Lipman et al. 2023. Levels are logit-normal (Esser et al. 2024, equation 19), stratified, and
    shifted as sampling will shift them: :math:`\sigma' = s \sigma / (1 + (s - 1) \sigma)`.

    Args:
        x: clean latents (n, ...).
        rng: of the levels; the noise comes from torch's generator.
        shift: s.

    Returns:
        Noisy samples, timesteps (n,) in (0, 1000), velocities.

    """
    normal = math.sqrt(2) * torch.erfinv(2 * stratified(len(x), rng) - 1)
    sigma = torch.sigmoid(normal).float().to(x.device)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noise, level = torch.randn_like(x), sigma.reshape(-1, *[1] * (x.ndim - 1))
    return level * noise + (1 - level) * x, STEPS * sigma, noise - x
