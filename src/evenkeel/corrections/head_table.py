"""A table of output heads over noise levels, and its interpolation to other schedules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenkeel.errors import OutOfRange
from evenkeel.sampling.step_law import Array
from evenkeel.statistics.evidence import SAME_LEVEL, distinct_levels, log_snr

Place = tuple[int, int, float]


@dataclass(frozen=True)
class HeadTable:
    """What is added to the output head at each calibrated noise level.

    T levels; B denoiser calls per step (1, or 2 where a pipeline runs the guidance branches one
    after the other); F features and O outputs of the head.

    Attributes:
        alpha, sigma: (T,) signal and noise level of the state at which a head was fitted.
        weight: (T, B, F, O) float16, the change in units of ``scale``.
        scale: (T, B) float32.
        constant: (T, B, O) float32, added to the head's bias.
        active: (T, B) bool; False where the original head is kept.

    """

    alpha: Array
    sigma: Array
    weight: Tensor
    scale: Tensor
    constant: Tensor
    active: Tensor

    @classmethod
    def of(
        cls, alpha: Array, sigma: Array, weight: Tensor, constant: Tensor, active: Tensor
    ) -> HeadTable:
        """From changes in full precision; those of inactive entries are dropped.

        float16 with a scale of its own per entry keeps three digits of the largest weight: 8 MB at
        the size of FLUX (3,072 features, 64 outputs, 20 steps).
        """
        keep = active[:, :, None, None]
        kept = torch.where(keep, weight.float(), torch.zeros(()))
        scale = kept.abs().amax((2, 3))
        unit = torch.where(scale > 0, scale, torch.ones(()))
        return cls(
            np.asarray(alpha, dtype=np.float64),
            np.asarray(sigma, dtype=np.float64),
            (kept / unit[:, :, None, None]).half(),
            scale,
            torch.where(active[:, :, None], constant.float(), torch.zeros(())),
            active,
        )

    @property
    def steps(self) -> int:
        """T."""
        return len(self.alpha)

    @property
    def branches(self) -> int:
        """B."""
        return self.weight.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether every original head is kept."""
        return not bool(self.active.any())

    def entry(self, step: int) -> tuple[Tensor, Tensor]:
        """(B, F, O) and (B, O) float32 of one calibrated level."""
        return self.weight[step].float() * self.scale[step][:, None, None], self.constant[step]

    def places(self, alpha: Array, sigma: Array) -> list[Place | None]:
        """Where levels lie in the table: (lower index, upper index, share of the upper), or None.

        A calibrated level is met exactly; levels that occur twice (two-stage solvers) take the entry
        of the same rank; between two levels heads are interpolated linearly in log-SNR. None is out
        of range: beyond the outermost levels by more than the distance to their neighbours.
        """
        known, wanted = log_snr(self.alpha, self.sigma), log_snr(alpha, sigma)
        axis, groups = distinct_levels(known)
        margin = [axis[1] - axis[0], axis[-1] - axis[-2]] if len(axis) > 1 else [0.0, 0.0]
        found: list[Place | None] = []
        for k, level in enumerate(wanted):
            rank = int((np.abs(wanted[:k] - level) < SAME_LEVEL).sum())
            entries = [int(group[min(rank, len(group) - 1)]) for group in groups]
            nearest = int(np.argmin(np.abs(axis - level)))
            if abs(axis[nearest] - level) < SAME_LEVEL:
                found.append((entries[nearest], entries[nearest], 0.0))
            elif not axis[0] - margin[0] <= level <= axis[-1] + margin[1]:
                found.append(None)
            else:
                upper = int(np.clip(np.searchsorted(axis, level), 1, len(axis) - 1))
                share = (level - axis[upper - 1]) / (axis[upper] - axis[upper - 1])
                found.append((entries[upper - 1], entries[upper], float(np.clip(share, 0, 1))))
        return found

    def at(
        self, alpha: Array, sigma: Array, *, allow_range: bool = False
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Heads at other levels: per level (B, F, O) and (B, O) float32, or None: the original head.

        Raises:
            OutOfRange: a level is out of range and ``allow_range`` is False; with it, such a level
                keeps the original head.

        """
        places = self.places(alpha, sigma)
        self.refuse_outside(places, alpha, sigma, allow_range=allow_range)
        return [self.entry_at(place) for place in places]

    def refuse_outside(
        self, places: list[Place | None], alpha: Array, sigma: Array, *, allow_range: bool
    ) -> None:
        """Raise OutOfRange where a place of these levels is None, unless that is allowed."""
        outside = [k for k, place in enumerate(places) if place is None]
        if outside and not allow_range:
            with np.errstate(divide="ignore"):
                ratios = np.asarray(sigma)[outside] / np.asarray(alpha)[outside]
                known = self.sigma / self.alpha
            raise OutOfRange(
                f"{len(outside)} of {len(places)} steps are outside the noise levels for which heads "
                f"were fitted: sigma/alpha = {', '.join(f'{r:.4g}' for r in ratios[:4])}, fitted "
                f"{known.min():.4g} to {known.max():.4g}. Fit with this number of steps, or allow it "
                f"by name (allow=('range',)): those steps then keep the original head."
            )

    def entry_at(self, place: Place | None) -> tuple[Tensor, Tensor] | None:
        """(B, F, O) and (B, O) float32 at one of ``places``, or None: the original head."""
        return None if place is None else self._blend(*place)

    def _blend(self, lower: int, upper: int, share: float) -> tuple[Tensor, Tensor] | None:
        if not (self.active[lower].any() or self.active[upper].any()):
            return None
        a, b = self.entry(lower), self.entry(upper)
        if lower == upper:
            return a
        return torch.lerp(a[0], b[0], share), torch.lerp(a[1], b[1], share)
