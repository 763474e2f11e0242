"""One sampler's states beside those of another that started from the same noise.

Notation: ``x`` a full-precision state, ``delta`` what another sampler's state differs by. Averages
over prompts of delta squared say how far images are from their full-precision twins; averages of
delta itself say what the samplers do differently to *every* image, which shifts their distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.error_structure import pending_spectrum
from evenkeel.statistics.exact import Pending, check, settled, working
from evenkeel.statistics.moments import PairedMoments

Statistic = Callable[[int | None], float]
"""A number of all prompts (None), or of all but prompt i."""


@dataclass(frozen=True)
class PairedStates:
    """What is kept of one sampler's states and their full-precision twins; rows are prompts.

    Attributes:
        moments: (n, K, C): e the full-precision state, D = delta, x the state itself.
        spectra: (n, K, 2, rings) float64 power per spatial frequency, of the full-precision state and
            of the state; None where the latent has no height and width.
        final_error: (n, elements) float32, delta after the last step.

    """

    moments: PairedMoments
    spectra: Tensor | None
    final_error: Tensor

    @classmethod
    def joined(cls, batches: Sequence[PairedStates]) -> PairedStates:
        """The prompts of several batches, in order."""
        spectra = [b.spectra for b in batches if b.spectra is not None]
        return cls(
            moments=PairedMoments.joined([b.moments for b in batches]),
            spectra=torch.cat(spectra) if spectra else None,
            final_error=torch.cat([b.final_error for b in batches]),
        )

    def as_tensors(self) -> dict[str, Tensor]:
        """By name, as another process may be given them."""
        moments = {f"moments.{f.name}": getattr(self.moments, f.name) for f in fields(self.moments)}
        spectra = {} if self.spectra is None else {"spectra": self.spectra}
        return {**moments, **spectra, "final_error": self.final_error}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> PairedStates:
        """What ``as_tensors`` was given."""
        moments = {f.name: tensors[f"moments.{f.name}"] for f in fields(PairedMoments)}
        return cls(PairedMoments(**moments), tensors.get("spectra"), tensors["final_error"])

    @property
    def squared_error(self) -> Tensor:
        """(n, K) float64: mean of delta squared over channels and elements."""
        m = self.moments
        return (m.s(0, 2) / m.count + m.mean_d.square()).mean(-1)

    @property
    def mean_square(self) -> Tensor:
        """(n, K) float64: mean of the full-precision state squared."""
        m = self.moments
        return (m.s(2, 0) / m.count + m.mean_e.square()).mean(-1)

    def descriptors(self) -> tuple[Tensor, Tensor]:
        """Mean and spread of every channel of the final states: (n, 2 C) full precision, (n, 2 C)."""
        m = self.moments.map(lambda t: t[:, -1])
        variance = m.s(2, 0) + 2 * m.s(1, 1) + m.s(0, 2)
        return (
            torch.cat([m.mean_e, (m.s(2, 0) / m.count).sqrt()], -1),
            torch.cat([m.mean_e + m.mean_d, (variance.clamp_min(0) / m.count).sqrt()], -1),
        )

    def curves(self) -> Curves:
        """Per step, over all prompts and elements."""
        m = self.moments.pooled(0)
        ee, ed = m.s(2, 0), m.s(1, 1)
        variance = (ee + 2 * ed + m.s(0, 2)).clamp_min(0)
        spectrum = None
        if self.spectra is not None:
            reference, states = self.spectra.mean(0).unbind(1)
            spectrum = states / reference
        return Curves(
            mean_shift=m.mean_d,
            variance_ratio=variance / ee,
            correlation=(ee + ed) / (ee * variance).sqrt(),
            squared_error=self.squared_error.mean(0),
            spectrum_ratio=spectrum,
        )


@dataclass(frozen=True)
class Curves:
    """Per scheduler step, the states after it against the full-precision ones.

    Attributes:
        mean_shift: (K, C), mean of delta.
        variance_ratio: (K, C), variance of the states over that of the full-precision ones.
        correlation: (K, C), of the two.
        squared_error: (K,), mean of delta squared.
        spectrum_ratio: (K, rings), power per spatial frequency over that of full precision, or None.

    """

    mean_shift: Tensor
    variance_ratio: Tensor
    correlation: Tensor
    squared_error: Tensor
    spectrum_ratio: Tensor | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: lists, with None for what is not finite."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: None if v is None else _finite(v.tolist()) for k, v in found.items()}


class PairedRun:
    """Collects the states of one batch, step by step, beside their full-precision twins."""

    def __init__(self) -> None:
        self._checks: list[Pending[None]] = []
        self._moments: list[Pending[PairedMoments]] = []
        self._spectra: list[Pending[Tensor]] = []
        self._last = torch.empty(0)

    def add(
        self,
        reference: Tensor,
        state: Tensor,
        as_channels: Callable[[Tensor], Tensor],
        spatial: bool,
    ) -> None:
        """The states after the next step, of equal shape (n, ...), any floating dtype.

        Args:
            reference: full precision.
            state: of the other sampler.
            as_channels: (n, ...) to (n, C, elements).
            spatial: whether the last two axes are height and width.

        Raises:
            CalibrationError: the shapes differ.

        """
        step = len(self._moments)
        if reference.shape != state.shape:
            raise CalibrationError(
                f"after step {step} the two samplers have states of different shape: "
                f"{tuple(reference.shape)} and {tuple(state.shape)}. They are not twins."
            )
        diverges = CalibrationError(
            f"after step {step} the state is not finite (NaN or infinity): this sampler diverges."
        )
        self._checks.append(check(torch.isfinite(state).all(), lambda: diverges))
        x, y = working(reference), working(state)
        self._last = y - x
        e, d, own = (as_channels(t)[:, None] for t in (x, self._last, y))
        self._moments.append(PairedMoments.pending(e, d, own))
        if spatial:
            self._spectra.append(pending_spectrum(torch.stack([x, y], 1)))

    def result(self) -> PairedStates:
        """Of all steps so far, after one transfer.

        Raises:
            CalibrationError: there were none, or a state was not finite.

        """
        if not self._moments:
            raise CalibrationError("no step was taken: there are no states to compare.")
        n, last = len(self._moments), Pending((self._last,), lambda d: d.flatten(1).float())
        *found, error = settled([*self._checks, *self._moments, *self._spectra, last])
        moments, spectra = found[n : 2 * n], found[2 * n :]
        return PairedStates(
            moments=PairedMoments.joined(moments, 1),
            spectra=torch.stack(spectra, 1) if spectra else None,
            final_error=error,
        )


def log_error_ratio(squared: Tensor, baseline: Tensor, floor: Tensor) -> Tensor:
    """Log of squared error over the baseline's, prompt by prompt; -10 / log 10 of it is dB of PSNR.

    Errors below ``floor`` count as ``floor``: what rounding alone makes cannot be told from zero,
    and an error of zero has no logarithm.

    squared, baseline, floor: (n,) float64, floor positive.

    >>> one = torch.ones(2, dtype=torch.float64)
    >>> log_error_ratio(one, one, 1e-14 * one).tolist()
    [0.0, 0.0]
    """
    return (torch.maximum(squared, floor) / torch.maximum(baseline, floor)).log()


def systematic_part(error: Tensor) -> Statistic:
    """|E delta|^2 per element: what of the squared error is the same for every prompt and noise.

    The U-statistic (|sum_i delta_i|^2 - sum_i |delta_i|^2) / (n (n - 1)) per element: unbiased, so
    that it is near zero, of either sign, where nothing is shared. The plain |mean delta|^2 would
    contain 1/n of the squared error. Leaving a prompt out costs nothing: all is read off the Gram
    matrix delta_i . delta_j.

    Args:
        error: (n, elements), n >= 3 (one may be left out).

    Raises:
        CalibrationError: fewer than 3 prompts.

    >>> systematic_part(torch.full((4, 5), 3.0))(None)
    9.0

    """
    n, elements = error.shape
    if n < 3:
        raise CalibrationError(
            f"a systematic part and its uncertainty need at least 3 prompts, got {n}."
        )
    d = error.double()
    gram = d @ d.T / elements
    rows, own = gram.sum(1), gram.diagonal()
    total, trace = rows.sum(), own.sum()

    def value(i: int | None) -> float:
        if i is None:
            return float((total - trace) / (n * (n - 1)))
        rest = total - 2 * rows[i] + own[i] - (trace - own[i])
        return float(rest / ((n - 1) * (n - 2)))

    return value


def mean_of(values: Tensor) -> Statistic:
    """The mean of one value per prompt, (n,).

    >>> mean_of(torch.tensor([1.0, 2.0, 6.0]))(2)
    1.5
    """
    v = values.double()
    total, n = v.sum(), len(v)
    return lambda i: float(total / n if i is None else (total - v[i]) / (n - 1))


def _finite(values: Any) -> Any:
    if isinstance(values, list):
        return [_finite(v) for v in values]
    return values if math.isfinite(values) else None
