"""The residual r of ``D = k e + d + r``: its shape from moments, its robust spread from a histogram."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.exact import Pending, placed
from evenkeel.statistics.histogram import Frame, framed, in_cells
from evenkeel.statistics.moments import PairedMoments

Estimator = Literal["std", "mad", "iqr", "kurtosis", "kde"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
RESIDUAL_BINS = 256
RESIDUAL_REACH = 12.0
_WIDTH = 2 * RESIDUAL_REACH / RESIDUAL_BINS
_ROUNDING = 1e-7  # of std(D): a smaller std(r) is the rounding of S_DD - S_eD^2 / S_ee


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
    """Counts of ``r0 = (D - m0) - k0 (e - me0)`` in units of the pilot's standard deviation of r.

    The final k differs from the pilot's k0 by the pilot's sampling error. r0 then still holds
    ``(k - k0) e'``, which is uncorrelated with r and so adds ``(k - k0)^2 Var(e)`` to Var(r0): second
    order in ``k - k0``. Where the mean differs from the pilot's, r0 is shifted; spreads are not.

    A channel in which the pilot had no residual has no scale: there only exact zeros are counted
    inside, anything else goes to the overflows, and quantiles of it are refused.

    Attributes:
        frame: means, gain k0 and residual standard deviation of the pilot.
        counts: (steps, channels, RESIDUAL_BINS + 2) int64; the two last bins are the overflows
            (above, below).

    """

    frame: Frame
    counts: Tensor

    @classmethod
    def of(cls, frame: Frame, e: Tensor, d: Tensor) -> ResidualHistogram:
        """Bin elements along the last axis of (prompts, steps, channels, elements) tensors.

        Raises:
            CalibrationError: a value is not finite.

        """
        return cls.pending(frame, e, d).now()

    @classmethod
    def pending(cls, frame: Frame, e: Tensor, d: Tensor) -> Pending[ResidualHistogram]:
        """The same, still where the tensors are."""
        one = torch.ones_like(frame.gain)
        gain, _ = placed(frame.gain[..., None], d)
        r = framed(d, frame.mean_d, one) - gain * framed(e, frame.mean_e, one)
        unit, _ = placed(_unit(frame)[..., None], d)
        unit = unit.clamp_min(torch.finfo(unit.dtype).tiny)
        bins = ((r / unit + RESIDUAL_REACH) / _WIDTH).floor()
        bins = bins.clamp(-1, RESIDUAL_BINS).nan_to_num().long()
        bins = torch.where(bins < 0, RESIDUAL_BINS + 1, bins)  # below the reach: the very last bin
        cells = in_cells(bins, RESIDUAL_BINS + 2)
        shape = (*frame.mean_d.shape, RESIDUAL_BINS + 2)
        counts = torch.zeros(math.prod(shape), dtype=torch.int64, device=d.device)
        counts.scatter_add_(0, cells, torch.ones_like(cells))

        def finish(counts: Tensor, finite: Tensor) -> ResidualHistogram:
            if not finite:
                raise CalibrationError(
                    "a residual D - k e - d to be counted is not finite (NaN or infinity): check the "
                    "outputs of both denoisers."
                )
            return cls(frame, counts.reshape(shape))

        return Pending((counts, torch.isfinite(r).all()), finish)

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
            CalibrationError: p is not between 0 and 1, or the quantile lies beyond the histogram.

        """
        edges = -RESIDUAL_REACH + _WIDTH * torch.arange(RESIDUAL_BINS + 1, dtype=torch.float64)
        shares = self._shares()
        return _where_reached(shares, edges.expand_as(shares), p) * _unit(self.frame)

    def spread_around(self, centre: Tensor, p: float) -> Tensor:
        """(steps, channels) quantile p of ``|r - centre|`` in output units, linear within bins.

        The share within t of the centre, ``F(centre + t) - F(centre - t)``, is linear between the
        distances of the bins' edges, so it is inverted exactly.

        Raises:
            CalibrationError: as for ``quantile``.

        """
        shares, unit = self._shares(), _unit(self.frame)
        middle = (centre / unit)[..., None]
        edges = -RESIDUAL_REACH + _WIDTH * torch.arange(RESIDUAL_BINS + 1, dtype=torch.float64)
        whole = RESIDUAL_REACH - middle.abs()  # farther away, one side is in an overflow
        distances = (edges - middle).abs().minimum(whole).sort(-1).values
        zero = torch.zeros_like(middle)
        distances = torch.cat([zero, distances], -1)
        within = _at(shares, middle + distances) - _at(shares, middle - distances)
        return _where_reached(within, distances, p) * unit

    def _shares(self) -> Tensor:
        """(steps, channels, RESIDUAL_BINS + 1) share of r below each edge of the bins, float64."""
        inner, below = self.counts[..., :RESIDUAL_BINS], self.counts[..., RESIDUAL_BINS + 1 :]
        running = torch.cat([below, inner], -1).cumsum(-1)
        return running.double() / self.counts.sum(-1, keepdim=True).clamp_min(1)


def robust_variance(
    histogram: ResidualHistogram, shape: ResidualShape, estimator: Estimator
) -> Tensor:
    """(steps, channels) variance of the residual, in output units squared.

    The names are those of the DCNC paper's ablation (section 5.3), which spells out the IQR only. Its
    MAD it calls mean absolute deviation; the median is the field's and ours. All equal the variance
    of a Gaussian residual, and all but ``"std"`` are smaller for heavy tails.

    - ``"std"``: the second moment, what a sampler accumulates;
    - ``"iqr"``: ``((Q3 - Q1) / 1.349)^2`` (section 4.1);
    - ``"mad"``: ``(1.4826 median |r - median|)^2``;
    - ``"kurtosis"``: the second moment over ``1 + kappa / 2``, kappa the positive part of the excess
      kurtosis. That is the factor by which heavy tails inflate the sampling variance of a second
      moment, ``(2 + kappa) sigma^4 / n``, over a Gaussian's; a choice of ours, for the paper's KUS;
    - ``"kde"``: the Gaussian as high as a kernel density estimate at its mode, ``1 / (2 pi f^2)``,
      with Silverman's bandwidth taken off again; a choice of ours.

    The histogram's residual is that of the pilot's gain, the shape's that of the final one; see
    ``ResidualHistogram`` for what that does.

    Raises:
        CalibrationError: an unknown estimator, or a quantile beyond the histogram.

    """
    if estimator == "std":
        return shape.variance
    if estimator == "iqr":
        return _quartile_std(histogram) ** 2
    if estimator == "mad":
        return (1.4826 * histogram.spread_around(histogram.quantile(0.5), 0.5)) ** 2
    if estimator == "kurtosis":
        return shape.variance / (1 + shape.excess_kurtosis.clamp_min(0) / 2)
    if estimator == "kde":
        return _peak_variance(histogram, shape)
    raise CalibrationError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}.")


def _quartile_std(histogram: ResidualHistogram) -> Tensor:
    return (histogram.quantile(0.75) - histogram.quantile(0.25)) / 1.349


def _peak_variance(histogram: ResidualHistogram, shape: ResidualShape) -> Tensor:
    """The kernel is averaged over bins: with many elements the bandwidth is narrower than a bin."""
    unit = _unit(histogram.frame)
    counts = histogram.counts[..., :RESIDUAL_BINS].double()
    total = histogram.counts.sum(-1).double()
    scale = torch.minimum(_quartile_std(histogram), shape.variance.sqrt()) / unit
    bandwidth = (0.9 * scale * total**-0.2)[..., None]  # Silverman 1986, Eq. 3.31
    lags = torch.arange(-RESIDUAL_BINS + 1, RESIDUAL_BINS, dtype=torch.float64) * _WIDTH
    narrow = bandwidth.clamp_min(1e-6 * _WIDTH)  # no division by 0
    upper = torch.special.ndtr((lags + _WIDTH / 2) / narrow)
    kernel = (upper - torch.special.ndtr((lags - _WIDTH / 2) / narrow)) / _WIDTH
    length = RESIDUAL_BINS + len(lags) - 1
    spectrum = torch.fft.rfft(counts, length) * torch.fft.rfft(kernel, length)
    peak = torch.fft.irfft(spectrum, length).amax(-1) / total
    blur = bandwidth[..., 0] ** 2 + _WIDTH**2 / 12  # of the kernel, and of a bin (Sheppard)
    sharpened = 1 / (2 * torch.pi * peak**2) - blur
    return torch.clamp_min(sharpened, 0) * unit**2


def _unit(frame: Frame) -> Tensor:
    """The width by which residuals are divided; the smallest number where the pilot's error is 0."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.maximum(frame.std_r, _ROUNDING * frame.std_d).clamp_min(tiny)


def _at(shares: Tensor, places: Tensor) -> Tensor:
    """Shares below places (in units of the pilot), linear between the edges of the bins."""
    position = ((places + RESIDUAL_REACH) / _WIDTH).clamp(0, RESIDUAL_BINS)
    left = position.floor().clamp_max(RESIDUAL_BINS - 1)
    low, high = (shares.gather(-1, left.long() + i) for i in (0, 1))
    return low + (high - low) * (position - left)


def _where_reached(shares: Tensor, places: Tensor, p: float) -> Tensor:
    """Where rising shares reach p, linear in between."""
    if not 0 < p < 1:
        raise CalibrationError(f"a quantile needs a share p between 0 and 1, got {p}.")
    if ((shares[..., 0] >= p) | (shares[..., -1] < p)).any():
        raise CalibrationError(
            f"the {p:g} quantile of the residual lies more than {RESIDUAL_REACH:g} standard "
            f"deviations of the pilot away: the pilot (the first batch) was not typical. Calibrate "
            f"with a more typical prompt first, or use estimator='std'."
        )
    after = (shares < p).sum(-1, keepdim=True)
    low, high = shares.gather(-1, after - 1), shares.gather(-1, after)
    left, right = places.gather(-1, after - 1), places.gather(-1, after)
    return (left + (right - left) * (p - low) / (high - low))[..., 0]
