"""The step law: a sampler's arithmetic, read off the sampler itself by unit impulses.

Every linear sampler makes step k from all samples and model outputs it has seen:

    x_{k+1} = sum_j A[k, j] x_j + sum_j w[k, j] m_j + c[k] z_k,    j <= k,  z_k ~ N(0, I)

Euler keeps one term of each; multistep solvers keep several outputs (and, where they remember
predicted clean samples, several samples); two-stage solvers ignore the passed sample in the second
stage. The sampler's own code stays the only source of the formula: nothing here knows a scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evenkeel.errors import UnsupportedSampler
from evenkeel.sampling.prediction import clean_output

Array = npt.NDArray[np.float64]


class Sampler(Protocol):
    """A fresh run of a sampler on scalars: ``rows`` independent ones at a time."""

    def step(self, model_output: Array, sample: Array, noise: Array) -> Array:
        """Take the next step of every row; ``noise`` replaces whatever the sampler would draw."""
        ...


@dataclass(frozen=True)
class StepLaw:
    """Local weights, noise levels and whole-trajectory weights of one sampling run of K steps.

    The state before step k is at level ``x_k = alpha[k] x0 + sigma[k] eps``; ``alpha[K]`` and
    ``sigma[K]`` describe the result. ``sigma_down[k]`` is the level right after step k *without*
    the noise that the step injects: sigma[k+1]^2 = sigma_down[k]^2 + c[k]^2.

    Attributes:
        sampler: name of the scheduler class, for messages and for rules that name a sampler.
        prediction: prediction type of the model output.
        timesteps: (K,) what the denoiser is told.
        sample_weights: A, (K, K), lower triangular.
        output_weights: w, (K, K), lower triangular.
        noise_weights: c, (K,).
        alpha, sigma: (K + 1,) signal and noise level of the states.
        sigma_down: (K,).

    """

    sampler: str
    prediction: str
    timesteps: Array
    sample_weights: Array
    output_weights: Array
    noise_weights: Array
    alpha: Array
    sigma: Array
    sigma_down: Array

    @property
    def steps(self) -> int:
        """Number of sampler calls K."""
        return len(self.timesteps)

    def until(self, steps: int) -> StepLaw:
        """Of the first ``steps`` only: a run may end before its schedule does.

        >>> import numpy as np
        >>> zero, level = np.zeros((3, 3)), np.ones(4)
        >>> law = StepLaw("s", "epsilon", np.arange(3.0), zero, zero, np.zeros(3), level, level, level[:3])
        >>> law.until(2).steps, law.until(2).sigma.shape, law.until(3) is law
        (2, (3,), True)

        """
        if steps >= self.steps:
            return self
        short = {n: getattr(self, n)[:steps] for n in ("timesteps", "noise_weights", "sigma_down")}
        short |= {n: getattr(self, n)[: steps + 1] for n in ("alpha", "sigma")}
        square = {n: getattr(self, n)[:steps, :steps] for n in ("sample_weights", "output_weights")}
        return replace(self, **short, **square)

    @cached_property
    def noise_to_signal(self) -> Array:
        """Sigma / alpha of every state, (K + 1,); infinite where alpha is 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.sigma / self.alpha)

    @cached_property
    def anchor(self) -> npt.NDArray[np.int64]:
        """For every step the index of the state that it advances: k itself, or an earlier one.

        The second stage of Heun, and the second call of pseudo linear multistep, ignore the sample
        they are handed and start again from the remembered one. Some use it to turn the output into
        noise or a clean sample: that is not advancing it, so all three forms are looked at.
        """
        anchors = np.arange(self.steps)
        for weights in (self.sample_weights, *self._converted_sample_weights()):
            for k in range(1, self.steps):
                row = np.abs(weights[k, : k + 1])
                seen = np.flatnonzero(row[:k] > 1e-3)
                # 1e-4: converting costs the rounding of the host's float32 tables, times 1 / alpha.
                if row[k] < 1e-4 and len(seen):
                    anchors[k] = min(anchors[k], seen[-1])
        return anchors

    def _converted_sample_weights(self) -> tuple[Array, Array]:
        """A with the outputs written as noise, and as clean samples, plus what is left of x_j.

        At x = alpha x0 + sigma eps an output is m = u x0 + v eps, so m = (u / alpha) x + (...) eps
        and m = (v / sigma) x + (...) x0. NaN where the form does not exist (alpha or sigma 0).
        """
        levels = zip(self.alpha[:-1], self.sigma[:-1], strict=True)
        parts = np.full((2, self.steps), np.nan)
        for j, (a, s) in enumerate(levels):
            if a != 0:
                parts[0, j] = clean_output(self.prediction, a, s, x0=1.0, eps=0.0) / a
            if s != 0:
                parts[1, j] = clean_output(self.prediction, a, s, x0=0.0, eps=1.0) / s
        from_noise, from_clean = (
            self.sample_weights + np.where(self.output_weights == 0, 0, self.output_weights * part)
            for part in parts
        )
        return from_noise, from_clean

    @cached_property
    def intermediate(self) -> npt.NDArray[np.bool_]:
        """Steps whose result is only a place to evaluate the network: the next step starts over."""
        starts_over = np.zeros(self.steps, dtype=bool)
        starts_over[:-1] = self.anchor[1:] < np.arange(1, self.steps)
        return starts_over

    @cached_property
    def has_history(self) -> bool:
        """Whether some step uses an earlier model output or an earlier sample."""
        off = np.tril(np.ones((self.steps, self.steps), dtype=bool), -1)
        weights = np.abs(self.output_weights) + np.abs(self.sample_weights)
        return bool((weights[off] > 1e-9).any())

    @cached_property
    def is_stochastic(self) -> bool:
        """Whether some step injects noise."""
        return bool((np.abs(self.noise_weights) > 1e-9).any())

    @cached_property
    def trajectory(self) -> tuple[Array, Array]:
        """Whole-trajectory weights ``x_{k+1} = phi[k] x_0 + sum_j W[k, j] m_j``: phi (K,), W (K, K).

        By forward substitution of the local law, without the injected noise.
        """
        k_max = self.steps
        # Row k of `states` writes x_k on the sources (x_0, m_0, ..., m_{K-1}).
        states = np.zeros((k_max + 1, k_max + 1))
        states[0, 0] = 1.0
        for k in range(k_max):
            states[k + 1] = self.sample_weights[k] @ states[:k_max]
            states[k + 1, 1:] += self.output_weights[k]
        return states[1:, 0], states[1:, 1:]


def read_step_law(
    run: Sampler,
    *,
    sampler: str,
    prediction: str,
    timesteps: Sequence[float] | Array,
    alpha_start: float,
    sigma_start: float,
    rtol: float = 2e-5,
) -> StepLaw:
    """Recover the law of one run by probing it once with independent rows of scalars.

    Rows: one impulse per sample (K), one per model output (K), one unit of noise, two random
    superpositions that must come out as the impulses predict, and two rows that walk along the exact
    path of ``x0 = 1, eps = 0`` and ``x0 = 0, eps = 1``. Solvers are exact for a constant clean sample
    and a constant noise, so these two rows read the levels (alpha, sigma) off the sampler.

    Args:
        run: a fresh sampler (its step consumes it).
        sampler: class name, for messages.
        prediction: prediction type of the model output, see ``prediction.epsilon_form``.
        timesteps: one per step.
        alpha_start: signal level of the first state.
        sigma_start: noise level of the first state.
        rtol: allowed deviation from linearity relative to the largest probed value; hosts keep
            their tables in float32, which costs about 1e-6.

    Raises:
        UnsupportedSampler: if a step is not linear or not finite.

    """
    k_max = len(timesteps)
    rows = 2 * k_max + 5
    noise_row, random_rows, level_rows = (
        2 * k_max,
        slice(2 * k_max + 1, 2 * k_max + 3),
        2 * k_max + 3,
    )
    rng = np.random.default_rng(0)
    random_x = 3 * rng.standard_normal((k_max, 2))
    random_m = 3 * rng.standard_normal((k_max, 2))
    weights_a, weights_w = np.zeros((k_max, k_max)), np.zeros((k_max, k_max))
    noise_weights = np.zeros(k_max)
    alpha, sigma = np.zeros(k_max + 1), np.zeros(k_max + 1)
    sigma_down = np.zeros(k_max)
    alpha[0], sigma[0] = alpha_start, sigma_start

    for k in range(k_max):
        sample, output, noise = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        sample[k], output[k_max + k], noise[noise_row] = 1.0, 1.0, 1.0
        sample[random_rows], output[random_rows] = random_x[k], random_m[k]
        sample[level_rows], sample[level_rows + 1] = alpha[k], sigma[k]
        output[level_rows] = clean_output(prediction, alpha[k], sigma[k], x0=1.0, eps=0.0)
        output[level_rows + 1] = clean_output(prediction, alpha[k], sigma[k], x0=0.0, eps=1.0)
        result = run.step(output, sample, noise)
        if not np.isfinite(result).all():
            raise UnsupportedSampler(
                f"{sampler} gives a non-finite sample at step {k} of {k_max} (timestep "
                f"{timesteps[k]}) although its inputs are finite. UniPC and 'dpmsolver' do this with "
                f'final_sigmas_type="zero"; set final_sigmas_type="sigma_min".'
            )
        weights_a[k, : k + 1] = result[: k + 1]
        weights_w[k, : k + 1] = result[k_max : k_max + k + 1]
        noise_weights[k] = abs(result[noise_row])
        expected = (
            weights_a[k, : k + 1] @ random_x[: k + 1] + weights_w[k, : k + 1] @ random_m[: k + 1]
        )
        _refuse_nonlinear(result[random_rows], expected, sampler, k, k_max, rtol)
        alpha[k + 1], sigma_down[k] = result[level_rows], result[level_rows + 1]
        # Rounding of the host's tables leaves up to 1e-6 where a level is exactly zero.
        negligible = 2e-6 * max(1.0, abs(sigma_start))
        if abs(sigma_down[k]) < negligible:
            sigma_down[k] = 0.0
        sigma[k + 1] = np.hypot(sigma_down[k], noise_weights[k])
        if sigma[k + 1] < negligible:
            sigma[k + 1] = 0.0
    return StepLaw(
        sampler=sampler,
        prediction=prediction,
        timesteps=np.asarray(timesteps, dtype=np.float64),
        sample_weights=weights_a,
        output_weights=weights_w,
        noise_weights=noise_weights,
        alpha=alpha,
        sigma=sigma,
        sigma_down=sigma_down,
    )


def _refuse_nonlinear(
    found: Array, expected: Array, sampler: str, k: int, k_max: int, rtol: float
) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    if np.abs(found - expected).max() > rtol * scale:
        raise UnsupportedSampler(
            f"step {k} of {k_max} of {sampler} is not linear in samples and model outputs: a random "
            f"input gave {found[0]:.6g} where the impulses predict {expected[0]:.6g}. Clipping and "
            f"thresholding do this: build the scheduler with clip_sample=False, thresholding=False."
        )
