"""Covariance-aware drift (ours): restore the state's variance from the measured error covariance.

Q-Drift, DNS and exact drift take errors of different steps as independent. On networks they are not:
neighbouring steps correlate by 0.4 to 0.9. Here the covariance between all steps, which calibration
measures (the Gram matrix), is propagated through the whole trajectory in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from evenkeel.corrections.drift import DriftOptions, why_not
from evenkeel.corrections.plan import SamplerPlan, stretch_plan
from evenkeel.errors import CalibrationError
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.error_structure import step_correlation
from evenkeel.statistics.evidence import Evidence

ROUNDING = 1e-10  # of the recursion: without an error no step may change, not by one bit


@dataclass(frozen=True)
class LinearRun:
    """One channel of a run as a linear Gaussian system.

    Every state is a combination of independent or correlated sources: the first state, one error per
    step, one injected noise per step. With the network's response J to its input,

        m_j = J_j x_j + D_j,    x_{k+1} = sum_j A[k,j] x_j + sum_j w[k,j] m_j + c[k] z_k

    Attributes:
        law: weights A, w, c.
        start: variance of the first state.
        reference, response: (K,) J of the full-precision and of the quantized network.
        covariance: (K, K) of the errors D given the states.

    """

    law: StepLaw
    start: float
    reference: Array
    response: Array
    covariance: Array

    def factors(self, correctable: Array, limit: float) -> Array:
        """(K,) 1 + c: after every step the variance is what full precision has there.

        With the step written as ``x_next = g u + v``, u its deterministic increment in y = x / alpha and
        v the rest, g is the root nearest 1 of ``g^2 Var(u) + 2 g Cov(u, v) + Var(v) = target``, and 1
        where there is none. Limited to ``1 - limit .. 1 + limit``.
        """
        steps = self.law.steps
        # Columns: the first state, the errors, the injected noises.
        plain, states = (np.zeros((steps + 1, 1 + 2 * steps)) for _ in range(2))
        plain_outputs, outputs = (np.zeros((steps, 1 + 2 * steps)) for _ in range(2))
        plain[0, 0] = states[0, 0] = 1.0
        found = np.ones(steps)
        for k in range(steps):
            plain_outputs[k] = self.reference[k] * plain[k]
            outputs[k] = self.response[k] * states[k]
            outputs[k, 1 + k] += 1.0
            noise = np.zeros(1 + 2 * steps)
            noise[1 + steps + k] = self.law.noise_weights[k]
            plain[k + 1] = self._step(k, plain, plain_outputs) + noise
            start = int(self.law.anchor[k])
            ratio = self.law.alpha[k + 1] / self.law.alpha[start] if self.law.alpha[start] else 1.0
            rest = ratio * states[start]
            increment = self._step(k, states, outputs) - rest
            rest += noise
            if correctable[k]:
                squares = self._products(increment, rest)
                target = self._products(plain[k + 1], plain[k + 1])[0]
                found[k] = _root(squares[0], squares[1], squares[2] - target, limit)
            states[k + 1] = found[k] * increment + rest
        return found

    def _products(self, u: Array, v: Array) -> tuple[float, float, float]:
        """Var(u), Cov(u, v), Var(v) of two combinations of the sources."""
        errors = slice(1, 1 + self.law.steps)
        through_u, through_v = self.covariance @ u[errors], self.covariance @ v[errors]

        def product(a: Array, b: Array, through: Array) -> float:
            free = self.start * a[0] * b[0] + a[errors.stop :] @ b[errors.stop :]
            return float(free + a[errors] @ through)

        return product(u, u, through_u), product(u, v, through_v), product(v, v, through_v)

    def _step(self, k: int, states: Array, outputs: Array) -> Array:
        past = slice(0, k + 1)
        a, w = self.law.sample_weights[k, past], self.law.output_weights[k, past]
        used = np.flatnonzero((a != 0) | (w != 0))
        step: Array = a[used] @ states[used] + w[used] @ outputs[used]
        return step


def _root(a: float, b: float, c: float, limit: float) -> float:
    """Of ``a g^2 + 2 b g + c = 0`` the root nearest 1, within ``limit`` of it; 1 if there is none."""
    inside = b * b - a * c
    if a <= 0 or inside < 0:
        return 1.0
    half = math.sqrt(inside)
    roots = (-b + half) / a, (-b - half) / a
    nearest = float(roots[0] if abs(roots[0] - 1) <= abs(roots[1] - 1) else roots[1])
    if abs(nearest - 1) < ROUNDING:
        return 1.0
    return min(max(nearest, 1 - limit), 1 + limit)


@dataclass(frozen=True)
class CovarianceDrift:
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

    evidence: Evidence
    see_gain: bool = True
    correlated: bool = True
    limit: float = 0.5
    min_explained: float = 0.1

    @property
    def name(self) -> str:
        """``covariance-drift``."""
        return "covariance-drift"

    @property
    def references(self) -> tuple[str, ...]:
        """Derived here; docs/drift.md."""
        return ("evenkeel, docs/drift.md",)

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
