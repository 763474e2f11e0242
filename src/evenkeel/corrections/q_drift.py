"""Q-Drift (Ryu, Salzmann & Javed 2026, arXiv:2603.18095): stretch the step by 1 + c.

The paper reads the unexplained quantization error as an implicit one-step diffusion and pairs it
with the deterministic drift that a marginal-preserving SDE would have (Eqs. 16-23). On a
deterministic sampler that drift points along the step itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from evenkeel.corrections.drift import DriftOptions, DriftRule, DriftStep, plan_drift
from evenkeel.corrections.plan import OutputEdit, SamplerPlan
from evenkeel.errors import CalibrationError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence

# Samplers for which the paper writes V |ds| / (2 sigma) (Eq. 22) instead of the exact integral.
_LEFT_POINT = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


@dataclass(frozen=True)
class QDrift(DriftRule):
    """Q-Drift for any linear sampler, from calibration evidence; ``QDrift.published`` is the paper's form.

    With y = x / alpha, levels s = sigma / alpha and ``Var(dy) = sum_j (w[k,j] / alpha_next)^2 V_j``
    over the model outputs that step k uses (Eqs. 36-38, read from the step law, so every order and
    every prediction type is covered):

        y_next = y + (1 + c) (y_base - y)                      (Eq. 39)
        c = Var(dy) / (2 s |ds|)          "left":     Euler, ancestral, flow matching (Eq. 22)
        c = Var(dy) / |s^2 - s_next^2|    "interval": DPM-Solver and everything else (Eqs. 24, 38)

    Where paper, code and algebra disagree, this follows: Eq. 39 and not Eq. 45 (Eq. 45 drops the term
    c alpha (1 - e^-h) y and is not even a small change for large steps; the released code uses Eq. 39);
    no factor on the last step and a cap ``c <= s_next / |ds|`` (neither paper nor code has one; without
    it the step passes zero noise, where the marginal argument does not hold); for flow matching the
    paper scales along v (its heuristic), ``along="epsilon"`` is the consistent form.

    Attributes:
        evidence: from ``Record.evidence``.
        per_channel: V per latent channel (paper) or one per step (released code, version 2).
        conditional: V = Var(D | output), Eq. 25; False uses Var(D), which the authors found harmful.
        trim: drop pairs beyond so many standard deviations of D (released code: 4); None keeps all.
        along: ``"paper"`` scales flow-matching Euler along its output v and all others along the noise;
            ``"epsilon"`` and ``"output"`` force one of the two.
        given: V = Var(D | p) with p the noise form of the output where the step is stretched along the
            noise (``"direction"``), or always the raw ``"output"``, as the released code has it; they
            differ for networks that predict v or flow.
        denominator: ``"auto"`` as above, or ``"left"`` / ``"interval"`` for every sampler.
        final_step: ``"identity"``, or ``"paper"`` to scale the last step as published.
        cap: limit c to ``s_next / |ds|``; ``final_step="paper"`` needs False.
        strength: multiplies c (the released code's ``qdrift_scale``).
        min_explained: leave a step alone where R^2 of the two outputs is lower.

    Raises:
        CalibrationError: contradictory options.

    Example: see ``examples/three_lines.py``.

    """

    name = "q-drift"
    references = ("arXiv:2603.18095, Eqs. 22-25 and 39",)
    stages = ("increment",)

    per_channel: bool = True
    conditional: bool = True
    trim: float | None = None
    along: Literal["paper", "epsilon", "output"] = "paper"
    given: Literal["direction", "output"] = "direction"
    denominator: Literal["auto", "left", "interval"] = "auto"
    final_step: Literal["identity", "paper"] = "identity"
    cap: bool = True
    strength: float = 1.0
    min_explained: float = 0.1

    def __post_init__(self) -> None:
        if self.cap and self.final_step == "paper":
            raise CalibrationError(
                "the cap c <= s_next / |ds| is 0 on the last step, so final_step='paper' would do "
                "nothing; pass cap=False with it."
            )

    @classmethod
    def published(cls, evidence: Evidence) -> QDrift:
        """The paper's form: V per channel, the last step too, no cap, no step left out."""
        return cls(evidence, given="output", final_step="paper", cap=False, min_explained=0.0)

    @classmethod
    def released(cls, evidence: Evidence) -> QDrift:
        """The code's second version: one V per step, of pairs within 4 standard deviations of D.

        Needs a record with histograms.
        """
        return replace(cls.published(evidence), per_channel=False, trim=4.0)

    def plan(
        self, law: StepLaw, *, allow_range: bool = False, edit: OutputEdit | None = None
    ) -> SamplerPlan:
        """Factors 1 + c for one run; see the class. ``edit``: of the outputs, in force below."""
        flow_euler = law.sampler == "FlowMatchEulerDiscreteScheduler"
        along_output = self.along == "output" or (self.along == "paper" and flow_euler)
        left = self.denominator == "left" or (
            self.denominator == "auto" and law.sampler in _LEFT_POINT
        )

        def rule(step: DriftStep) -> float:
            mean_level = step.level if left else (step.level + step.target) / 2
            return self.strength * step.injected / (2 * mean_level * step.length)

        options = DriftOptions(
            self.per_channel,
            "conditional" if self.conditional else "total",
            self.trim,
            along_output,
            self.cap,
            self.final_step == "paper",
            self.min_explained,
            self.given == "output",
        )
        return plan_drift(law, self.evidence, options, rule, allow_range=allow_range, edit=edit)
