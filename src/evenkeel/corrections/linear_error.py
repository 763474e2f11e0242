"""The quantization error as a linear function of an output, carried to the levels of a run.

Two regressions of the same pairs (full-precision output e, quantized output q = e + D):

    D = k e + d + r        of the error on the full-precision output (PTQD, CNC)
    D = a q + b + r'       of the error on the quantized output (D2-DPM; a = S_qD / S_qq)

They answer different questions: dividing by 1 + k restores the marginal, subtracting a q + b is best in
the mean square and takes variance away. With R^2 the squared correlation of e and q,
``1 - a = R^2 / (1 + k)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evenkeel.corrections.plan import OutputEdit
from evenkeel.sampling.prediction import epsilon_form
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.second_order import SecondOrder

Space = Literal["output", "epsilon"]
CLAMP = (0.5, 2.0)  # of 1 + k, and of every factor on an output


@dataclass(frozen=True)
class LinearError:
    """Per step of a run and channel, (K, C) or (K, 1) float64, in units of the space it was fitted in.

    Attributes:
        gain, intercept: k and d.
        slope, offset: a and b.
        residual: Var(r).
        conditional: Var(r') = Var(D | q).
        mean_error: E[D].
        explained: R^2.
        outside: (K,) bool, steps outside the calibrated levels; their values are NaN.

    """

    gain: Tensor
    intercept: Tensor
    slope: Tensor
    offset: Tensor
    residual: Tensor
    conditional: Tensor
    mean_error: Tensor
    explained: Tensor
    outside: Tensor

    @classmethod
    def of(
        cls,
        law: StepLaw,
        evidence: Evidence,
        *,
        per_channel: bool,
        space: Space = "output",
        trim: float | None = None,
        allow_range: bool = False,
    ) -> LinearError:
        """Fit at the calibrated levels, interpolate over log-SNR.

        Args:
            law: of the run.
            evidence: measured.
            per_channel: one line per channel, or one through all of them.
            space: regress raw outputs, or their noise forms ``to_eps m + from_sample x``.
            trim: drop pairs beyond so many standard deviations of D; needs the histogram.
            allow_range: accept steps outside the calibrated levels.

        Raises:
            OutOfRange: a step is outside and ``allow_range`` is False.
            CalibrationError: trimming without what it needs.

        """
        moments = evidence.pooled(per_channel=per_channel)
        second = SecondOrder.of(moments)
        if trim is not None:
            second = evidence.trimmed(trim, per_channel)
        mean_e, mean_d = moments.mean_e, moments.mean_d
        if space == "epsilon":
            u, w = evidence.forms()
            second = second.noise_form(u, w)
            mean_e, mean_d = u * mean_e + w * moments.mean_x, u * mean_d
        k, a = second.gain, second.slope
        one = torch.ones(1, 1, dtype=torch.float64)
        found = {
            "gain": k,
            "intercept": mean_d - k * mean_e,
            "slope": a,
            "offset": mean_d - a * (mean_e + mean_d),
            "mean_error": mean_d,
            "explained": second.explained,
        }
        variances = {
            "residual": second.residual,
            "conditional": second.conditional_variance(one, 0 * one),
        }
        outside = evidence.at(law, k, log=False)[1]
        if not allow_range:
            evidence.refuse_outside(law, outside)
        carried = {n: evidence.at(law, v, log=False)[0] for n, v in found.items()}
        carried |= {n: evidence.at(law, v, log=True)[0] for n, v in variances.items()}
        return cls(**carried, outside=torch.from_numpy(outside))


def guarded_edit(
    law: StepLaw,
    model: LinearError,
    gain: Tensor,
    bias: Tensor,
    *,
    space: Space = "output",
    std: Tensor | None = None,
    min_explained: float = 0.1,
    uniform: bool = False,
    seed: int = 0,
) -> tuple[OutputEdit, list[str]]:
    """``gain q + bias`` in the space of ``model`` as an edit of raw outputs; and why not, per step.

    A step keeps its output where it is outside the calibrated levels, where R^2 is below
    ``min_explained``, and where the noise form does not depend on the output. Factors are limited to
    0.5 .. 2, and that is said.

    With eps = u m + w x, editing eps is editing m: ``m' = gain m + (gain - 1) (w / u) x + bias / u``.
    """
    gain, bias = gain.clone(), bias.clone()
    std = torch.zeros_like(gain) if std is None else std.clone()
    sample = torch.zeros_like(gain)
    notes = []
    for k in range(law.steps):
        note = ""
        form = epsilon_form(
            law.prediction if space == "epsilon" else "epsilon",
            float(law.alpha[k]),
            float(law.sigma[k]),
        )
        weak = model.explained[k] < min_explained
        if model.outside[k]:
            note, keep = "outside the calibrated noise levels", torch.ones_like(weak)
        elif abs(form.to_eps) < 1e-6:
            note, keep = "the noise does not depend on the output here", torch.ones_like(weak)
        else:
            keep = weak
            if bool(weak.any()):
                note = f"R^2 of the two outputs is below {min_explained}: no linear model"
        limited = gain[k].clamp(*CLAMP)
        if not bool(keep.all()) and bool((limited != gain[k])[~keep].any()):
            note = note or f"factor limited to {CLAMP[0]} .. {CLAMP[1]}"
        gain[k] = torch.where(keep, torch.ones_like(limited), limited)
        bias[k] = torch.where(keep, torch.zeros_like(limited), bias[k] / (form.to_eps or 1.0))
        std[k] = torch.where(keep, torch.zeros_like(limited), std[k] / abs(form.to_eps or 1.0))
        sample[k] = (gain[k] - 1) * form.from_sample / (form.to_eps or 1.0)
        notes.append(note)
    return OutputEdit(gain, sample, bias, std, uniform, seed), notes
