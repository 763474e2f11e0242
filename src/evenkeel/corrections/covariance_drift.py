"""Covariance-aware drift (ours): restore the state's variance from the measured error covariance.

Q-Drift, DNS and exact drift take errors of different steps as independent. On networks they are not:
neighbouring steps correlate by 0.4 to 0.9. Here the covariance between all steps, which calibration
measures (the Gram matrix), is propagated through the whole trajectory in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from evenkeel.corrections.base import FromEvidence
from evenkeel.corrections.drift import DriftOptions, why_not
from evenkeel.corrections.linear_run import LinearRun
from evenkeel.corrections.plan import SamplerPlan, stretch_plan
from evenkeel.errors import CalibrationError
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.error_structure import step_correlation


@dataclass(frozen=True)
class CovarianceDrift(FromEvidence):
    """Stretch every step so that the state's variance is that of full precision, correlations included.

    Per channel, from the record alone: the network's linear response to its input is the slope of the
    output on the sample, ``J = S_xe / S_xx`` (with the error ``(S_xe + S_xD) / S_xx``); the errors given
    the sample have variances ``V_j = S_DD - S_xD^2 / S_xx`` and the measured correlation R_ij between
    steps, ``C_ij = R_ij sqrt(V_i V_j)``. State after step k:

        x_{k+1} = phi x_0 + sum_j M[k, j] D_j,      Var = phi^2 Var(x_0) + M C M^T

    by forward substitution of the step law with m_j = J_j x_j + D_j. The factor of each step follows
    from ``Var(x_{k+1}) = Var of the full-precision run``, a quadratic equation.

    Exact for Gaussian data and errors of any correlation, where rules that assume independence recover
    a few percent. On images it restores a variance, not the image: a persistent error is structured,
    and stretching cannot point it back. Because the response of the quantized network is used, an error
    in gain is seen, too (``see_gain=False`` leaves it out).

    Attributes:
        evidence: from ``Record.evidence``.
        see_gain: use the quantized network's own response.
        correlated: False assumes independent steps, for comparison.
        limit: factors stay within this of 1.
        min_explained: leave a step alone where R^2 is lower.

    """

    name = "covariance-drift"
    references = ("evenkeel, docs/drift.md",)
    stages = ("increment",)

    see_gain: bool = True
    correlated: bool = True
    limit: float = 0.5
    min_explained: float = 0.1

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """Factors 1 + c for one run; see the class.

        Raises:
            CalibrationError: the record does not hold the step-to-step covariance.

        """
        evidence, second = self.evidence, self.evidence.by_channel
        if evidence.gram is None:
            raise CalibrationError(
                "covariance drift needs the error's covariance between steps (Evidence.gram), which "
                "this evidence does not hold. Use the evidence of a Record made by calibrate()."
            )
        safe = torch.where(second.xx == 0, torch.ones_like(second.xx), second.xx)
        known = {
            "reference": second.xe / safe,
            "quantized": (second.xe + second.xd) / safe,
            "variance": (second.dd - second.xd**2 / safe).clamp_min(0),
            "start": second.xx,
            "explained": second.explained,
        }
        at = {n: evidence.at(law, v, log=False)[0].numpy() for n, v in known.items()}
        outside = evidence.at(law, second.xx, log=False)[1]
        if not allow_range:
            evidence.refuse_outside(law, outside)
        notes = [
            why_not(law, k, DriftOptions(True, "total"), bool(outside[k])) for k in range(law.steps)
        ]
        weak = at["explained"] < self.min_explained
        for k in range(law.steps):
            if not notes[k] and bool(weak[k].any()):
                notes[k] = f"R^2 of the two outputs is below {self.min_explained}"
        correctable = np.array([not note for note in notes])
        correlation = self._correlation(law)
        at = {n: np.nan_to_num(v) for n, v in at.items()}
        c = torch.zeros(law.steps, evidence.channels, dtype=torch.float64)
        for channel in range(evidence.channels):
            spread = np.sqrt(at["variance"][:, channel])
            reference = at["reference"][:, channel]
            run = LinearRun(
                law,
                float(at["start"][0, channel]),
                reference,
                at["quantized"][:, channel] if self.see_gain else reference,
                correlation * spread[:, None] * spread[None, :],
            )
            c[:, channel] = torch.from_numpy(run.factors(correctable, self.limit) - 1)
        return stretch_plan(law, c, False, notes)

    def _correlation(self, law: StepLaw) -> Array:
        """(K, K) correlation at the levels of ``law``; bilinear in log-SNR between calibrated ones."""
        assert self.evidence.gram is not None
        if not self.correlated:
            return np.eye(law.steps)
        known = step_correlation(self.evidence.gram)
        shares = self.evidence.at(law, torch.eye(len(known), dtype=torch.float64), log=False)[0]
        shares = torch.nan_to_num(shares)
        carried: Array = (shares @ known @ shares.T).numpy()
        scale = np.sqrt(np.maximum(np.diagonal(carried), 1e-300))
        return np.asarray(carried / scale[:, None] / scale[None, :])
