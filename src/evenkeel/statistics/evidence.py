"""Evidence: what a calibration knows about the error, keyed by noise level and not by loop index."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evenkeel.errors import CalibrationError, OutOfRange
from evenkeel.sampling.prediction import epsilon_form
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.histogram import ErrorHistogram
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.provenance import Provenance
from evenkeel.statistics.residual import ResidualHistogram
from evenkeel.statistics.second_order import SecondOrder

VarianceKind = Literal["conditional", "total", "residual"]
LOG_SNR_LIMIT = 20.0  # stands for pure noise (alpha = 0) and for a clean sample (sigma = 0)
SAME_LEVEL = 1e-4  # two levels this close in log-SNR are the same level up to float32 tables


def log_snr(alpha: Array, sigma: Array) -> Array:
    """log(alpha / sigma), limited to +-20 so that pure noise has a finite place on the axis."""
    with np.errstate(divide="ignore"):
        ratio = np.log(np.asarray(alpha)) - np.log(np.asarray(sigma))
    return np.asarray(np.clip(ratio, -LOG_SNR_LIMIT, LOG_SNR_LIMIT))


def distinct_levels(known: Array) -> tuple[Array, list[np.ndarray]]:
    """The different ones among levels in log-SNR, increasing, and which entries lie at each of them."""
    order = np.argsort(known, kind="stable")
    groups = np.split(order, 1 + np.flatnonzero(np.diff(known[order]) >= SAME_LEVEL))
    return np.array([known[group[0]] for group in groups]), groups


def same_levels(law: StepLaw, alpha: Array, sigma: Array) -> bool:
    """Whether a run's steps start at exactly these noise levels, in this order."""
    if len(alpha) != law.steps:
        return False
    known, wanted = log_snr(alpha, sigma), log_snr(law.alpha[:-1], law.sigma[:-1])
    return bool(np.abs(known - wanted).max() <= SAME_LEVEL)


@dataclass(frozen=True)
class Evidence:
    """Moments of the error at the calibrated noise levels.

    Attributes:
        prediction: what the raw outputs are (``epsilon``, ...); moments are in their units.
        alpha, sigma: (T,) levels of the states at which the twins were compared.
        moments: leading shape (prompts, T, channels).
        histogram: of the error, for trimming; None when it was not collected.
        source: where it came from (a record's provenance), for whoever applies a correction.
        residual: histogram of the residual, for robust variances; None when it was not collected.
        gram: (prompts, T, T) mean over elements of D_i D_j, see ``step_gram``; None if unknown.

    """

    prediction: str
    alpha: Array
    sigma: Array
    moments: PairedMoments
    histogram: ErrorHistogram | None = None
    source: Provenance | None = None
    residual: ResidualHistogram | None = None
    gram: Tensor | None = None

    @property
    def prompts(self) -> int:
        """How many prompts were calibrated."""
        return int(self.moments.count.shape[0])

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.moments.count.shape[2])

    @cached_property
    def by_channel(self) -> SecondOrder:
        """Covariances per step and channel, (T, C)."""
        return SecondOrder.of(self.moments.pooled(0))

    @cached_property
    def by_step(self) -> SecondOrder:
        """Covariances per step with channels pooled, (T, 1): one common line through all channels.

        Not the average of the channels' covariances: their means differ too (methods note 1.1).
        """
        pooled = self.moments.pooled(0, 2)
        return SecondOrder.of(pooled.map(lambda t: t.unsqueeze(1)))

    def pooled(self, *, per_channel: bool) -> PairedMoments:
        """Moments of all prompts, (T, C), or of all prompts and channels, (T, 1)."""
        if per_channel:
            return self.moments.pooled(0)
        return self.moments.pooled(0, 2).map(lambda t: t.unsqueeze(1))

    def resampled(self, prompts: Tensor) -> Evidence:
        """The evidence of a bootstrap sample of prompts; histograms are not per prompt, so dropped."""
        return replace(
            self,
            moments=self.moments.map(lambda t: t[prompts]),
            histogram=None,
            residual=None,
            gram=None if self.gram is None else self.gram[prompts],
        )

    def variance(
        self, *, per_channel: bool, kind: VarianceKind, trim: float | None, on: str
    ) -> Tensor:
        """Variance of the raw output's error at the calibrated levels, (T, C) or (T, 1).

        Args:
            per_channel: one number per channel, or one per step.
            kind: ``conditional`` Var(D | output), Q-Drift Eq. 25; ``total`` Var(D); ``residual`` Var(r)
                of D = k e + d + r.
            trim: keep pairs within so many standard deviations of D; needs the histogram.
            on: condition on the output as ``"output"`` or on its noise form ``"epsilon"``.

        Raises:
            CalibrationError: trimming without a histogram.

        """
        second = self.by_channel if per_channel else self.by_step
        if trim is not None:
            second = self.trimmed(trim, per_channel)
        if kind == "total":
            return second.dd
        if kind == "residual":
            return second.residual
        if on != "epsilon":
            one = torch.ones(1, 1, dtype=torch.float64)
            return second.conditional_variance(one, 0 * one)
        return second.conditional_variance(*self.forms())

    def forms(self) -> tuple[Tensor, Tensor]:
        """(T, 1) ``to_eps`` and ``from_sample`` of the calibrated levels; see ``EpsilonForm``."""
        levels = zip(self.alpha, self.sigma, strict=True)
        forms = [epsilon_form(self.prediction, float(a), float(s)) for a, s in levels]
        to_eps = torch.tensor([[f.to_eps] for f in forms], dtype=torch.float64)
        return to_eps, torch.tensor([[f.from_sample] for f in forms], dtype=torch.float64)

    def trimmed(self, trim: float, per_channel: bool) -> SecondOrder:
        """Covariances of the pairs within ``trim`` standard deviations of D, (T, C) or (T, 1).

        Per step and channel, or per step with the pairs of all channels in one heap.

        Raises:
            CalibrationError: no histogram.

        """
        if self.histogram is None:
            raise CalibrationError(
                f"trimming at {trim} standard deviations needs the error histograms, which this "
                f"record does not hold: calibrate with histograms=True, or pass trim=None."
            )
        ee, ed, dd, _ = self.histogram.trimmed_covariances(trim, per_channel=per_channel)
        whole = self.by_channel if per_channel else self.by_step
        return replace(whole, ee=ee, ed=ed, dd=dd)

    def at(self, law: StepLaw, values: Tensor, *, log: bool) -> tuple[Tensor, np.ndarray]:
        """Carry (T, C) values to the levels of ``law``: (K, C), and which steps are out of range.

        Calibrated levels are met exactly; between two of them values are interpolated linearly in
        log-SNR, in their logarithm where ``log`` says so. Out of range the values are NaN.
        """
        known = log_snr(self.alpha, self.sigma)
        wanted = log_snr(law.alpha[:-1], law.sigma[:-1])
        order = np.argsort(known, kind="stable")
        axis, table = known[order], values.numpy()[order]
        if log:
            table = np.log(np.maximum(table, 1e-300))
        out = np.empty((len(wanted), table.shape[1]))
        for c in range(table.shape[1]):
            out[:, c] = np.interp(wanted, axis, table[:, c])
        if log:
            out = np.where(out < np.log(1e-299), 0.0, np.exp(out))
        for k, level in enumerate(wanted):
            same = np.flatnonzero(np.abs(known - level) < SAME_LEVEL)
            if len(same):  # two-stage solvers meet a level twice: take the call of the same rank
                out[k] = values.numpy()[same[np.argmin(np.abs(same - k))]]
        outside = (wanted < axis[0] - SAME_LEVEL) | (wanted > axis[-1] + SAME_LEVEL)
        out[outside] = np.nan
        return torch.from_numpy(out), outside

    def refuse_outside(self, law: StepLaw, outside: np.ndarray) -> None:
        """Raise unless every step of ``law`` lies in the calibrated range of noise levels.

        Raises:
            OutOfRange: naming the levels.

        """
        if outside.any():
            ratio = law.noise_to_signal[:-1][outside]
            with np.errstate(divide="ignore"):
                known = self.sigma / self.alpha
            raise OutOfRange(
                f"{int(outside.sum())} of {law.steps} steps are outside the calibrated noise levels: "
                f"sigma/alpha = {', '.join(f'{r:.4g}' for r in ratio[:4])}, calibrated "
                f"{known.min():.4g} to {known.max():.4g}. Calibrate with this number of steps, or "
                f"allow it by name (allow=('range',)): those steps are then left alone."
            )
