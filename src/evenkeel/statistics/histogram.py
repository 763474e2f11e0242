"""Histograms of the error that add exactly, for trimming outliers after the fact.

Values are binned in the frame of a pilot, ``z = (D - m0) / sd0``. Each bin holds the count and the
sums of z, z^2, w, w^2, w z with ``w = (e - me0) / sde0``, as integers in units of 2^-20: integers add
the same in any order, so merging parts of a calibration is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.exact import Pending, placed, working

BINS = 128
REACH = 12.0
UNIT = 2.0**20
LIMIT = 2.0**58  # of one batch; far from overflow, so that batches can be added


@dataclass(frozen=True)
class Frame:
    """Statistics of a pilot, (steps, channels) float64; they fix the bins.

    Attributes:
        mean_d, std_d, mean_e, std_e: of the error D and the full-precision output e.
        gain, std_r: k of D = k e + d + r, and the standard deviation of r.

    """

    mean_d: Tensor
    std_d: Tensor
    mean_e: Tensor
    std_e: Tensor
    gain: Tensor
    std_r: Tensor

    def same_as(self, other: Frame) -> bool:
        """Whether both put every value into the same bin."""
        names = (f.name for f in fields(Frame))
        return all(torch.equal(getattr(self, n), getattr(other, n)) for n in names)


@dataclass(frozen=True)
class ErrorHistogram:
    """``sums`` is (steps, channels, BINS + 2, 6) int64; the two last bins are the overflows."""

    frame: Frame
    sums: Tensor

    @classmethod
    def of(cls, frame: Frame, e: Tensor, d: Tensor) -> ErrorHistogram:
        """Bin elements along the last axis of (prompts, steps, channels, elements) tensors."""
        return cls.pending(frame, e, d).now()

    @classmethod
    def pending(cls, frame: Frame, e: Tensor, d: Tensor) -> Pending[ErrorHistogram]:
        """The same, still where the tensors are; there every value is rounded to 2^-20."""
        z = framed(d, frame.mean_d, _unit(frame.std_d))
        w = framed(e, frame.mean_e, _unit(frame.std_e))
        bins = ((z + REACH) * (BINS / (2 * REACH))).floor().clamp(-1, BINS).long()
        bins = torch.where(bins < 0, BINS + 1, bins)  # below the reach: the very last bin
        cells = in_cells(bins, BINS + 2)
        size = frame.mean_d.numel() * (BINS + 2)
        sums = torch.zeros(size, 6, dtype=torch.int64, device=d.device)
        largest = []
        for column, values in enumerate((torch.ones_like(z), z, z * z, w, w * w, w * z)):
            scaled = (values * UNIT).round()
            largest.append(scaled.abs().sum())
            # Whole numbers add up to the same in any order, also on a device that adds in any order.
            sums[:, column].scatter_add_(0, cells, scaled.long().reshape(-1))

        def finish(sums: Tensor, largest: Tensor) -> ErrorHistogram:
            if not (largest < LIMIT).all():
                raise CalibrationError(
                    "an error or output lies thousands of standard deviations away from those of the "
                    "pilot (the first batch): the sum of squares does not fit the histogram. "
                    "Calibrate with histograms=False, or put a more typical prompt first."
                )
            return cls(frame, sums.reshape(*frame.mean_d.shape, BINS + 2, 6))

        return Pending((sums, torch.stack(largest)), finish)

    def __add__(self, other: ErrorHistogram) -> ErrorHistogram:
        """Exact: integers add the same in any order.

        Raises:
            CalibrationError: if the frames differ.

        """
        if not self.frame.same_as(other.frame):
            raise CalibrationError(
                "histograms with different pilot frames cannot be added; calibrate all parts "
                "with the same pilot, or merge the records without histograms."
            )
        return ErrorHistogram(self.frame, self.sums + other.sums)

    def trimmed_covariances(
        self, spread: float, *, per_channel: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(S_ee, S_eD, S_DD, kept share) over pairs with ``|D - mean| <= spread * std``.

        The mean and standard deviation are those of all pairs, as in Q-Drift's released fit (one
        round, on D only, unbiased); a bin counts as kept when its centre does, so the edge is exact
        to one bin, 0.19 standard deviations of the pilot. (steps, channels) each, or (steps, 1) with the
        pairs of all channels in one heap.
        """
        unit_e, unit_d = _unit(self.frame.std_e), _unit(self.frame.std_d)
        sums = self.sums.double() / UNIT
        width = 2 * REACH / BINS
        centres = -REACH + width * (torch.arange(BINS + 2, dtype=torch.float64) + 0.5)
        centres[BINS], centres[BINS + 1] = torch.inf, -torch.inf
        if not per_channel:
            sums, centres = self._heap(sums, centres)
            unit_e = unit_d = torch.ones(len(sums), 1, dtype=torch.float64)
        n, z, z2 = sums[..., 0], sums[..., 1], sums[..., 2]
        total = n.sum(-1, keepdim=True).clamp_min(1)
        mean = z.sum(-1, keepdim=True) / total
        std = (z2.sum(-1, keepdim=True) / total - mean**2).clamp_min(0).sqrt()
        kept = ((centres - mean).abs() <= spread * std) | (std == 0)
        part = (sums * kept[..., None]).sum(-2)
        m = part[..., 0].clamp_min(2)

        def covariance(ab: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return (ab - a * b / m) / (m - 1)

        ee = covariance(part[..., 4], part[..., 3], part[..., 3]) * unit_e**2
        ed = covariance(part[..., 5], part[..., 3], part[..., 1]) * unit_e * unit_d
        dd = covariance(part[..., 2], part[..., 1], part[..., 1]) * unit_d**2
        return ee, ed, dd, part[..., 0] / total[..., 0]

    def _heap(self, sums: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Bins of all channels side by side, (steps, 1, bins, 6) and (steps, 1, bins), in units of D and e.

        Measured from the mean of the pilot's means, so that nothing large cancels.
        """
        frame = self.frame
        unit_e, unit_d = _unit(frame.std_e)[..., None], _unit(frame.std_d)[..., None]
        off_e, off_d = (m - m.mean(-1, keepdim=True) for m in (frame.mean_e, frame.mean_d))
        off_e, off_d = off_e[..., None], off_d[..., None]
        n, z, z2, w, w2, wz = sums.unbind(-1)
        moved = (
            n,
            off_d * n + unit_d * z,
            off_d**2 * n + 2 * off_d * unit_d * z + unit_d**2 * z2,
            off_e * n + unit_e * w,
            off_e**2 * n + 2 * off_e * unit_e * w + unit_e**2 * w2,
            off_e * off_d * n + off_e * unit_d * z + off_d * unit_e * w + unit_e * unit_d * wz,
        )
        return torch.stack(moved, -1).flatten(1, 2)[:, None], (off_d + unit_d * centres).flatten(1)[
            :, None
        ]


def framed(values: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """``(values - mean) / unit`` of (prompts, steps, channels, elements), where the values are."""
    high, low = placed(mean[..., None], values)
    centred = working(values) - high
    if centred.dtype != torch.float64:
        centred = centred - low
    return centred / placed(unit[..., None], values)[0]


def in_cells(bins: Tensor, count: int) -> Tensor:
    """Bins of (prompts, steps, channels, elements) as indices of a flat table, ``count`` per cell."""
    _, steps, channels, _ = bins.shape
    cells = torch.arange(steps * channels, device=bins.device).reshape(steps, channels, 1)
    return (bins + cells * count).reshape(-1)


def _unit(std: Tensor) -> Tensor:
    """The width by which values are divided: the pilot's, or 1 where the pilot did not vary."""
    return torch.where(std == 0, torch.ones_like(std), std)
