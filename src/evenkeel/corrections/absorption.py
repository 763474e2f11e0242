"""Hide the error that is left in the noise that the sampler injects anyway (PTQD, D2-DPM)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evenkeel.corrections.drift import drift_step, loadings
from evenkeel.corrections.linear_run import LinearRun
from evenkeel.corrections.plan import OutputEdit, SamplerPlan, plain_plan, stretch_plan
from evenkeel.errors import UnsupportedSampler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence

Absorption = Literal["self-consistent", "released", "none"]


@dataclass(frozen=True)
class Response:
    """How the (edited) network answers its input: ``m = J x + ...``.

    Attributes:
        slope: (K, C) J.
        start: (C,) variance of the first state.

    """

    slope: Tensor
    start: Tensor

    @classmethod
    def of(cls, law: StepLaw, evidence: Evidence, edit: OutputEdit) -> Response:
        """Slope of the edited quantized output on the sample, from calibration's moments."""
        second = evidence.by_channel
        xx = torch.where(second.xx == 0, torch.ones_like(second.xx), second.xx)
        slope = evidence.at(law, (second.xe + second.xd) / xx, log=False)[0]
        start = evidence.at(law, second.xx, log=False)[0][0]
        return cls(edit.gain * slope + edit.sample, start)


def absorb(
    law: StepLaw, variance: Tensor, form: Absorption, notes: list[str], response: Response
) -> SamplerPlan:
    """Inject less noise by the variance that the outputs' error injects.

    A step leaves ``x_det + c z`` and its output's error adds variance ``N = w^2 V``:

        c'^2 = max(c^2 - N, 0)

    ``"self-consistent"`` keeps the deterministic part: deterministic variance + c'^2 + N is what it was.
    ``"released"`` recomputes DDIM's direction term with the smaller noise, as both released codes do:
    the step then also keeps more of the predicted noise, ``sigma_down'^2 = sigma_next^2 - c'^2``, and the
    marginal is too wide by what was taken off.

    Multistep samplers use an output again when its error is already in the state, and the network has
    answered to it: there the variances of all states are propagated through the step law with the
    network's measured linear response (``LinearRun.noise_factors``).

    A sampler that injects nothing has nothing to hide in: the plan is empty, and says so.

    Args:
        law: of the run.
        variance: (K, C) or (K, 1) of the (edited) outputs' error, in their units; NaN where unknown.
        form: ``"none"`` absorbs nothing.
        notes: one per step so far; returned with what limits the absorption.
        response: of the network; used for multistep samplers only.

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
    if law.has_history:
        return _absorb_with_history(law, variance, notes, response)
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
            grown = step.injected * scale**2
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


def _absorb_with_history(
    law: StepLaw, variance: Tensor, notes: list[str], response: Response
) -> SamplerPlan:
    slope = torch.nan_to_num(response.slope).numpy()
    known = torch.nan_to_num(variance).expand(-1, slope.shape[1]).numpy()
    noise = torch.ones(law.steps, slope.shape[1], dtype=torch.float64)
    explained = list(notes)
    for channel in range(slope.shape[1]):
        own = slope[:, channel]
        covariance = np.diag(known[:, channel])
        run = LinearRun(law, float(torch.nan_to_num(response.start)[channel]), own, own, covariance)
        noise[:, channel] = torch.from_numpy(run.noise_factors())
    for k in range(law.steps):
        if bool((noise[k] == 0).any()) and law.noise_weights[k] > 1e-9:
            explained[k] = (
                explained[k] or "the error's variance exceeds the injected noise; a part stays"
            )
    return stretch_plan(law, torch.zeros_like(noise), False, explained, noise)
