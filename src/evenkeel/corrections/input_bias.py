"""Input bias correction of TAC-Diffusion: take the mean state error off before the next step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from evenkeel.corrections.plan import SamplerPlan, plain_plan
from evenkeel.errors import OutOfRange
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.evidence import SAME_LEVEL, log_snr


@dataclass(frozen=True)
class InputBias:
    """Subtract ``B_k = mean over prompts (x_quantized - x_full-precision)`` after every step.

    TAC-Diffusion (ECCV 2024), Eqs. 20 to 22: x~ = x^ - B, with B measured in closed loop, each step
    on the trajectory that the earlier corrections left. Per element of the latent as published, or
    one value per channel where a mean over few prompts is noise. Needs prompts that share a layout:
    it moves every image by the same amount.

    Eq. 22 sums S + 1 terms over S samples; the mean is meant and used.

    Attributes:
        alpha, sigma: (T,) levels before the steps after which the biases are subtracted.
        bias: (T, *sample) float32; 1 on axes over which it is averaged.
        source: provenance of the fit.

    """

    alpha: Array
    sigma: Array
    bias: Tensor
    source: object = None

    @property
    def name(self) -> str:
        """``input-bias``."""
        return "input-bias"

    @property
    def references(self) -> tuple[str, ...]:
        """The paper."""
        return ("TAC-Diffusion, ECCV 2024, Eqs. 20-22",)

    @property
    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def content_digest(self) -> str:
        """Tells any two fits apart."""
        return hashlib.sha256(self.bias.contiguous().numpy().tobytes()).hexdigest()

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The same bias at the same steps.

        Raises:
            OutOfRange: another schedule; a mean state belongs to one noise level and one solver.

        """
        known = log_snr(self.alpha, self.sigma)
        wanted = log_snr(law.alpha[:-1], law.sigma[:-1])
        if len(known) != law.steps or np.abs(known - wanted).max() > SAME_LEVEL:
            raise OutOfRange(
                f"the input bias was measured at {len(known)} noise levels, this run has {law.steps} "
                f"others. Fit it with this number of steps and this scheduler."
            )
        active = (self.bias != 0).flatten(1).any(1)
        return plain_plan(law, active=active, shift=self.bias)
