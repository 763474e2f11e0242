"""What Q-Drift and exact drift share: the variance that one step injects, and which steps are left alone.

Both treat the part of the quantization error that the output does not explain as white noise of
variance V, independent between steps, and stretch the step so that the state after it has its
nominal noise level again. They differ only in how the stretch is computed from the same numbers.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from evenkeel.corrections.base import FromEvidence
from evenkeel.corrections.plan import OutputEdit, SamplerPlan, stretch_plan
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.evidence import Evidence, VarianceKind
from evenkeel.statistics.second_order import SecondOrder

LONGEST_LAG = 3  # pseudo Runge-Kutta: the fourth stage still starts from the state of the first
# They return a prediction, correct it inside the next call and go on from there. By name: with few
# steps their law cannot be told from that of a solver with stages.
_PREDICTOR_CORRECTOR = ("UniPCMultistepScheduler", "SASolverScheduler")


@dataclass(frozen=True, slots=True)
class DriftStep:
    """One step in the space in which it is stretched.

    Attributes:
        level: noise level before the step (sigma / alpha, or sigma along the raw output).
        target: nominal level after it, without injected noise.
        injected: variance of the errors of the outputs used by this step (Q-Drift Eq. 37).
        net: what the state's variance grows by. Multistep solvers use an output again after its error
            has entered the state, with the opposite sign: Eq. 37 counts such an error twice over
            (with many steps 2.5 times the growth for DPM-Solver++ 2M, 4.8 times for 3M).
        noise: standard deviation of the noise that the sampler injects, in the same space.

    """

    level: float
    target: float
    injected: float
    net: float
    noise: float

    @property
    def length(self) -> float:
        """|ds|, how far the step goes down."""
        return self.level - self.target


@dataclass(frozen=True, slots=True)
class DriftOptions:
    """Which variance, along which direction, and where to abstain."""

    per_channel: bool
    variance: VarianceKind
    trim: float | None = None
    along_output: bool = False
    cap: bool = True
    correct_final_step: bool = False
    min_explained: float = 0.1
    given_output: bool = False  # condition V on the raw output, whichever way the step is stretched


class DriftRule(FromEvidence):
    """Planned after an edit of the output, it makes room for what the edited outputs' error injects."""

    @abstractmethod
    def plan(
        self, law: StepLaw, *, allow_range: bool = False, edit: OutputEdit | None = None
    ) -> SamplerPlan:
        """Factors 1 + c for one run; ``edit``: of the outputs, in force below."""

    def plan_after(
        self, law: StepLaw, edit: OutputEdit, *, allow_range: bool = False
    ) -> SamplerPlan:
        """For the error of the edited outputs, so that nothing is counted twice."""
        return self.plan(law, allow_range=allow_range, edit=edit)


def plan_drift(
    law: StepLaw,
    evidence: Evidence,
    options: DriftOptions,
    rule: Callable[[DriftStep], float],
    *,
    allow_range: bool,
    edit: OutputEdit | None = None,
    scale: Tensor | None = None,
    noise_rule: Callable[[DriftStep], float] | None = None,
) -> SamplerPlan:
    """Stretch every step by ``1 + rule(step)``; identity, with the reason, where it means nothing.

    Args:
        law: of the run.
        evidence: measured.
        options: which variance, where to abstain.
        rule: c of one step and channel.
        allow_range: leave steps outside the calibrated levels alone instead of raising.
        edit: of the outputs, in force below; the variance is then that of the edited outputs' error,
            whatever ``options`` say.
        scale: (T, C) or (T, 1) factor on the variance, such as a robust estimate over the plain one.
        noise_rule: factor on the injected noise of one step and channel; None keeps it.

    """
    on = "output" if options.along_output or options.given_output else "epsilon"
    second = evidence.by_channel if options.per_channel else evidence.by_step
    if edit is None:
        variance = evidence.variance(
            per_channel=options.per_channel, kind=options.variance, trim=options.trim, on=on
        )
        v, outside = evidence.at(law, variance if scale is None else variance * scale, log=True)
    else:
        v, outside = edited_variance(law, evidence, edit, options.per_channel)
        if scale is not None:
            v = v * evidence.at(law, scale, log=True)[0]
    explained, _ = evidence.at(law, second.explained, log=False)
    if not allow_range:
        evidence.refuse_outside(law, outside)
    held = loadings(law, options.along_output)
    c, noise = torch.zeros_like(v), torch.ones_like(v)
    notes = []
    for k in range(law.steps):
        note = why_not(law, k, options, bool(outside[: k + 1][_used(law, k)].any()))
        if not note:
            for channel in range(v.shape[1]):
                if explained[k, channel] < options.min_explained:
                    note = (
                        f"R^2 between full-precision and quantized output is below "
                        f"{options.min_explained}: the statistics mean nothing here"
                    )
                    continue
                step = drift_step(law, k, v[:, channel], options.along_output, held)
                value = rule(step)
                if options.cap and step.target < value * step.length:
                    value = step.target / step.length
                    note = "capped: the stretched step would pass zero noise"
                c[k, channel] = value
                if noise_rule is not None and step.noise > 0:
                    noise[k, channel] = noise_rule(step)
        notes.append(note)
    return stretch_plan(law, c, options.along_output, notes, noise)


def edited_variance(
    law: StepLaw, evidence: Evidence, edit: OutputEdit, per_channel: bool
) -> tuple[Tensor, Array]:
    """(K, C) variance of the edited outputs' error, and which steps are out of range."""
    second = evidence.by_channel if per_channel else evidence.by_step
    carried = {f.name: evidence.at(law, getattr(second, f.name), log=False) for f in fields(second)}
    at_steps = SecondOrder(**{name: values for name, (values, _) in carried.items()})
    variance = at_steps.edited(edit.gain, edit.sample, edit.std)
    # One number per step where channels share their statistics.
    return variance.mean(-1, keepdim=True) if not per_channel else variance, carried["ee"][1]


def _used(law: StepLaw, k: int) -> list[int]:
    """Indices of the outputs that step k uses."""
    return [j for j in range(k + 1) if abs(law.output_weights[k, j]) > 1e-12]


def _scaled(law: StepLaw, k: int, along_output: bool) -> tuple[float, float, Array]:
    """Level before and after step k and its output weights: of y = x / alpha, or of x itself."""
    start = int(law.anchor[k])
    if along_output:
        return float(law.sigma[start]), float(law.sigma_down[k]), law.output_weights[k]
    scale = law.alpha[k + 1]
    with np.errstate(divide="ignore", invalid="ignore"):  # a state of pure noise has no y
        target, weights = float(law.sigma_down[k] / scale), law.output_weights[k] / scale
    return float(law.noise_to_signal[start]), target, weights


def loadings(law: StepLaw, along_output: bool) -> Array:
    """How much of the error of output j is in the state before step k: (K + 1, K).

    The noise in a state, errors included, shrinks with the noise level; each step adds its own:
    ``L_{k+1} = (s_next / s) L_k + w_k``.
    """
    loadings = np.zeros((law.steps + 1, law.steps))
    for k in range(law.steps):
        level, target, weights = _scaled(law, k, along_output)
        if not math.isfinite(target):
            continue
        kept = target / level if level > 0 else 0.0
        loadings[k + 1] = kept * loadings[law.anchor[k]] + weights
    return loadings


def drift_step(law: StepLaw, k: int, v: Tensor, along_output: bool, loadings: Array) -> DriftStep:
    """Q-Drift Eq. 37 through the step law: Var(dy) = sum_j (w[k,j] / alpha_next)^2 V_j.

    ``net`` adds the covariance of the fresh terms with the errors that the state already holds.
    """
    level, target, weights = _scaled(law, k, along_output)
    used = _used(law, k)
    fresh, known = weights[used], v.numpy()[used]
    held = loadings[law.anchor[k], used]
    kept = target / level if level > 0 else 0.0
    injected = float((fresh**2 * known).sum())
    covariance = float((kept * held * fresh * known).sum())
    scale = 1.0 if along_output else float(law.alpha[k + 1])
    noise = float(law.noise_weights[k]) / scale if law.noise_weights[k] > 1e-9 else 0.0
    return DriftStep(level, target, injected, injected + 2 * covariance, noise)


def why_not(law: StepLaw, k: int, options: DriftOptions, outside: bool) -> str:
    """The reason to leave step k alone, or ""."""
    start = int(law.anchor[k])
    if law.sampler in _PREDICTOR_CORRECTOR or k - start > LONGEST_LAG:
        return "predictor-corrector: the state that it advances never leaves the sampler"
    if law.intermediate[k]:
        return "intermediate stage: its result is only a place to evaluate the network"
    if law.noise_weights[k] > 1e-9 and law.has_history:
        return "stochastic multistep solver: it already adds noise, drift scaling is not defined"
    if outside:
        return "outside the calibrated noise levels"
    if law.sigma_down[k] == 0 and not options.correct_final_step:
        return "final step: there is no noise left to take off"
    if law.sigma_down[k] < 0:
        return "the step passes zero noise before it adds its own"
    if not options.along_output and law.alpha[start] == 0:
        return "pure noise: the consistent factor tends to 1 as alpha goes to 0"
    level, target, _ = _scaled(law, k, options.along_output)
    if not math.isfinite(level) or level - target <= 1e-9 * max(1.0, level):
        return "the step does not lower the noise level"
    return ""
