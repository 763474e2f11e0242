"""TCEC (arXiv:2508.12094), a reconstruction: subtract the error that is proportional to the output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from evenkeel.corrections.base import FromEvidence
from evenkeel.corrections.linear_error import LinearError, guarded_edit
from evenkeel.corrections.plan import SamplerPlan, plain_plan
from evenkeel.errors import CalibrationError, UnsupportedSampler
from evenkeel.sampling.step_law import StepLaw


@dataclass(frozen=True)
class TCEC(FromEvidence):
    """Timestep-channel error correction with a window of 0 or 1 steps.

    How faithful: the paper's body was not available and no code was released; this follows what
    abstracts and reviews say. ``D_t ~ K_t q_t`` per channel, and with A the sample's and w the output's
    weight in the step

        window 0:  x_next <- x_next - w_t K_t q_t            (the same as q' = (1 - K_t) q, TAC's form)
        window 1:  x_next <- x_next - w_t K_t q_t - A_t w_{t+1} K_{t+1} q_{t+1}

    where t + 1 is the step before. Read literally, window 1 subtracts the previous step's error a second
    time: that step has taken it off already. It is offered as the experiment that it is; K fitted in
    closed loop on the corrected run (``calibrate(correction=...)``) would be the remedy.

    K is the least-squares coefficient without intercept, sum q D / sum q^2.

    Attributes:
        evidence: from ``Record.evidence``.
        window: 0 or 1.
        per_channel: one K per latent channel.
        min_explained: leave a step alone where R^2 is lower.

    Raises:
        CalibrationError: another window.

    """

    references = ("arXiv:2508.12094 (reconstruction)",)
    stages = ("output", "increment")

    window: int = 0
    per_channel: bool = True
    min_explained: float = 0.1

    def __post_init__(self) -> None:
        if self.window not in (0, 1):
            raise CalibrationError(f"window must be 0 or 1, got {self.window}.")

    @property
    def name(self) -> str:
        """``tcec``."""
        return "tcec" if self.window == 0 else "tcec-window-1"

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The edit of every output, and for window 1 what the step before left; see the class.

        Raises:
            UnsupportedSampler: window 1 on a sampler with history; the paper's is DDIM.

        """
        model = LinearError.of(
            law, self.evidence, per_channel=self.per_channel, allow_range=allow_range
        )
        pooled = self.evidence.pooled(per_channel=self.per_channel)
        n = pooled.count.double()
        ee, ed, dd = (pooled.s(*order) / n for order in ((2, 0), (1, 1), (0, 2)))
        q = pooled.mean_e + pooled.mean_d
        qq, qd = ee + 2 * ed + dd + q * q, ed + dd + q * pooled.mean_d
        slope = qd / torch.where(qq == 0, torch.ones_like(qq), qq)
        k, _ = self.evidence.at(law, slope, log=False)
        edit, notes = guarded_edit(
            law, model, 1 - k, torch.zeros_like(k), min_explained=self.min_explained
        )
        plan = plain_plan(law, notes, edit=edit)
        return plan if self.window == 0 else self._with_window(plan)

    def _with_window(self, plan: SamplerPlan) -> SamplerPlan:
        law, edit = plan.law, plan.edit
        assert edit is not None
        if law.has_history:
            raise UnsupportedSampler(
                f"TCEC's window of 1 is written for DDIM; {law.sampler} uses earlier outputs itself."
            )
        base = torch.ones_like(edit.gain)
        samples, outputs = (
            torch.zeros(law.steps, 2, base.shape[1], dtype=base.dtype) for _ in range(2)
        )
        for step in range(1, law.steps):
            weight = law.sample_weights[step, step] * law.output_weights[step - 1, step - 1]
            # K q of the step before, written with the edited output (1 - K) q that is remembered.
            outputs[step, 1] = -weight * (1 - edit.gain[step - 1]) / edit.gain[step - 1]
        return replace(
            plan,
            base=base,
            factor=base,
            noise=base,
            samples=samples,
            outputs=outputs,
            active=outputs.any(-1).any(-1),
        )
