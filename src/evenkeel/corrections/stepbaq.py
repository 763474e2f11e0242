"""StepbaQ (NeurIPS 2024): treat the quantization error in a state as noise, and step back to its level."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from evenkeel.corrections.base import Correction, Tables
from evenkeel.corrections.drift import DriftOptions, why_not
from evenkeel.corrections.plan import OutputEdit, Relabel, SamplerPlan, plain_plan, stretch_plan
from evenkeel.errors import CalibrationError, OutOfRange
from evenkeel.sampling.prediction import epsilon_form
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.evidence import SAME_LEVEL, same_levels
from evenkeel.statistics.provenance import Provenance

_FLOW = "flow_prediction"
# The last step may be stretched: it goes from the higher level to the clean image.
_OPTIONS = DriftOptions(per_channel=False, variance="total", correct_final_step=True)
_CLEAN = 1e-4


@dataclass(frozen=True)
class Told:
    """The level at which one step is made instead of its own.

    Attributes:
        ratio: sigma / alpha of it.
        timestep: what the network is told.

    """

    ratio: float
    timestep: float


@dataclass(frozen=True)
class StepbaQ(Correction):
    """Tell the network the noise level that the state has with its error, and step down from there.

    The error that a state has collected counts as noise. With y = x / alpha, s = sigma / alpha, and
    V the variance of the state's error before a step from s to s_next (error after the step before):

        s_tau^2 = s^2 + V / alpha^2                      (ab_tau = ab_t / (1 + V) in the paper)
        x <- x - mean,   eps = network(alpha_tau (x / alpha), tau)
        y_next = y + (s_next - s_tau) eps

    which stretches the step's increment by ``(s_tau - s_next) / (s - s_next)``. An output that is not
    noise (v, flow, sample) is rewritten so that it means at (t, x) the noise that it meant at (tau, x_tau).
    tau is rounded to the nearest training timestep; where that is the step's own, nothing is done, the
    mean included, and the error goes on to the next state.

    Written from the paper; its code was never released, so no comparison with it exists. Ours: flow
    matching and v-prediction; multistep solvers (the stretch acts on the increment and stays out of
    their history); "nearest" is meant on the time axis. Stages of two-stage solvers and
    predictor-correctors are left alone. The error of the last step has no later step to be taken off.

    Attributes:
        alpha, sigma: (T,) levels of the states that enter the steps.
        mean: (T, *sample) float, mean error (quantized - full precision) of the state after each step,
            with 1 on axes over which it is averaged: (T, C, 1, 1) for images; units of the state.
        variance: (T,) its variance around that mean, units of the state squared.
        training: (N,) sigma / alpha of the training timesteps 0 .. N - 1, increasing; None for networks
            trained in continuous time, whose tau is not rounded.
        round_to_training: ``"nearest"`` as published, or None: tells fractional timesteps.
        relabel_time: False keeps the told time and leaves tau unrounded: only the input's scale and the
            step change (the paper's choice for few-step models such as SDXL-Turbo).
        source: provenance of the fit.

    Raises:
        CalibrationError: shapes that do not match, or values that are not finite or out of range.

    >>> from evenkeel.hosts.scheduler.probing import probe_scheduler
    >>> from diffusers import DDIMScheduler
    >>> scheduler = DDIMScheduler(clip_sample=False)
    >>> scheduler.set_timesteps(4)
    >>> law = probe_scheduler(scheduler)
    >>> mean, variance = torch.zeros(4, 1, 1, 1), torch.tensor([0.01, 0.0, 0.0, 0.0])
    >>> found = StepbaQ(law.alpha[:-1], law.sigma[:-1], mean, variance, None).plan(law)
    >>> found.relabel.active.tolist(), found.stages
    ([False, True, False, False], ('level', 'increment'))

    """

    name = "stepbaq"
    references = ("StepbaQ, NeurIPS 2024 (written from the paper; its code is not public)",)
    stages = ("level", "output", "increment", "state")

    alpha: Array
    sigma: Array
    mean: Tensor
    variance: Tensor
    training: Array | None
    round_to_training: Literal["nearest"] | None = "nearest"
    relabel_time: bool = True
    source: Provenance | None = None

    def __post_init__(self) -> None:
        steps = len(self.alpha)
        found = (len(self.sigma), len(self.mean), *self.variance.shape)
        finite = all(bool(t.isfinite().all()) for t in (self.mean, self.variance))
        if found != (steps, steps, steps) or not finite or bool((self.variance < 0).any()):
            raise CalibrationError(
                f"expected {steps} finite means and non-negative variances, one per noise level; found "
                f"means of shape {tuple(self.mean.shape)} and variances "
                f"{self.variance.tolist()}."
            )
        if self.round_to_training not in ("nearest", None):
            raise CalibrationError(
                f"round_to_training is 'nearest' or None; got {self.round_to_training!r}."
            )
        levels = self.training
        if levels is not None and not (
            levels.ndim == 1 and len(levels) > 1 and levels[0] >= 0 and (np.diff(levels) > 0).all()
        ):
            raise CalibrationError(
                "training must hold the increasing noise-to-signal ratios of at least two training "
                "timesteps, or be None for a network that was trained in continuous time."
            )

    @property
    def options(self) -> dict[str, Any]:
        """The knobs, without what was measured."""
        return {"round_to_training": self.round_to_training, "relabel_time": self.relabel_time}

    @property
    def made_for(self) -> Provenance | None:
        """Provenance of the fit."""
        return self.source

    def tables(self) -> Tables:
        """What was measured; the levels are those of the run it was made for."""
        tensors = {"mean": self.mean, "variance": self.variance}
        if self.training is not None:
            tensors["training"] = torch.from_numpy(self.training.copy())
        return Tables(self.options, tensors)

    @classmethod
    def from_tables(cls, tables: Tables, made_for: Provenance) -> StepbaQ:
        """See ``Correction``."""
        mean, variance = tables.tensors["mean"], tables.tensors["variance"]
        training = tables.tensors.get("training")
        levels = None if training is None else training.numpy()
        return cls(*made_for.levels, mean, variance, levels, **tables.described, source=made_for)

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """Level, scale, output edit, stretch and mean of every step.

        Raises:
            OutOfRange: another schedule than the one the error was measured along, while
                ``allow_range`` is False (else nothing is changed).

        """
        if not same_levels(law, self.alpha, self.sigma):
            if allow_range:
                return plain_plan(
                    law, ["the error was measured along another schedule"] * law.steps
                )
            raise OutOfRange(
                f"the state errors were measured at {len(self.alpha)} noise levels, this run has "
                f"{law.steps}, and not the same. Fit StepbaQ with this number of steps and this "
                f"scheduler, or leave such runs uncorrected by name (allow=('range',))."
            )
        # Rounding of the host's tables can leave the last step a little beyond zero.
        clean = np.abs(law.sigma_down) < _CLEAN
        law = replace(law, sigma_down=np.where(clean, 0.0, law.sigma_down))
        zeros = torch.zeros(law.steps, 1, dtype=torch.float64)
        c, gain, sample = zeros.clone(), zeros + 1, zeros.clone()
        timestep, scale = torch.from_numpy(law.timesteps.copy()), torch.ones(law.steps).double()
        active = torch.zeros(law.steps, dtype=torch.bool)
        notes = []
        for k in range(law.steps):
            told, note = self._told(law, k)
            notes.append(note)
            if told is None:
                continue
            level, target = law.noise_to_signal[k], law.sigma_down[k] / law.alpha[k + 1]
            active[k], timestep[k] = True, told.timestep
            scale[k] = _signal(law.prediction, told.ratio) / _signal(law.prediction, level)
            c[k] = (told.ratio - level) / (level - target)
            gain[k], sample[k] = same_noise(law, k, told.ratio)
        plan = stretch_plan(law, c, False, notes)
        corrected = torch.cat([active[1:], torch.zeros(1, dtype=torch.bool)])
        shift = torch.zeros_like(self.mean, dtype=torch.float32)
        shift[corrected] = self.mean[corrected].float()
        edit = OutputEdit(gain, sample, zeros, zeros)
        return replace(
            plan,
            active=plan.active | (shift != 0).flatten(1).any(1),
            shift=shift if bool(shift.any()) else None,
            edit=edit if bool(edit.active.any()) else None,
            relabel=Relabel(timestep, scale, active) if bool(active.any()) else None,
        )

    def _told(self, law: StepLaw, k: int) -> tuple[Told | None, str]:
        """The level of step k, or None and why it keeps its own."""
        if k == 0:
            return None, "first step: no error yet"
        note = why_not(law, k, _OPTIONS, False)
        if not note and law.anchor[k] != k:
            note = "a stage that starts over from an earlier state"
        if note:
            return None, note
        variance = float(self.variance[k - 1])
        if variance == 0:
            return None, "the state before it has no error variance"
        level = float(law.noise_to_signal[k])
        ratio = math.hypot(level, math.sqrt(variance) / float(law.alpha[k]))
        if not self.relabel_time:
            return Told(ratio, float(law.timesteps[k])), ""
        if self.training is None:
            return _continuous(law, ratio)
        return self._trained(self.training, level, ratio)

    def _trained(self, training: Array, level: float, ratio: float) -> tuple[Told | None, str]:
        """The timestep whose level ``ratio`` is, by the training table."""
        if ratio > training[-1]:
            return None, "with its error the state is noisier than the network was ever trained for"
        # An angle is finite even where a training timestep holds no signal at all.
        time = float(np.interp(math.atan(ratio), np.arctan(training), np.arange(len(training))))
        if self.round_to_training is None:
            return Told(ratio, time), ""
        nearest = round(time)
        rounded = float(training[nearest])
        if rounded <= level * (1 + SAME_LEVEL):
            return None, "rounds to its own timestep: the error is left to the next state"
        if not math.isfinite(rounded):
            return None, "the nearest training timestep holds no signal"
        return Told(rounded, float(nearest)), ""


def _continuous(law: StepLaw, ratio: float) -> tuple[Told | None, str]:
    """The time whose level ``ratio`` is, between the run's own: for flow matching it is exact."""
    own = law.sigma[:-1] / (law.alpha[:-1] + law.sigma[:-1])
    wanted = ratio / (1 + ratio)
    if wanted > own.max():
        return None, "with its error the state is noisier than the first one of this run"
    order = np.argsort(own, kind="stable")
    return Told(ratio, float(np.interp(wanted, own[order], law.timesteps[order]))), ""


def _signal(prediction: str, ratio: float) -> float:
    """Alpha of the network's input at sigma / alpha = ``ratio``, whatever units the sampler keeps."""
    return 1 / (1 + ratio) if prediction == _FLOW else 1 / math.hypot(1, ratio)


def same_noise(law: StepLaw, k: int, ratio: float) -> tuple[float, float]:
    """(gain, sample): ``gain m + sample x`` at step k's own level is the noise that m is at ``ratio``.

    m was predicted at the network's level ``ratio`` from the same y = x / alpha; with the two levels'
    conversions ``eps = p m + q x`` (``epsilon_form``), ``gain = p_tau / p`` and
    ``sample = (q_tau alpha_tau / alpha - q) / p``. For noise prediction (1, 0).
    """
    signal = _signal(law.prediction, ratio)
    told = epsilon_form(law.prediction, signal, signal * ratio)
    own = epsilon_form(law.prediction, float(law.alpha[k]), float(law.sigma[k]))
    sample = told.from_sample * signal / float(law.alpha[k]) - own.from_sample
    return told.to_eps / own.to_eps, sample / own.to_eps
