"""DNS, the deformable noise scheduler (DCNC + DNS, ICLR 2026 submission): aim for a lower level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import brentq
from torch import Tensor

from evenkeel.corrections.drift import DriftOptions, DriftRule, DriftStep, plan_drift
from evenkeel.corrections.plan import OutputEdit, SamplerPlan
from evenkeel.errors import CalibrationError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence, VarianceKind
from evenkeel.statistics.residual import Estimator, ResidualShape, robust_variance


def level_to_aim_for(level: float, target: float, variance: float) -> float | None:
    """Level s* such that a step towards it, with its injected error, ends at the nominal ``target``.

    Solves ``s*^2 + (level - s*)^2 V = target^2`` (levels are sigma / alpha):

        s* = (V level + sqrt(target^2 (1 + V) - V level^2)) / (1 + V)

    None where no level exists: ``target / level < sqrt(V / (1 + V))``, always at target 0. In the
    paper's alpha-bar the same root is ``ab_q = 1 / (1 + s*^2)`` (its Newton iteration), and "divide by
    C2" is ``C2 = a(s*) / a(target)``: in y = x / alpha nothing is rescaled.

    >>> round(level_to_aim_for(1.5, 1.0, 0.05), 6)
    0.993567

    """
    root = target**2 * (1 + variance) - variance * level**2
    if target == 0 or root < 0:
        return None
    return (variance * level + math.sqrt(root)) / (1 + variance)


def signal_to_aim_for(step: DriftStep, variance: float) -> float | None:
    """The paper's alpha-bar P of a step with injected noise (eta > 0), by bracketing.

    In the paper's variance-preserving units the noise sigma_t stays when the target moves to P, and the
    result is divided by C2 = sqrt(P / ab): ``P = ab (1 + b(P)^2 V)`` with
    ``b(P) = sqrt(1 - P - sigma_t^2) - s sqrt(P)``. P is searched in [ab, 1 - sigma_t^2].

    None where there is no root.
    """
    ab = 1 / (1 + step.target**2 + step.noise**2)
    kept = ab * step.noise**2  # sigma_t^2

    def excess(p: float) -> float:
        b = math.sqrt(max(1 - p - kept, 0.0)) - step.level * math.sqrt(p)
        return ab * (1 + b * b * variance) - p

    if excess(ab) <= 0 or excess(1 - kept) >= 0:
        return None
    return float(brentq(excess, ab, 1 - kept, xtol=1e-14))


@dataclass(frozen=True)
class DNS(DriftRule):
    """Step further down, so that the error that the step injects brings the state up to its level.

    With y = x / alpha, the level before the step s, nominal next level s_next and error variance V:

        y_next = y + (s* - s) eps,    s*^2 + (s - s*)^2 V = s_next^2

    which is a step stretched by ``1 + c = (s - s*) / (s - s_next)``. To first order c = V |ds| / (2
    s_next), Q-Drift's with the end point in place of the starting point. Steps without a solution keep
    their length. Where noise is injected (eta > 0), ``noise="kept"`` keeps it and the deterministic
    part aims for ``s*^2 + (s - s*)^2 V = s_down^2``; ``"published"`` moves the target of the whole step
    and so divides the noise by C2, too (``signal_to_aim_for``).

    Multistep solvers go through the step law: V is the variance that the step adds, per unit of ds^2.
    Flow matching is the same in y = x / (1 - sigma) (Appendix A.3).

    Eqs. 15-20 and 31-33 of the paper multiply an eps variance by the coefficient of the x0 error, C1,
    instead of the eps coefficient b = -C1 s: V is too small by s^2 at noisy steps and too large at
    clean ones. ``units="published"`` reproduces that (V / s^2).

    Attributes:
        evidence: from ``Record.evidence``.
        variance: ``"residual"`` Var(r) of D = k e + d + r as in the paper, ``"conditional"`` or
            ``"total"``. After an edit of the output the variance of the edited error is used.
        estimator: of the residual variance: ``"std"`` as accumulated by the sampler, or robust as in
            the paper (``"iqr"``), with ``"mad"``, ``"kurtosis"``, ``"kde"`` of its table; robust ones
            need histograms, and under-correct heavy tails.
        per_channel: V per latent channel; the paper pools (False).
        noise: ``"kept"`` or ``"published"``, as above.
        units: ``"epsilon"``, or ``"published"`` as above.
        min_explained: leave a step alone where R^2 is lower.

    """

    name = "dns"
    references = ("DCNC + DNS, ICLR 2026 submission, Eqs. 15-22 and Appendix A.3",)
    stages = ("increment", "noise")

    variance: VarianceKind = "residual"
    estimator: Estimator = "std"
    per_channel: bool = False
    noise: Literal["kept", "published"] = "kept"
    units: Literal["epsilon", "published"] = "epsilon"
    min_explained: float = 0.1

    @classmethod
    def published(cls, evidence: Evidence) -> DNS:
        """The paper's form: IQR, its units, injected noise divided by C2, no step left out."""
        return cls(
            evidence, estimator="iqr", noise="published", units="published", min_explained=0.0
        )

    def plan(
        self, law: StepLaw, *, allow_range: bool = False, edit: OutputEdit | None = None
    ) -> SamplerPlan:
        """Factors 1 + c for one run; see the class. ``edit``: of the outputs, in force below."""

        def variance_of(step: DriftStep) -> float:
            variance = step.net / step.length**2
            return variance / step.level**2 if self.units == "published" else variance

        def signal(step: DriftStep) -> float | None:
            return signal_to_aim_for(step, variance_of(step))

        def rule(step: DriftStep) -> float:
            variance = variance_of(step)
            if variance <= 0:
                return 0.0
            if step.noise > 0 and self.noise == "published":
                p = signal(step)
                ab = 1 / (1 + step.target**2 + step.noise**2)
                aim = None if p is None else math.sqrt(max(1 - p - ab * step.noise**2, 0.0) / p)
            else:
                aim = level_to_aim_for(step.level, step.target, variance)
            return 0.0 if aim is None else (step.target - aim) / step.length

        def thinner(step: DriftStep) -> float:
            p = signal(step) if variance_of(step) > 0 else None
            return 1.0 if p is None else 1 / math.sqrt(p * (1 + step.target**2 + step.noise**2))

        options = DriftOptions(self.per_channel, self.variance, min_explained=self.min_explained)
        return plan_drift(
            law,
            self.evidence,
            options,
            rule,
            allow_range=allow_range,
            edit=edit,
            scale=robust_scale(self.evidence, self.estimator, self.per_channel),
            noise_rule=thinner if self.noise == "published" else None,
        )


def robust_scale(evidence: Evidence, estimator: Estimator, per_channel: bool) -> Tensor | None:
    """(T, C) or (T, 1) robust variance of the residual over its plain one; None for ``"std"``.

    Raises:
        CalibrationError: the record holds no histogram of the residual.

    """
    if estimator == "std":
        return None
    if evidence.residual is None:
        raise CalibrationError(
            f"the {estimator} estimate needs the histogram of the residual, which this record does not "
            f"hold: calibrate with histograms=True, or pass estimator='std'."
        )
    shape = ResidualShape.of(evidence.moments.pooled(0))
    robust = robust_variance(evidence.residual, shape, estimator)
    plain = shape.variance
    if not per_channel:  # the residual is pooled after its own channel's line
        robust, plain = robust.mean(-1, keepdim=True), plain.mean(-1, keepdim=True)
    ratio = robust / torch.where(plain == 0, torch.ones_like(plain), plain)
    return torch.where(plain == 0, torch.ones_like(ratio), ratio)
