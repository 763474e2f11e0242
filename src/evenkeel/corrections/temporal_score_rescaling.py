"""Temporal score rescaling (Xu et al. 2025, arXiv:2510.01184): scale the score by noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evenkeel.corrections.base import Correction
from evenkeel.corrections.noise_factor import noise_factor_plan
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import CalibrationError
from evenkeel.sampling.step_law import StepLaw


@dataclass(frozen=True)
class TemporalScoreRescaling(Correction):
    """``eps' = r eps`` with ``r = (snr s^2 + 1) / (snr s^2 / k + 1)``, ``snr = (alpha / sigma)^2``.

    Exact for Gaussian data of variance s^2 sampled at variance s^2 / k. A baseline that needs no
    calibration. The defaults are those of ComfyUI's "TSR": k < 1 flattens, r falls from 1 at pure noise
    to k at the clean end.

    Attributes:
        k: temperature, > 0; 1 changes nothing.
        std: s, of the data the network was trained on, in latent units.

    Raises:
        CalibrationError: k or s is not positive.

    """

    name = "tsr"
    references = ("arXiv:2510.01184, Eq. 6",)
    stages = ("output",)
    made_for = None

    k: float = 0.95
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (self.k > 0 and self.std > 0):
            raise CalibrationError(f"k and std must be positive, got k={self.k}, std={self.std}.")

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The edit of every output; see the class."""
        del allow_range
        level = torch.from_numpy(law.noise_to_signal[:-1].copy())[:, None] ** 2
        # Multiplied by sigma^2 / alpha^2, so that a clean state is finite.
        factor = (self.std**2 + level) / (self.std**2 / self.k + level)
        return noise_factor_plan(law, torch.where(level.isinf(), torch.ones_like(level), factor))
