"""The residual r of ``D = k e + d + r``: its shape from moments, its robust spread from a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.histogram import Frame
from evenkeel.statistics.moments import PairedMoments

Estimator = Literal["std", "mad", "iqr", "kurtosis", "kde"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
RESIDUAL_BINS = 256
RESIDUAL_REACH = 12.0


@dataclass(frozen=True)
class ResidualShape:
    """Variance, skewness and excess kurtosis of the residual on a leading shape, float64."""

    variance: Tensor
    skewness: Tensor
    excess_kurtosis: Tensor

    @classmethod
    def of(cls, moments: PairedMoments, gain: Tensor | None = None) -> ResidualShape:
        """From joint central moments, for any k (least squares by default).

        ``r' = D' - k e'`` with primes for deviations from the mean, so by the binomial theorem
        ``sum r'^n = sum_i C(n, i) (-k)^i sum e'^i D'^(n-i)``. Shape 0 where nothing varies.

        >>> from evenkeel.statistics.moments import PairedMoments
        >>> two = torch.tensor([-1.0, 1.0])
        >>> ResidualShape.of(PairedMoments.of(0 * two, two, two)).excess_kurtosis.item()
        -2.0

        """
        ee = moments.s(2, 0)
        safe = torch.where(ee == 0, torch.ones_like(ee), ee)
        k = moments.s(1, 1) / safe if gain is None else gain
        n = moments.count.double()
        second = (moments.s(0, 2) - 2 * k * moments.s(1, 1) + k**2 * ee).clamp_min(0) / n
        third = moments.s(0, 3) - 3 * k * moments.s(1, 2) + 3 * k**2 * moments.s(2, 1)
        third = (third - k**3 * moments.s(3, 0)) / n
        fourth = moments.s(0, 4) - 4 * k * moments.s(1, 3) + 6 * k**2 * moments.s(2, 2)
        fourth = (fourth - 4 * k**3 * moments.s(3, 1) + k**4 * moments.s(4, 0)) / n
        # Below this the residual is the rounding of what was subtracted.
        flat = second <= 1e-14 * moments.s(0, 2) / n
        unit = torch.where(flat, torch.ones_like(second), second)
        zero = torch.zeros_like(second)
        return cls(
            variance=second,
            skewness=torch.where(flat, zero, third / unit**1.5),
            excess_kurtosis=torch.where(flat, zero, fourth / unit**2 - 3),
        )


@dataclass(frozen=True)
class ResidualHistogram:
    """Counts of ``((D - m0) - k0 (e - me0)) / s0`` in the frame of a pilot.

    The final k differs from the pilot's k0 by its sampling error; r0 then still holds
    ``(k - k0) e``, which adds ``(k - k0)^2 S_ee`` to the variance: second order.

    Attributes:
        frame: means, gain k0 and residual standard deviation s0 of the pilot.
        counts: (steps, channels, RESIDUAL_BINS + 2) int64; the two last bins are the overflows
            (above, below).

    """

    frame: Frame
    counts: Tensor

    @classmethod
    def of(cls, frame: Frame, e: Tensor, d: Tensor) -> ResidualHistogram:
        """Bin elements along the last axis of (prompts, steps, channels, elements) tensors."""
        unit = torch.where(frame.std_r == 0, torch.ones_like(frame.std_r), frame.std_r)
        r = (d.double() - frame.mean_d[..., None]) - frame.gain[..., None] * (
            e.double() - frame.mean_e[..., None]
        )
        z = r / unit[..., None]
        bins = ((z + RESIDUAL_REACH) * (RESIDUAL_BINS / (2 * RESIDUAL_REACH))).floor()
        bins = bins.clamp(-1, RESIDUAL_BINS).long()
        bins = torch.where(bins < 0, RESIDUAL_BINS + 1, bins)
        steps, channels = frame.mean_d.shape
        cells = torch.arange(steps * channels).reshape(steps, channels, 1) * (RESIDUAL_BINS + 2)
        size = steps * channels * (RESIDUAL_BINS + 2)
        counts = torch.bincount((bins + cells).reshape(-1), minlength=size)
        return cls(frame, counts.reshape(steps, channels, RESIDUAL_BINS + 2))

    def __add__(self, other: ResidualHistogram) -> ResidualHistogram:
        """Exact.

        Raises:
            CalibrationError: if the frames differ.

        """
        if not self.frame.same_as(other.frame):
            raise CalibrationError(
                "residual histograms with different pilot frames cannot be added; calibrate all parts "
                "with the same pilot, or merge the records without histograms."
            )
        return ResidualHistogram(self.frame, self.counts + other.counts)

    def quantile(self, p: float) -> Tensor:
        """(steps, channels) quantile of r in output units, linear within a bin.

        Raises:
            CalibrationError: it lies beyond the histogram.

        """
        counts = self._ordered()
        running = counts.cumsum(-1)
        wanted = p * running[..., -1:]
        bins = (running < wanted).sum(-1, keepdim=True)
        if bool(((bins == 0) | (bins == RESIDUAL_BINS + 1)).any()):
            raise CalibrationError(
                f"the {p:g} quantile of the residual lies more than {RESIDUAL_REACH:g} standard "
                f"deviations of the pilot away: the pilot (the first batch) was not typical. Calibrate "
                f"with a more typical prompt first, or use estimator='std'."
            )
        here = counts.gather(-1, bins)
        before = running.gather(-1, bins) - here
        share = (wanted - before) / here.clamp_min(1)
        width = 2 * RESIDUAL_REACH / RESIDUAL_BINS
        z = -RESIDUAL_REACH + width * (bins - 1 + share)
        return z[..., 0] * self.frame.std_r

    def spread_around(self, centre: Tensor, p: float) -> Tensor:
        """(steps, channels) quantile p of |r - centre|, in output units; to one bin."""
        width = 2 * RESIDUAL_REACH / RESIDUAL_BINS
        middles = -RESIDUAL_REACH + width * (torch.arange(RESIDUAL_BINS).double() + 0.5)
        away = (middles * self.frame.std_r[..., None] - centre[..., None]).abs()
        order = away.argsort(-1)
        counts = self.counts[..., :RESIDUAL_BINS].double().gather(-1, order)
        wanted = p * self.counts.sum(-1, keepdim=True).double()
        first = (counts.cumsum(-1) < wanted).sum(-1, keepdim=True).clamp_max(RESIDUAL_BINS - 1)
        return away.gather(-1, order).gather(-1, first)[..., 0]

    def _ordered(self) -> Tensor:
        """Counts from below to above, overflows at both ends, float64."""
        inner = self.counts[..., :RESIDUAL_BINS]
        above, below = torch.split(self.counts[..., RESIDUAL_BINS:], 1, -1)
        return torch.cat([below, inner, above], -1).double()


def robust_variance(
    histogram: ResidualHistogram, shape: ResidualShape, estimator: Estimator
) -> Tensor:
    """(steps, channels) variance of the residual, in output units squared.

    - ``"std"``: its second moment, what a sampler accumulates;
    - ``"iqr"``: ``((Q3 - Q1) / 1.349)^2`` (DCNC, section 4.1);
    - ``"mad"``: ``(1.4826 median |r - median|)^2``;
    - ``"kurtosis"``: second moment over ``1 + kappa / 2``, kappa the positive part of the excess
      kurtosis: the variance of the core of a scale mixture with small contamination. The paper names
      it (KUS) without a formula;
    - ``"kde"``: the Gaussian with the peak of a kernel density estimate, ``1 / (2 pi f(mode)^2)``,
      Silverman's bandwidth taken off again. The paper names it without a formula.

    Raises:
        CalibrationError: an unknown estimator.

    """
    if estimator == "std":
        return shape.variance
    if estimator == "iqr":
        return ((histogram.quantile(0.75) - histogram.quantile(0.25)) / 1.349) ** 2
    if estimator == "mad":
        return (1.4826 * histogram.spread_around(histogram.quantile(0.5), 0.5)) ** 2
    if estimator == "kurtosis":
        return shape.variance / (1 + shape.excess_kurtosis.clamp_min(0) / 2)
    if estimator == "kde":
        return _peak_variance(histogram)
    raise CalibrationError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}.")


def _peak_variance(histogram: ResidualHistogram) -> Tensor:
    width = 2 * RESIDUAL_REACH / RESIDUAL_BINS
    counts = histogram.counts[..., :RESIDUAL_BINS].double()
    total = histogram.counts.sum(-1, keepdim=True).double()
    iqr = (histogram.quantile(0.75) - histogram.quantile(0.25)) / 1.349
    unit = torch.where(histogram.frame.std_r == 0, torch.ones_like(iqr), histogram.frame.std_r)
    bandwidth = 0.9 * (iqr / unit)[..., None] * total**-0.2  # Silverman, robust scale
    lags = torch.arange(-RESIDUAL_BINS + 1, RESIDUAL_BINS).double() * width
    safe = torch.where(bandwidth == 0, torch.ones_like(bandwidth), bandwidth)
    kernel = torch.exp(-0.5 * (lags / safe) ** 2) / (safe * (2 * torch.pi) ** 0.5)
    length = RESIDUAL_BINS + len(lags) - 1
    density = torch.fft.irfft(
        torch.fft.rfft(counts, length) * torch.fft.rfft(kernel, length), length
    )
    peak = density.amax(-1) / total[..., 0]
    variance = (1 / (2 * torch.pi * peak**2) - bandwidth[..., 0] ** 2).clamp_min(0) * unit**2
    return torch.where(iqr == 0, torch.zeros_like(variance), variance)
