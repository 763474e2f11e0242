"""CNC: correlated noise correction, divide the output by 1 + k (DCNC paper, ICLR 2026 submission)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from evenkeel.corrections.base import FromEvidence
from evenkeel.corrections.linear_error import LinearError, Space, guarded_edit
from evenkeel.corrections.plan import SamplerPlan, plain_plan
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence


@dataclass(frozen=True)
class CNC(FromEvidence):
    """Undo the part of the error that is proportional to the full-precision output.

    With ``D = k e + d + r`` (regression over all pixels, per step):

        q' = (q - d) / (1 + k)

    The paper (Eqs. 8, 14) finds d near 0 and drops it, ``intercept="none"``; that leaves a constant bias
    at every step, so the default keeps it. Same as the first half of PTQD (He et al. 2023).

    Dividing by 1 + k restores the variance of the output that is explained and inflates the rest: the
    error that is left has variance Var(r) / (1 + k)^2 = Var(e) (1 - R^2) / R^2.

    Attributes:
        evidence: from ``Record.evidence``.
        per_channel: one k per latent channel; the paper pools all of them (False).
        intercept: ``"own"`` or ``"none"``.
        space: regress raw outputs, or their noise forms.
        min_explained: leave a step alone where R^2 is lower.

    1 + k is limited to 0.5 .. 2 and the explanation says so.

    """

    name = "cnc"
    references = ("DCNC + DNS, ICLR 2026 submission, Eqs. 8 and 14",)
    stages = ("output",)

    per_channel: bool = False
    intercept: Literal["own", "none"] = "own"
    space: Space = "output"
    min_explained: float = 0.1

    @classmethod
    def published(cls, evidence: Evidence) -> CNC:
        """The paper's form: the intercept is dropped, no step left out."""
        return cls(evidence, intercept="none", min_explained=0.0)

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The edit of every output; see the class."""
        model = LinearError.of(
            law,
            self.evidence,
            per_channel=self.per_channel,
            space=self.space,
            allow_range=allow_range,
        )
        bias = -model.intercept / (1 + model.gain)
        edit, notes = guarded_edit(
            law,
            model,
            1 / (1 + model.gain),
            bias if self.intercept == "own" else torch.zeros_like(bias),
            space=self.space,
            min_explained=self.min_explained,
        )
        return plain_plan(law, notes, edit=edit)
