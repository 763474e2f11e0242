"""What is solved from a step's rows, what the prompts go on with, and the readout that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evenkeel.corrections.head_table import HeadTable
from evenkeel.corrections.readout import HeadFit, Readout
from evenkeel.fitting.lockstep.lockstep_batch import Batch
from evenkeel.fitting.provenance import provenance_of
from evenkeel.fitting.readout.solve import CallFit, Judge, new_folds, take_in
from evenkeel.record import Provenance
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.normal_equations import NormalEquations

if TYPE_CHECKING:
    from evenkeel.fitting.readout.run import HeadRun


class Strategy:
    """One pass over all steps; called as ``open``, ``take`` per batch, ``close``, at the end ``finish``."""

    title = "readout"
    #: Called with a batch: (sample, positions, change of the head's output); empty: no change.
    answer: Any

    def __init__(self, fit: HeadRun) -> None:
        self.fit = fit
        self.batches: list[Batch] = []

    def open(self, step: int, branch: int) -> None:
        """A denoiser call begins."""

    def take(self, batch: Batch) -> None:
        """All rows of one batch."""

    def close(self) -> None:
        """All rows have been seen."""

    def finish(self) -> None:
        """The pass is over."""

    def _new_folds(self) -> list[NormalEquations]:
        head = self.fit.head
        return new_folds(self.fit.units, head.features, len(head.corrected), head.has_bias)

    def _take_in(self, folds: Sequence[NormalEquations], batch: Batch) -> None:
        take_in(folds, ((unit, h, t) for unit, _, _, h, t in self.fit.rows(batch)))


class Shared(Strategy):
    """Sums of all steps along the quantized trajectory: one change for all of them."""

    title = "readout: shared change"

    def __init__(self, fit: HeadRun) -> None:
        super().__init__(fit)
        self.answer = []
        self._folds: list[NormalEquations] = []

    def take(self, batch: Batch) -> None:
        self._folds = self._folds or self._new_folds()
        self._take_in(self._folds, batch)

    def solution(self) -> CallFit:
        """The change that suits all steps best."""
        return CallFit.of(self._folds)


class Solved(Strategy):
    """Advances every prompt with the solution that was fitted without it, and judges it."""

    def __init__(self, fit: HeadRun) -> None:
        super().__init__(fit)
        self.answer = self._answer
        self.calls: dict[tuple[int, int], CallFit] = {}
        self.fits: dict[tuple[int, int], HeadFit] = {}
        self._call: CallFit | None = None
        self._judge: Judge | None = None

    def _answer(self, batch: Batch) -> Iterator[tuple[int, slice, Tensor]]:
        assert self._call is not None and self._judge is not None
        for unit, sample, place, h, t in self.fit.rows(batch):
            weight, constant = self._call.without[unit.fold]
            change = h @ weight.to(h) + constant.to(h)
            self._judge.see(unit, t, t - change)
            if sample is not None:
                yield sample, place, change

    def readout(self, form: str) -> Readout:
        """Table, verdicts and the evidence that is left."""
        fit = self.fit
        steps = 1 + max(step for step, _ in self.calls)
        branches = 1 + max(branch for _, branch in self.calls)
        weight = torch.zeros(steps, branches, fit.head.features, fit.head.targets)
        constant = torch.zeros(steps, branches, fit.head.targets)
        active = torch.zeros(steps, branches, dtype=torch.bool)
        for (step, branch), call in self.calls.items():
            weight[step, branch][:, fit.corrected] = call.whole[0].float()
            constant[step, branch][fit.corrected] = call.whole[1].float()
            active[step, branch] = not self.fits[step, branch].explanation
        provenance = self._provenance(form)
        table = HeadTable.of(*provenance.levels, weight, constant, active)
        evidence = self._evidence(provenance)
        fits = tuple(self.fits[key] for key in sorted(self.fits))
        return Readout(provenance, fit.head.name, form, table, fits, evidence)

    def _provenance(self, form: str) -> Provenance:
        watch = self.batches[0].watch
        assert watch.law is not None and watch.sample is not None and watch.layout is not None
        sample = watch.sample.unsqueeze(1)
        fit = self.fit
        made = provenance_of(fit.pipeline, watch.law, sample, watch.layout, fit.settings)
        return replace(made, correction=f"readout(form={form!r})")

    def _evidence(self, provenance: Provenance) -> Evidence | None:
        parts = [batch.watch.moments for batch in self.batches]
        if any(p is None for p in parts):
            return None
        runs = [PairedMoments.joined(p, 1) for p in parts if p is not None]
        moments = PairedMoments.joined(runs, 0)
        return Evidence(provenance.prediction, *provenance.levels, moments, source=provenance)


class PerStep(Solved):
    """A head per denoiser call, drawn to the shared change if there is one."""

    def __init__(self, fit: HeadRun, prior: CallFit | None = None) -> None:
        super().__init__(fit)
        self._prior = prior
        self._key = (0, 0)
        self._folds: list[NormalEquations] = []

    def open(self, step: int, branch: int) -> None:
        self.finish()
        self._key = (step, branch)
        self._folds = self._new_folds()
        self._judge = Judge(self.fit.units)

    def take(self, batch: Batch) -> None:
        self._take_in(self._folds, batch)

    def close(self) -> None:
        self._call = self.calls[self._key] = CallFit.of(self._folds, self._prior)
        self._folds = []

    def finish(self) -> None:
        if self._call is not None and self._judge is not None:
            self.fits[self._key] = self._judge.verdict(*self._key, self._call.penalty)


class Fixed(Solved):
    """The shared change at every step, judged as a whole."""

    def __init__(self, fit: HeadRun, call: CallFit) -> None:
        super().__init__(fit)
        self._call = call
        self._judge = Judge(fit.units)

    def open(self, step: int, branch: int) -> None:
        assert self._call is not None
        self.calls[step, branch] = self._call

    def finish(self) -> None:
        assert self._call is not None and self._judge is not None
        for key in self.calls:
            self.fits[key] = self._judge.verdict(*key, self._call.penalty)
