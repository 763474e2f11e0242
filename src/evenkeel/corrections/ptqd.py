"""PTQD (He et al., NeurIPS 2023, arXiv:2305.10657): divide by 1 + k, hide the rest in the noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from evenkeel.corrections.absorption import Absorption, Response, absorb
from evenkeel.corrections.base import FromEvidence
from evenkeel.corrections.linear_error import LinearError, guarded_edit
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence


@dataclass(frozen=True)
class PTQD(FromEvidence):
    """Correct the correlated part of the error, absorb the residual in stochastic samplers.

    With ``D = k e + d + r`` per step, k pooled over all elements, d per channel:

        q' = (q - d_c) / (1 + k),      sigma_t'^2 = max(sigma_t^2 - w^2 Var(r) / (1 + k)^2, 0)

    with w the weight of the output in the step. Without injected noise (eta = 0) only the first part
    acts. Multistep stochastic samplers go through the step law. Where paper and released code differ:

    - the code subtracts the mean error E[D] instead of the intercept d, which leaves an error of
      -k mean(e) / (1 + k): ``bias="mean"`` for parity;
    - the code sets negative k to 0, so an output that shrank is left shrunk: ``clip_negative_gain``;
    - the spread of the residual is the mean over samples of each sample's standard deviation:
      ``spread="within"`` for parity; ``"pooled"`` is the residual variance itself;
    - the direction term is recomputed with the smaller noise: ``absorption="released"``.

    Attributes:
        evidence: from ``Record.evidence``.
        bias: ``"intercept"``, ``"mean"`` or ``"none"``.
        clip_negative_gain: as released; off.
        spread: ``"pooled"`` or ``"within"``.
        absorption: ``"self-consistent"``, ``"released"`` or ``"none"``.
        min_explained: leave a step alone where R^2 is lower.

    """

    name = "ptqd"
    references = ("arXiv:2305.10657, Eqs. 6-13",)
    stages = ("output", "increment", "noise")

    bias: Literal["intercept", "mean", "none"] = "intercept"
    clip_negative_gain: bool = False
    spread: Literal["pooled", "within"] = "pooled"
    absorption: Absorption = "self-consistent"
    min_explained: float = 0.1

    @classmethod
    def published(cls, evidence: Evidence) -> PTQD:
        """The paper's form: k of either sign, the residual's mean per channel, no step left out."""
        return cls(evidence, absorption="released", min_explained=0.0)

    @classmethod
    def released(cls, evidence: Evidence) -> PTQD:
        """As the authors' code computes it."""
        return cls(evidence, "mean", True, "within", "released", 0.0)

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The edit of every output and the factor on every injected noise; see the class."""
        evidence = self.evidence
        model = LinearError.of(law, evidence, per_channel=False, allow_range=allow_range)
        pooled = evidence.moments.pooled(0)
        mean_e, mean_d = (evidence.at(law, m, log=False)[0] for m in (pooled.mean_e, pooled.mean_d))
        k = model.gain.clamp_min(0) if self.clip_negative_gain else model.gain
        offset = {
            "intercept": mean_d - k * mean_e,
            "mean": mean_d,
            "none": torch.zeros_like(mean_d),
        }[self.bias]
        wide = replace(model, explained=model.explained.expand_as(mean_d))
        gain = (1 / (1 + k)).expand_as(mean_d)
        edit, notes = guarded_edit(
            law, wide, gain, -offset / (1 + k), min_explained=self.min_explained
        )
        spread = model.residual if self.spread == "pooled" else self._within(law, k)
        left = spread * edit.gain.mean(-1, keepdim=True) ** 2
        response = Response.of(law, evidence, edit)
        plan = absorb(law, left, self.absorption, notes, response)
        return replace(plan, edit=edit)

    def _within(self, law: StepLaw, k: Tensor) -> Tensor:
        """(K, 1) square of the mean over prompts of the standard deviation of q - (1 + k) e = D - k e."""
        each = self.evidence.moments.pooled(2)  # per prompt and step, all elements
        n = each.count.double()
        ee, ed, dd = (each.s(*order) / n for order in ((2, 0), (1, 1), (0, 2)))

        def at(values: Tensor) -> Tensor:
            return self.evidence.at(law, values.T.contiguous(), log=False)[0]

        variance = at(dd) - 2 * k * at(ed) + k * k * at(ee)
        return variance.clamp_min(0).sqrt().mean(-1, keepdim=True) ** 2
