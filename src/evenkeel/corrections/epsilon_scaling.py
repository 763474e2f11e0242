"""Epsilon scaling (Ning et al., ICLR 2024, arXiv:2308.15321): divide the predicted noise by a constant."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenkeel.corrections.base import Correction
from evenkeel.corrections.noise_factor import noise_factor_plan
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import CalibrationError
from evenkeel.sampling.step_law import StepLaw


@dataclass(frozen=True)
class EpsilonScaling(Correction):
    """``eps' = eps / lambda``, the same lambda at every step; a baseline that needs no calibration.

    The paper scales by a line over the steps that is fitted per model; what people run (ComfyUI's
    "Epsilon Scaling") is one constant, 1.005. It lowers the step factor, the opposite of Q-Drift. Acts
    on the noise form of every prediction type.

    Attributes:
        factor: lambda > 0.

    Raises:
        CalibrationError: lambda is not positive.

    >>> EpsilonScaling().factor
    1.005

    """

    name = "epsilon-scaling"
    references = ("arXiv:2308.15321, Eq. 14",)
    stages = ("output",)
    made_for = None

    factor: float = 1.005

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise CalibrationError(f"factor (lambda) must be positive, got {self.factor}.")

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The edit of every output; see the class."""
        del allow_range
        factor = torch.full((law.steps, 1), 1 / self.factor, dtype=torch.float64)
        return noise_factor_plan(law, factor)
