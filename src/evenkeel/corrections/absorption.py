"""Hide the error that is left in the noise that the sampler injects anyway (PTQD, D2-DPM)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from evenkeel.corrections.drift import drift_step, loadings
from evenkeel.corrections.plan import SamplerPlan, plain_plan, stretch_plan
from evenkeel.errors import UnsupportedSampler
from evenkeel.sampling.step_law import StepLaw

Absorption = Literal["self-consistent", "released", "none"]


def absorb(law: StepLaw, variance: Tensor, form: Absorption, notes: list[str]) -> SamplerPlan:
    """Inject less noise by the variance that the outputs' error injects.

    A step leaves ``x_det + c z`` and its output's error adds variance ``N = w^2 V``:

        c'^2 = max(c^2 - N, 0)

    ``"self-consistent"`` keeps the deterministic part: deterministic variance + c'^2 + N is what it was.
    ``"released"`` recomputes DDIM's direction term with the smaller noise, as both released codes do:
    the step then also keeps more of the predicted noise, ``sigma_down'^2 = sigma_next^2 - c'^2``, and the
    marginal is too wide by what was taken off. For multistep samplers N includes the covariance with
    the error that is already in the state (see ``DriftStep.net``).

    A sampler that injects nothing has nothing to hide in: the plan is empty, and says so.

    Args:
        law: of the run.
        variance: (K, C) or (K, 1) of the (edited) outputs' error, in their units; NaN where unknown.
        form: ``"none"`` absorbs nothing.
        notes: one per step so far; returned with what limits the absorption.

    Raises:
        UnsupportedSampler: ``"released"`` on a multistep sampler.

    """
    if form == "none" or not law.is_stochastic:
        return plain_plan(law, notes)
    if form == "released" and law.has_history:
        raise UnsupportedSampler(
            f"the released form is written for one-step samplers (DDIM, DDPM); {law.sampler} uses "
            f"earlier outputs. Use absorb='self-consistent'."
        )
    noise, c = torch.ones_like(variance), torch.zeros_like(variance)
    held = loadings(law, along_output=False)
    explained = list(notes)
    for k in range(law.steps):
        injected = float(law.noise_weights[k])
        if injected <= 1e-9 or not bool(torch.isfinite(variance[: k + 1]).all()):
            continue
        scale = float(law.alpha[k + 1])
        for channel in range(variance.shape[1]):
            step = drift_step(law, k, variance[:, channel], False, held)
            grown = step.net * scale**2
            left = injected**2 - grown
            if left < 0:
                explained[k] = explained[k] or (
                    f"{100 * -left / grown:.0f} % of the error's variance exceeds the injected noise "
                    f"and stays"
                )
            noise[k, channel] = math.sqrt(max(left, 0.0)) / injected
            if form == "released" and step.length > 0:
                total = float(law.sigma[k + 1]) ** 2 - max(left, 0.0)
                target = math.sqrt(max(total, 0.0)) / scale
                c[k, channel] = (step.target - target) / step.length
    return stretch_plan(law, c, False, explained, noise)
