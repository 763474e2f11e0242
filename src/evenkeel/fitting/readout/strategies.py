"""What is solved from a step's rows, what the prompts go on with, and the readout that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from evenkeel.corrections.head_table import HeadTable
from evenkeel.corrections.readout import HeadFit, Readout
from evenkeel.fitting.lockstep.joined import equations_of_all
from evenkeel.fitting.readout.head_call import HeadCall
from evenkeel.fitting.readout.solve import CallFit, Judge, Unit, new_folds, take_in
from evenkeel.hosts.actuators.head_rows import Head
from evenkeel.hosts.processes import processes
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.exact import Pending, settled
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.normal_equations import NormalEquations, Solution
from evenkeel.statistics.provenance import Provenance


class Rows(Protocol):
    """Where rows come from: the paused calls of a run.

    Attributes:
        head: whose inputs and errors they are.
        corrected: of its targets, which are fitted.
        units: which rows stand or fall together.

    """

    head: Head
    corrected: Tensor
    units: list[Unit]

    def rows(self, call: HeadCall) -> Iterator[tuple[Unit, int | None, slice, Tensor, Tensor]]:
        """Unit, sample (None: a combination of branches), positions, inputs, errors of a paused call."""
        ...


class Strategy:
    """One pass over all steps; ``open``, ``take`` per call, ``close`` at every pause, then ``finish``."""

    title = "readout"
    #: Called with a paused call: (sample, positions, change of the head's output); empty: no change.
    answer: Any

    def __init__(self, fit: Rows) -> None:
        self.fit = fit

    def open(self, step: int, branch: int) -> None:
        """A denoiser call begins."""

    def take(self, call: HeadCall) -> None:
        """All rows of one paused call."""

    @property
    def pending(self) -> list[Pending[Any]]:
        """What ``close`` needs of what lies on the device."""
        return []

    def close(self) -> None:
        """All rows have been seen, and what was pending is here."""

    def finish(self) -> None:
        """The pass is over."""

    def _new_folds(self) -> list[NormalEquations]:
        head = self.fit.head
        return new_folds(self.fit.units, head.features, len(head.corrected), head.has_bias)

    def _take_in(self, folds: Sequence[NormalEquations], call: HeadCall) -> None:
        take_in(folds, ((unit, h, t) for unit, _, _, h, t in self.fit.rows(call)))


class Shared(Strategy):
    """Sums of all steps along the quantized trajectory: one change for all of them."""

    title = "readout: shared change"

    def __init__(self, fit: Rows) -> None:
        super().__init__(fit)
        self.answer = []
        self._folds: list[NormalEquations] = []

    def take(self, call: HeadCall) -> None:
        self._folds = self._folds or self._new_folds()
        self._take_in(self._folds, call)

    def solution(self) -> CallFit:
        """The change that suits all steps best."""
        return CallFit.of(equations_of_all(processes(), self._folds))


class Solved(Strategy):
    """Advances every prompt with the solution that was fitted without it, and judges it."""

    def __init__(self, fit: Rows) -> None:
        super().__init__(fit)
        self.answer = self._answer
        self.calls: dict[tuple[int, int], CallFit] = {}
        self.fits: dict[tuple[int, int], HeadFit] = {}
        self._call: CallFit | None = None
        self._judge: Judge | None = None
        self._placed: dict[int, Solution] = {}  # of the current call, where its rows are

    def _without(self, fold: int, h: Tensor) -> Solution:
        """What the prompts of a fold go on with."""
        assert self._call is not None
        if fold not in self._placed:
            weight, constant = self._call.without[fold]
            self._placed[fold] = weight.to(h), constant.to(h)
        return self._placed[fold]

    def _answer(self, call: HeadCall) -> Iterator[tuple[int, slice, Tensor]]:
        assert self._judge is not None
        for unit, sample, place, h, t in self.fit.rows(call):
            weight, constant = self._without(unit.fold, h)
            change = h @ weight + constant
            self._judge.see(unit, t, t - change)
            if sample is not None:
                yield sample, place, change

    def readout(
        self, form: str, provenance: Provenance, moments: Sequence[list[PairedMoments] | None]
    ) -> Readout:
        """Table, verdicts and the evidence that is left: of every batch, its moments per step."""
        fit = self.fit
        columns = fit.corrected.cpu()
        steps = 1 + max(step for step, _ in self.calls)
        branches = 1 + max(branch for _, branch in self.calls)
        weight = torch.zeros(steps, branches, fit.head.features, fit.head.targets)
        constant = torch.zeros(steps, branches, fit.head.targets)
        active = torch.zeros(steps, branches, dtype=torch.bool)
        for (step, branch), call in self.calls.items():
            weight[step, branch][:, columns] = call.whole[0].float()
            constant[step, branch][columns] = call.whole[1].float()
            active[step, branch] = not self.fits[step, branch].explanation
        table = HeadTable.of(*provenance.levels, weight, constant, active)
        evidence = None
        if not any(steps is None for steps in moments):
            runs = [PairedMoments.joined(steps, 1) for steps in moments if steps is not None]
            joined = PairedMoments.joined(runs, 0)
            evidence = Evidence(
                provenance.prediction, *provenance.levels, joined, source=provenance
            )
        fits = tuple(self.fits[key] for key in sorted(self.fits))
        return Readout(provenance, fit.head.name, form, table, fits, evidence)


class PerStep(Solved):
    """A head per denoiser call, drawn to the shared change if there is one."""

    def __init__(self, fit: Rows, prior: CallFit | None = None) -> None:
        super().__init__(fit)
        self._prior = prior
        self._key = (0, 0)
        self._folds: list[NormalEquations] = []
        self._judges: dict[tuple[int, int], Judge] = {}

    def open(self, step: int, branch: int) -> None:
        self._key = (step, branch)
        self._folds = self._new_folds()
        self._judge = self._judges[self._key] = Judge(self.fit.units)

    def take(self, call: HeadCall) -> None:
        self._take_in(self._folds, call)

    @property
    def pending(self) -> list[Pending[Any]]:
        return [p for fold in self._folds for p in fold.pending]

    def close(self) -> None:
        folds = equations_of_all(processes(), self._folds)
        self._call = self.calls[self._key] = CallFit.of(folds, self._prior)
        self._folds, self._placed = [], {}

    def finish(self) -> None:
        settled(judge.pending for judge in self._judges.values())
        for key, judge in self._judges.items():
            judge.join(processes())
            self.fits[key] = judge.verdict(*key, self.calls[key].penalty)


class Fixed(Solved):
    """The shared change at every step, judged as a whole."""

    def __init__(self, fit: Rows, call: CallFit) -> None:
        super().__init__(fit)
        self._call = call
        self._judge = Judge(fit.units)

    def open(self, step: int, branch: int) -> None:
        assert self._call is not None
        self.calls[step, branch] = self._call

    def finish(self) -> None:
        assert self._call is not None and self._judge is not None
        settled([self._judge.pending])
        self._judge.join(processes())
        for key in self.calls:
            self.fits[key] = self._judge.verdict(*key, self._call.penalty)
