"""The self-consistent rule (ours): gain and level together, each planned for the other."""

from __future__ import annotations

from dataclasses import dataclass

from evenkeel.corrections.base import FromEvidence
from evenkeel.corrections.cnc import CNC
from evenkeel.corrections.composite import Composite
from evenkeel.corrections.dns import DNS
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.sampling.step_law import StepLaw


@dataclass(frozen=True)
class SelfConsistent(FromEvidence):
    """Divide the output by 1 + k, then stretch for the variance that this division leaves.

    ``D = k e + d + r`` per step. After ``q' = (q - d) / (1 + k)`` the error has variance
    ``W = Var(r) / (1 + k)^2 = Var(e) (1 - R^2) / R^2``, not Var(D | q): the step from level s to s_next
    in y = x / alpha is then exact with

        y_next = y + ds m (q - d),   m = (s - sqrt(s_next^2 (1 + W) - W s^2)) / ((1 + k) (1 + W) (s - s_next))

    and m = 1 / (1 + k) where the root is not real. It contains CNC, DNS and, to first order, Q-Drift. It
    assumes that r is Gaussian, white, and independent between steps and of y; it does not need the
    predicted clean sample to be the true one, as the published argument for DNS does.

    For multistep solvers the gain is taken out of each output (and so out of the history), the level
    out of the increment.

    Attributes:
        evidence: from ``Record.evidence``.
        per_channel: statistics per latent channel.
        min_explained: leave a step alone where R^2 is lower.

    """

    name = "self-consistent"
    references = ("evenkeel, docs/drift.md",)
    stages = ("output", "increment")

    per_channel: bool = True
    min_explained: float = 0.1

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """Edits and factors for one run; see the class."""
        gain = CNC(self.evidence, self.per_channel, min_explained=self.min_explained)
        level = DNS(self.evidence, per_channel=self.per_channel, min_explained=self.min_explained)
        return Composite((gain, level)).plan(law, allow_range=allow_range)
