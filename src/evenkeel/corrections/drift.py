"""What Q-Drift and exact drift share: the variance that one step injects, and which steps are left alone.

Both treat the part of the quantization error that the output does not explain as white noise of
variance V, independent between steps, and stretch the step so that the state after it has its
nominal noise level again. They differ only in how the stretch is computed from the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.corrections.plan import SamplerPlan, stretch_plan
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence


@dataclass(frozen=True, slots=True)
class DriftStep:
    """One step in the space in which it is stretched.

    Attributes:
        level: noise level before the step (sigma / alpha, or sigma along the raw output).
        target: nominal level after it, without injected noise.
        injected: variance that the errors of the outputs used by this step add to the state.

    """

    level: float
    target: float
    injected: float

    @property
    def length(self) -> float:
        """|ds|, how far the step goes down."""
        return self.level - self.target


@dataclass(frozen=True, slots=True)
class DriftOptions:
    """Which variance, along which direction, and where to abstain."""

    per_channel: bool
    conditional: bool
    trim: float | None
    along_output: bool
    cap: bool
    correct_final_step: bool
    min_explained: float


def plan_drift(
    law: StepLaw,
    evidence: Evidence,
    options: DriftOptions,
    rule: Callable[[DriftStep], float],
    *,
    allow_range: bool,
) -> SamplerPlan:
    """Stretch every step by ``1 + rule(step)``; identity, with the reason, where it means nothing."""
    on = "output" if options.along_output else "epsilon"
    variance = evidence.variance(
        per_channel=options.per_channel, conditional=options.conditional, trim=options.trim, on=on
    )
    second = evidence.by_channel if options.per_channel else evidence.by_step
    v, outside = evidence.at(law, variance, log=True)
    explained, _ = evidence.at(law, second.explained, log=False)
    if not allow_range:
        evidence.refuse_outside(law, outside)
    c = torch.zeros_like(v)
    notes = []
    for k in range(law.steps):
        note = _why_not(law, k, options, bool(outside[: k + 1][_used(law, k)].any()))
        if not note:
            for channel in range(v.shape[1]):
                if explained[k, channel] < options.min_explained:
                    note = (
                        f"R^2 between full-precision and quantized output is below "
                        f"{options.min_explained}: the statistics mean nothing here"
                    )
                    continue
                step = _drift_step(law, k, v[:, channel], options.along_output)
                value = rule(step)
                if options.cap and step.target < value * step.length:
                    value = step.target / step.length
                    note = "capped: the stretched step would pass zero noise"
                c[k, channel] = value
        notes.append(note)
    return stretch_plan(law, c, options.along_output, notes)


def _used(law: StepLaw, k: int) -> list[int]:
    """Indices of the outputs that step k uses."""
    return [j for j in range(k + 1) if abs(law.output_weights[k, j]) > 1e-12]


def _drift_step(law: StepLaw, k: int, v: Tensor, along_output: bool) -> DriftStep:
    """Q-Drift Eq. 37 through the step law: Var(dy) = sum_j (w[k,j] / alpha_next)^2 V_j."""
    start = int(law.anchor[k])
    if along_output:
        scale, level, target = 1.0, law.sigma[start], law.sigma_down[k]
    else:
        scale = law.alpha[k + 1]
        level, target = law.noise_to_signal[start], law.sigma_down[k] / scale
    injected = sum((law.output_weights[k, j] / scale) ** 2 * float(v[j]) for j in _used(law, k))
    return DriftStep(float(level), float(target), float(injected))


def _why_not(law: StepLaw, k: int, options: DriftOptions, outside: bool) -> str:
    """The reason to leave step k alone, or ""."""
    start = int(law.anchor[k])
    if law.intermediate[k]:
        return "intermediate stage: its result is only a place to evaluate the network"
    if law.noise_weights[k] > 1e-9 and law.has_history:
        return "stochastic multistep solver: it already adds noise, drift scaling is not defined"
    if outside:
        return "outside the calibrated noise levels"
    if law.sigma_down[k] == 0 and not options.correct_final_step:
        return "final step: there is no noise left to take off"
    if not options.along_output and law.alpha[start] == 0:
        return "pure noise: the consistent factor tends to 1 as alpha goes to 0"
    level = law.sigma[start] if options.along_output else law.noise_to_signal[start]
    target = law.sigma_down[k] if options.along_output else law.sigma_down[k] / law.alpha[k + 1]
    if not math.isfinite(level) or level - target <= 1e-9 * max(1.0, level):
        return "the step does not lower the noise level"
    return ""
