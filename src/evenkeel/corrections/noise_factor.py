"""Multiply the predicted noise, whatever the network predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.corrections.plan import OutputEdit, SamplerPlan, plain_plan
from evenkeel.sampling.prediction import epsilon_form
from evenkeel.sampling.step_law import StepLaw


def noise_factor_plan(law: StepLaw, factor: Tensor) -> SamplerPlan:
    """``eps' = factor eps`` as an edit of raw outputs.

    With ``eps = u m + w x``: ``m' = factor m + (factor - 1) (w / u) x``. A step at which the noise does
    not depend on the output (flow matching at alpha = 0) is left alone.

    Args:
        law: of the run.
        factor: (K, C) or (K, 1) float64.

    """
    gain, sample, notes = factor.clone(), torch.zeros_like(factor), []
    for k in range(law.steps):
        form = epsilon_form(law.prediction, float(law.alpha[k]), float(law.sigma[k]))
        if abs(form.to_eps) < 1e-6:
            gain[k] = 1.0
            notes.append("the noise does not depend on the output here")
            continue
        sample[k] = (gain[k] - 1) * form.from_sample / form.to_eps
        notes.append("")
    return plain_plan(law, notes, edit=OutputEdit.of(gain, sample=sample))
