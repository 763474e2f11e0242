"""D2-DPM (AAAI 2025, arXiv:2501.08180): subtract the conditional mean of the error."""

from __future__ import annotations

from dataclasses import dataclass, replace

from evenkeel.corrections.absorption import Absorption, Response, absorb
from evenkeel.corrections.base import FromEvidence
from evenkeel.corrections.linear_error import LinearError, Space, guarded_edit
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence


@dataclass(frozen=True)
class D2DPM(FromEvidence):
    """Dual denoising: deterministic (D-D2) or stochastic (S-D2).

    With (q, D) jointly Gaussian per step, ``mu(q) = m_D + a (q - m_q)``, ``a = S_qD / S_qq`` and
    ``V = S_DD - S_qD^2 / S_qq``:

        D-D2:  q' = q - mu(q),                 sigma_t'^2 = max(sigma_t^2 - w^2 V, 0)
        S-D2:  q' = q - mu(q) - sqrt(V) z,     z ~ N(0, I)

    The conditional mean is best in the mean square and shrinks the output by 1 - a = R^2 / (1 + k); the
    variance it takes away is missing afterwards, which is why it harms the marginal where R^2 is low.
    With eta = 0 there is no sigma_t: D-D2 is then the mean subtraction alone, and so are all released
    numbers.

    The released code recomputes DDIM's direction term with the smaller sigma_t
    (``absorption="released"``); ``"self-consistent"`` keeps it, so that the variance after the step is
    exactly what it was. S-D2 absorbs nothing, as released: it adds V back instead.

    Attributes:
        evidence: from ``Record.evidence``.
        stochastic: S-D2 instead of D-D2.
        per_channel: released default; False pools the channels into one line.
        trim: drop pairs beyond so many standard deviations of D (released: 4); None keeps all.
        absorption: ``"self-consistent"``, ``"released"`` or ``"none"``.
        space: regress raw outputs, or their noise forms.
        min_explained: leave a step alone where R^2 is lower.
        seed: of z in S-D2; every image draws its own.

    """

    references = ("arXiv:2501.08180",)
    stages = ("output", "increment", "noise")

    stochastic: bool = False
    per_channel: bool = True
    trim: float | None = None
    absorption: Absorption = "self-consistent"
    space: Space = "output"
    min_explained: float = 0.1
    seed: int = 0

    @classmethod
    def published(cls, evidence: Evidence, *, stochastic: bool = False) -> D2DPM:
        """The paper's form: all pairs, the direction term from the smaller noise, no step left out."""
        return cls(evidence, stochastic, absorption="released", min_explained=0.0)

    @classmethod
    def released(cls, evidence: Evidence, *, stochastic: bool = False) -> D2DPM:
        """The same from pairs within 4 standard deviations of D; needs a record with histograms."""
        return replace(cls.published(evidence, stochastic=stochastic), trim=4.0)

    @property
    def name(self) -> str:
        """``d2-dpm`` or ``s-d2-dpm``."""
        return "s-d2-dpm" if self.stochastic else "d2-dpm"

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """The edit of every output and the factor on every injected noise; see the class."""
        model = LinearError.of(
            law,
            self.evidence,
            per_channel=self.per_channel,
            space=self.space,
            trim=self.trim,
            allow_range=allow_range,
        )
        edit, notes = guarded_edit(
            law,
            model,
            1 - model.slope,
            -model.offset,
            space=self.space,
            std=model.conditional.sqrt() if self.stochastic else None,
            min_explained=self.min_explained,
            seed=self.seed,
        )
        absorption = "none" if self.stochastic else self.absorption
        if self.space == "epsilon" and law.prediction != "epsilon":
            raw = LinearError.of(
                law, self.evidence, per_channel=self.per_channel, allow_range=allow_range
            )
            model = replace(model, conditional=raw.conditional)
        response = Response.of(law, self.evidence, edit)
        return replace(absorb(law, model.conditional, absorption, notes, response), edit=edit)
