"""Leave alone the steps whose stretch the calibration prompts do not agree on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from evenkeel.corrections.base import Correction, FromEvidence
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import CalibrationError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.provenance import Provenance

NOTE = "the bootstrap interval of c includes 0"


@dataclass(frozen=True)
class Confident(Correction):
    """A correction without the steps at which the bootstrap interval of c includes 0.

    Prompts, not pixels, are drawn again: pixels of one image share its content. Per step and channel,
    where the interval of the factor 1 + c includes 1, the sampler's own result is kept.

    For rules in which c is a sum of variances times positive weights (Q-Drift, exact drift, DNS) it is
    positive in every resample and nothing is left alone, however few the prompts; the guard means
    something where c has a sign, as in covariance-aware drift.

    Attributes:
        correction: one that stretches steps and does nothing else, made from ``evidence``.
        level: of the interval.
        resamples: how many times prompts are drawn; each costs one plan.
        seed: of the draws.

    Raises:
        CalibrationError: the correction has no evidence, the evidence fewer than two prompts, or the
            correction also edits outputs or states, which this guard does not judge.

    Example::

        evenkeel.apply(pipe, Confident(CovarianceDrift(record.evidence)))

    """

    correction: FromEvidence
    level: float = 0.95
    resamples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        known = isinstance(self.correction, FromEvidence)
        if not known or self.correction.evidence.prompts < 2:
            raise CalibrationError(
                f"expected a correction made from the evidence of at least two prompts; "
                f"{self.correction.name} has "
                + (f"that of {self.correction.evidence.prompts}." if known else "no evidence.")
            )

    @property
    def name(self) -> str:
        """Of the correction, with ``confident-`` in front."""
        return f"confident-{self.correction.name}"

    @property
    def references(self) -> tuple[str, ...]:
        """Of the correction."""
        return self.correction.references

    @property
    def stages(self) -> tuple[str, ...]:
        """Of the correction."""
        return self.correction.stages

    @property
    def made_for(self) -> Provenance | None:
        """Of the correction: what was measured for another model, scheduler or guidance is refused."""
        return self.correction.made_for

    @property
    def parts(self) -> tuple[Correction, ...]:
        """The correction."""
        return (self.correction,)

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The correction's plan, with the sampler's own step where the prompts do not agree.

        Raises:
            CalibrationError: the plan does more than stretch steps.

        """
        plan = self.correction.plan(law, allow_range=allow_range)
        more = [n for n in ("edit", "shift", "relabel", "refresh") if getattr(plan, n) is not None]
        if more:
            raise CalibrationError(
                f"{self.correction.name} does more than stretch steps ({', '.join(more)}); its "
                f"interval of c says nothing about that. Apply it as it is."
            )
        band = resampled_factors(self.correction, law, self.resamples, self.seed)
        tail = (1 - self.level) / 2
        low, high = torch.quantile(band, torch.tensor([tail, 1 - tail], dtype=band.dtype), dim=0)
        sure = (low > 1) | (high < 1)
        unsure = (plan.factor != 1) & ~sure
        notes = [
            NOTE if bool(unsure[k].any()) and not note else note
            for k, note in enumerate(plan.explanations)
        ]
        lags = unsure[:, None]
        return replace(
            plan,
            factor=torch.where(unsure, 1.0, plan.factor),
            noise=torch.where(unsure, 1.0, plan.noise),
            base=torch.where(unsure, 1.0, plan.base),
            samples=torch.where(lags, 0.0, plan.samples),
            outputs=torch.where(lags, 0.0, plan.outputs),
            active=plan.active & ~unsure.all(-1),
            explanations=tuple(notes),
        )


def resampled_factors(
    correction: FromEvidence, law: StepLaw, resamples: int = 200, seed: int = 0
) -> Tensor:
    """Factors 1 + c under resampling of prompts: (resamples, K, C); its quantiles are the band of c.

    The histogram is not kept per prompt, so the band is that of the untrimmed estimate.
    """
    generator = torch.Generator().manual_seed(seed)
    n = correction.evidence.prompts
    untrimmed = {"trim": None} if any(f.name == "trim" for f in fields(correction)) else {}
    factors = []
    for _ in range(resamples):
        rows = torch.randint(n, (n,), generator=generator)
        again = replace(correction, evidence=correction.evidence.resampled(rows), **untrimmed)
        factors.append(again.plan(law, allow_range=True).factor)
    return torch.stack(factors)
