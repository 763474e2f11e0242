"""TAC-Diffusion (ECCV 2024): scale the output, then take the mean state error off."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.corrections.base import Correction, Tables
from evenkeel.corrections.plan import OutputEdit, SamplerPlan, plain_plan
from evenkeel.corrections.reconstruction import GainSums, Reconstruction
from evenkeel.errors import CalibrationError, OutOfRange
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.evidence import (
    SAME_LEVEL,
    Evidence,
    distinct_levels,
    log_snr,
    same_levels,
)
from evenkeel.statistics.provenance import Provenance


@dataclass(frozen=True)
class TAC(Correction):
    """Timestep-aware correction: noise estimation reconstruction (NER), then input bias correction (IBC).

    Every model output is multiplied by K, per step and channel, and every state has the mean state
    error B taken off before the next step (TAC-Diffusion, ECCV 2024, Eqs. 8, 19, 22 to 24):

        m' = K_k m,      x_{k+1} = step(x_k, m') - B_k,      B = mean over prompts (x_quantized - x_full)

    K acts on what the network predicts (the paper: noise). B is measured in closed loop, per element
    of the latent as published or one value per channel where a mean over few prompts is noise; it
    moves every image by the same amount. K is carried to other schedules over log-SNR and limited as
    ``reconstruction`` says; a mean state belongs to one noise level and one solver, so B is not. Intermediate
    stages of two-stage solvers get K and no B (Alg. 2).

    Eq. 22 sums S + 1 terms over S samples; the mean is meant and used. Eq. 24 scales K with B inside
    the network's argument and subtracts B again outside; one subtraction from the state is both.

    Attributes:
        alpha, sigma: (T,) levels of the states that enter the steps.
        gain: (T, C) or (T, 1) float64 K as found, or None.
        bias: (T, *sample) float32, 1 on axes over which it is averaged; or None.
        branch: None, or which guidance branch K acts on, before guidance (the paper corrects only
            the unconditional one of text-to-image models).
        reconstruction: how K was found, or None.
        source: provenance of the fit.

    Raises:
        CalibrationError: neither part, values that are not finite, another number of levels, or a
            branch without a gain.

    """

    alpha: Array
    sigma: Array
    gain: Tensor | None
    bias: Tensor | None
    branch: int | None = None
    reconstruction: Reconstruction | None = None
    source: Provenance | None = None

    def __post_init__(self) -> None:
        parts = [p for p in (self.gain, self.bias) if p is not None]
        if not parts:
            raise CalibrationError("TAC needs a gain, a bias, or both; it was given neither.")
        if any(len(p) != len(self.alpha) or not bool(p.isfinite().all()) for p in parts):
            raise CalibrationError(
                f"expected a finite gain and bias for each of {len(self.alpha)} noise levels, found "
                f"shapes {[tuple(p.shape) for p in parts]} or values that are not finite."
            )
        if self.branch is not None and self.gain is None:
            raise CalibrationError(
                "a branch was named but there is no gain that could act on it; pass branch=None."
            )

    @classmethod
    def open_loop(
        cls, evidence: Evidence, *, lambda_2: float = 1e-3, per_channel: bool = True
    ) -> TAC:
        """K from a record alone, without a closed-loop run: an approximation.

        ``K = (E[q e] + lambda_2) / (E[q^2] + lambda_2)`` with both outputs at the same states, as a
        record has them. TAC proper compares the full-precision output on its own trajectory with the
        quantized output on the corrected one, so errors that travel with the state are missing here;
        so are the relative error and the mask, and there is no B.

        Raises:
            CalibrationError: ``lambda_2`` below 0.

        """
        rule = Reconstruction.least_squares(lambda_2=lambda_2, per_channel=per_channel)
        pooled = evidence.pooled(per_channel=per_channel)
        n = pooled.count.double()
        ee, ed, dd = (pooled.s(*order) / n for order in ((2, 0), (1, 1), (0, 2)))
        mean_q = pooled.mean_e + pooled.mean_d
        qe = ee + ed + mean_q * pooled.mean_e
        qq = ee + 2 * ed + dd + mean_q**2
        none, one = torch.zeros_like(qe), torch.ones_like(qe)
        gain = rule.gain(GainSums(qe, qq, ee, none, none, one, 1, 1))
        return cls(
            evidence.alpha,
            evidence.sigma,
            gain,
            None,
            reconstruction=rule,
            source=evidence.source,
        )

    @property
    def name(self) -> str:
        """``tac``, or ``tac-ner`` or ``tac-ibc`` with one part only."""
        if self.gain is None:
            return "tac-ibc"
        return "tac-ner" if self.bias is None else "tac"

    @property
    def references(self) -> tuple[str, ...]:
        """The paper."""
        equations = []
        if self.gain is not None:
            equations.append("8-19")
        if self.bias is not None:
            equations.append("22-24")
        return (f"TAC-Diffusion, ECCV 2024, Eqs. {', '.join(equations)}",)

    @property
    def stages(self) -> tuple[str, ...]:
        """K acts on the output, before guidance if it has a branch; B on the state."""
        output = "output" if self.branch is None else "branch"
        acting = {output: self.gain, "state": self.bias}
        return tuple(stage for stage, part in acting.items() if part is not None)

    @property
    def made_for(self) -> Provenance | None:
        """Provenance of the fit."""
        return self.source

    @property
    def options(self) -> dict[str, Any]:
        """How K was found and where it acts."""
        found = {} if self.reconstruction is None else asdict(self.reconstruction)
        return {"branch": self.branch, **found}

    def tables(self) -> Tables:
        """K and B; the levels are those of the run they were made for."""
        rule = None if self.reconstruction is None else asdict(self.reconstruction)
        tensors = {"gain": self.gain, "bias": self.bias}
        return Tables(
            {"branch": self.branch, "reconstruction": rule},
            {name: t for name, t in tensors.items() if t is not None},
        )

    @classmethod
    def from_tables(cls, tables: Tables, made_for: Provenance) -> TAC:
        """See ``Correction``."""
        gain, bias = (tables.tensors.get(name) for name in ("gain", "bias"))
        branch, rule = tables.described["branch"], tables.described["reconstruction"]
        reconstruction = None if rule is None else Reconstruction(**rule)
        return cls(*made_for.levels, gain, bias, branch, reconstruction, made_for)

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """K at the levels of the run, and the same B at the same steps.

        Raises:
            OutOfRange: a step outside the fitted levels while ``allow_range`` is False; or a bias on
                another schedule.

        """
        parts: dict[str, Any] = {}
        notes = [""] * law.steps
        if self.bias is not None:
            if not same_levels(law, self.alpha, self.sigma):
                raise OutOfRange(
                    f"the input bias was measured at {len(self.alpha)} noise levels, this run has "
                    f"{law.steps}, and not the same. Fit it with this number of steps and this "
                    f"scheduler, or fit with input_bias=False."
                )
            parts = {"shift": self.bias, "active": (self.bias != 0).flatten(1).any(1)}
            for k in range(law.steps):
                if law.intermediate[k]:
                    notes[k] = "intermediate stage: its state is left alone"
        if self.gain is not None:
            gain, outside = self._gain_at(law, self.gain)
            if outside.any() and not allow_range:
                raise _outside(law, outside, self)
            rule = self.reconstruction or Reconstruction()
            for k in range(law.steps):
                if outside[k]:
                    notes[k] = "outside the fitted noise levels"
                elif bool((rule.limited(gain[k]) != gain[k]).any()):
                    notes[k] = f"K limited to {rule.lowest} .. {rule.highest}"
            parts["edit"] = OutputEdit.of(rule.limited(gain), branch=self.branch)
        return plain_plan(law, notes, **parts)

    def _gain_at(self, law: StepLaw, gain: Tensor) -> tuple[Tensor, Array]:
        """(K, C) at the levels of ``law``, linear in log-SNR, 1 outside; and which are outside."""
        if same_levels(law, self.alpha, self.sigma):
            return gain.double(), np.zeros(law.steps, dtype=bool)
        known, wanted = log_snr(self.alpha, self.sigma), log_snr(law.alpha[:-1], law.sigma[:-1])
        # Two-stage solvers meet a level twice: between levels, the mean of its two calls counts.
        axis, groups = distinct_levels(known)
        table = np.stack([gain.double().numpy()[group].mean(0) for group in groups])
        found = np.stack([np.interp(wanted, axis, column) for column in table.T], 1)
        outside = (wanted < axis[0] - SAME_LEVEL) | (wanted > axis[-1] + SAME_LEVEL)
        found[outside] = 1.0
        return torch.from_numpy(found), outside


def _outside(law: StepLaw, outside: Array, fitted: TAC) -> OutOfRange:
    with np.errstate(divide="ignore"):
        known = fitted.sigma / fitted.alpha
    ratios = ", ".join(f"{r:.4g}" for r in law.noise_to_signal[:-1][outside][:4])
    return OutOfRange(
        f"{int(outside.sum())} of {law.steps} steps are outside the noise levels for which K was "
        f"fitted: sigma/alpha = {ratios}, fitted {known.min():.4g} to {known.max():.4g}. Fit with "
        f"this number of steps, or allow it by name (allow=('range',)): those steps then keep their "
        f"output."
    )
