"""DCNC (ICLR 2026 submission): CNC, and uniform noise against the residual's heavy tails."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from evenkeel.corrections.base import FromEvidence
from evenkeel.corrections.cnc import CNC
from evenkeel.corrections.dns import robust_scale
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import CalibrationError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.residual import Estimator, ResidualShape


def uniform_variance(variance: Tensor, excess_kurtosis: Tensor) -> Tensor:
    """Variance of the uniform noise that takes the excess kurtosis of a sum to 0 (Eq. 12).

    Fourth cumulants add, and a uniform variable has excess kurtosis -6/5:
    ``kappa s_o^4 - (6/5) s_u^4 = 0``, so ``s_u^2 = s_o^2 sqrt(5 kappa / 6)``. 0 where kappa <= 0.

    >>> uniform_variance(torch.tensor(1.0), torch.tensor(1.2)).item()
    1.0

    """
    return variance * (5 * excess_kurtosis.clamp_min(0) / 6).sqrt()


def diluted_kurtosis(excess_kurtosis: Tensor, strength: float) -> Tensor:
    """Excess kurtosis after adding ``strength`` times that uniform noise.

    ``kappa (1 - W^4) / (1 + W^2 sqrt(5 kappa / 6))^2``: at W = 0.2 the cumulants cancel by 0.16 %; what
    lowers the kurtosis is dilution by the added variance.
    """
    kappa = excess_kurtosis.clamp_min(0)
    added = strength**2 * (5 * kappa / 6).sqrt()
    reduced = kappa * (1 - strength**4) / (1 + added) ** 2
    return torch.where(excess_kurtosis > 0, reduced, excess_kurtosis)


@dataclass(frozen=True)
class DCNC(FromEvidence):
    """``q' = (q - d) / (1 + k) + W_u u`` with u uniform, zero mean, variance s_u^2 (Eq. 14).

    ``s_u^2 = s_o^2 sqrt(5 kappa / 6)``, kappa the excess kurtosis of the residual r of D = k e + d + r
    and s_o^2 its variance after the division, Var(r) / (1 + k)^2 (Eq. 13 leaves the division out; the
    paper's Algorithm 1 does not). The argument for s_u assumes W_u = 1; with the paper's W_u = 0.2 the
    cancellation is 0.16 % and the noise dilutes instead (``diluted_kurtosis``).

    Adds randomness to deterministic samplers; each image draws its own from ``seed``.

    Attributes:
        evidence: from ``Record.evidence``.
        strength: W_u.
        estimator: of s_o^2; the paper's table finds no difference between its five and takes
            ``"iqr"``. All but ``"std"`` need histograms.
        per_channel, intercept, space, min_explained: as for ``CNC``.
        seed: of u.

    Raises:
        CalibrationError: a negative ``strength``.

    """

    name = "dcnc"
    references = ("DCNC + DNS, ICLR 2026 submission, Eqs. 8-14",)
    stages = ("output",)

    strength: float = 0.2
    estimator: Estimator = "iqr"
    per_channel: bool = False
    intercept: Literal["own", "none"] = "own"
    min_explained: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise CalibrationError(f"strength (W_u) must be at least 0, got {self.strength}.")

    @classmethod
    def published(cls, evidence: Evidence) -> DCNC:
        """The paper's form: W_u = 0.2, IQR, the intercept dropped, no step left out."""
        return cls(evidence, intercept="none", min_explained=0.0)

    def uniform_std(self) -> Tensor:
        """(T, C) or (T, 1) standard deviation of u for residuals that are not divided by 1 + k."""
        shape = ResidualShape.of(self.evidence.pooled(per_channel=self.per_channel))
        scale = robust_scale(self.evidence, self.estimator, self.per_channel)
        variance = shape.variance if scale is None else shape.variance * scale
        return uniform_variance(variance, shape.excess_kurtosis).sqrt()

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The edit of every output; see the class."""
        correlated = CNC(
            self.evidence, self.per_channel, self.intercept, min_explained=self.min_explained
        )
        plan = correlated.plan(law, allow_range=allow_range)
        assert plan.edit is not None
        std, outside = self.evidence.at(law, self.uniform_std(), log=False)
        known = torch.from_numpy(~outside)[:, None] & (plan.edit.gain != 1)
        drawn = torch.where(known, self.strength * plan.edit.gain * std, torch.zeros_like(std))
        edit = replace(plan.edit, std=drawn, uniform=True, seed=self.seed)
        return replace(plan, edit=edit)
