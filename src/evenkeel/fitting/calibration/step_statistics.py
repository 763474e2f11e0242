"""What a calibration keeps of one batch: sums per step, taken where the outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.statistics.error_structure import pending_gram, pending_spectrum
from evenkeel.statistics.exact import Pending, settled, working
from evenkeel.statistics.histogram import ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.residual import ResidualHistogram
from evenkeel.statistics.second_order import SecondOrder


class StepStatistics:
    """Sums of one batch, step by step; only the errors themselves stay, for their Gram matrix.

    Without a frame every step waits for its moments, which are the frame's; with one nothing waits
    until all steps are there.

    Args:
        layout: where the channels are.
        frame: of the histograms; None makes one of this batch.
        histograms: whether they are collected.

    Attributes:
        moments, frame, spectrum, gram, histogram, residual: as of a record, after ``settle``; the
            spectrum (prompts, steps, rings), None where the latent has no height and width.

    """

    def __init__(self, layout: LatentLayout, frame: Frame | None, histograms: bool) -> None:
        self._layout, self._given, self._histograms = layout, frame, histograms
        self._frames: list[Frame] = []
        self._errors: list[Tensor] = []
        self._checks: list[Pending[Any]] = []
        self._waiting: dict[str, list[Pending[Any]]] = {}

    def take(self, e: Tensor, q: Tensor, x: Tensor, *checks: Pending[None]) -> None:
        """The next step: full-precision output, quantized output and state, one row per prompt.

        ``checks`` are settled together with its sums, before them.
        """
        step = len(self._errors)
        d = working(q) - working(e)
        self._errors.append(d.float())
        e_c, d_c, x_c = (self._layout.as_channels(t)[:, None] for t in (e, d, x))
        moments = PairedMoments.pending(e_c, d_c, x_c)
        if self._given is None:
            *_, found = settled([*checks, moments])
            moments, frame = _here(found), frame_of(found)
            self._frames.append(frame)
        else:
            self._checks += checks
            frame = _rows(self._given, slice(step, step + 1))
        self._keep("moments", moments)
        if self._layout.is_spatial:
            self._keep("spectrum", pending_spectrum(d[:, None]))
        if self._histograms:
            self._keep("histogram", ErrorHistogram.pending(frame, e_c, d_c))
            self._keep("residual", ResidualHistogram.pending(frame, e_c, d_c))

    def settle(self) -> None:
        """All steps were taken: bring the sums here."""
        errors = torch.stack(self._errors, 1)
        self._errors.clear()
        for own in errors:  # prompt by prompt, as float64 takes twice the memory
            self._keep("gram", pending_gram(own[None]))
        groups = list(self._waiting.values())
        found = iter(settled([*self._checks, *(p for group in groups for p in group)]))
        for _ in self._checks:
            next(found)
        parts = {name: [next(found) for _ in group] for name, group in self._waiting.items()}
        self._waiting.clear()
        self.moments = PairedMoments.joined(parts["moments"], 1)
        self.frame = self._given or _joined(self._frames)
        self.gram: Tensor = torch.cat(parts["gram"])
        self.spectrum = torch.cat(parts["spectrum"], 1) if "spectrum" in parts else None
        self.histogram: ErrorHistogram | None = None
        self.residual: ResidualHistogram | None = None
        if self._histograms:
            sums, counts = parts["histogram"], parts["residual"]
            self.histogram = ErrorHistogram(self.frame, torch.cat([h.sums for h in sums]))
            self.residual = ResidualHistogram(self.frame, torch.cat([h.counts for h in counts]))

    def _keep(self, name: str, pending: Pending[Any]) -> None:
        self._waiting.setdefault(name, []).append(pending)


def frame_of(moments: PairedMoments) -> Frame:
    """The frame that a pilot's moments (prompts, steps, channels) make."""
    pooled = moments.pooled(0)
    second = SecondOrder.of(pooled)
    return Frame(
        mean_d=pooled.mean_d,
        std_d=second.dd.sqrt(),
        mean_e=pooled.mean_e,
        std_e=second.ee.sqrt(),
        gain=second.gain,
        std_r=second.residual.sqrt(),
    )


def _here(found: Any) -> Pending[Any]:
    return Pending((), lambda: found)


def _rows(frame: Frame, steps: slice) -> Frame:
    return Frame(**{f.name: getattr(frame, f.name)[steps] for f in fields(Frame)})


def _joined(frames: Sequence[Frame]) -> Frame:
    return Frame(**{f.name: torch.cat([getattr(x, f.name) for x in frames]) for f in fields(Frame)})
