"""A sampling run as a linear Gaussian system: variances of all states in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evenkeel.sampling.step_law import Array, StepLaw

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

    def noise_factors(self) -> Array:
        """(K,) factor on each injected noise, so that errors leave every state's variance as it is.

        ``Var(x_next) = Var(deterministic part) + (factor c)^2`` is made what it is without errors; 0
        where the deterministic part alone is wider than that. 1 on steps that inject nothing.
        """
        steps = self.law.steps
        plain, states = (np.zeros((steps + 1, 1 + 2 * steps)) for _ in range(2))
        plain_outputs, outputs = (np.zeros((steps, 1 + 2 * steps)) for _ in range(2))
        plain[0, 0] = states[0, 0] = 1.0
        found = np.ones(steps)
        for k in range(steps):
            plain_outputs[k] = self.reference[k] * plain[k]
            outputs[k] = self.response[k] * states[k]
            outputs[k, 1 + k] += 1.0
            plain[k + 1] = self._step(k, plain, plain_outputs)
            states[k + 1] = self._step(k, states, outputs)
            c = float(self.law.noise_weights[k])
            plain[k + 1, 1 + steps + k] += c
            if c > 1e-9:
                target = self._products(plain[k + 1], plain[k + 1])[0]
                own = self._products(states[k + 1], states[k + 1])[0]
                found[k] = math.sqrt(max(target - own, 0.0)) / c
                found[k] = 1.0 if abs(found[k] - 1) < ROUNDING else found[k]
            states[k + 1, 1 + steps + k] += found[k] * c
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
