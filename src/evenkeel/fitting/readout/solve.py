"""One denoiser call's fit: which rows belong together, the ridge penalty, and whether it helped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.corrections.readout import HeadFit
from evenkeel.hosts.processes import Processes
from evenkeel.statistics.exact import Pending, sum_pair, working
from evenkeel.statistics.normal_equations import (
    CHUNK,
    NormalEquations,
    Solution,
    held_out_errors,
)
from evenkeel.statistics.student import student_margin

FOLDS = 4
FOLD_MEMORY = 80e6  # bytes for all folds' scatter matrices: two folds at FLUX's width
WIDE = 1024  # features from which the grid of penalties is coarser, as a factor takes seconds
_EXPONENTS = (-8.0, -4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
PENALTIES = tuple(10.0**k for k in _EXPONENTS)  # the first where features explain the whole error
PENALTIES_WIDE = tuple(10.0**k for k in range(-4, 3))


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows that stand or fall together when held-out errors are averaged: a prompt, or a part of one.

    Attributes:
        prompt: its index.
        part, parts: block of positions out of so many.
        fold: which fold leaves it out.

    """

    prompt: int
    part: int
    parts: int
    fold: int

    def rows(self, positions: int) -> slice:
        """The block of positions."""
        return slice(self.part * positions // self.parts, (self.part + 1) * positions // self.parts)


def units_of(prompts: int, positions: int, features: int) -> list[Unit]:
    """Folds are sets of prompts; a single prompt is folded over blocks of its positions.

    Fewer than four prompts are split into blocks to have enough units for a bound; blocks of one
    prompt still share a fold, unless there is only one prompt.
    """
    packed = features * (features + 1) / 2 * 8
    folds = max(2, min(FOLDS, int(FOLD_MEMORY // packed)))
    if prompts >= 4:
        return [Unit(p, 0, 1, p * folds // prompts) for p in range(prompts)]
    parts = min(8 if prompts == 1 else 4, positions)
    if prompts == 1:
        return [Unit(0, j, parts, j * folds // parts) for j in range(parts)]
    folds = min(folds, prompts)
    return [Unit(p, j, parts, p * folds // prompts) for p in range(prompts) for j in range(parts)]


def new_folds(
    units: Sequence[Unit], features: int, targets: int, bias: bool
) -> list[NormalEquations]:
    """Empty normal equations, one per fold."""
    count = max(u.fold for u in units) + 1
    return [NormalEquations(features, targets, bias) for _ in range(count)]


def take_in(folds: Sequence[NormalEquations], rows: Iterable[tuple[Unit, Tensor, Tensor]]) -> None:
    """Add the rows (unit, h, t) to their folds, neighbours of one fold together.

    Ten products of 16 rows cost several times one of 160. No more than CHUNK rows are put together:
    at FLUX's width those of a whole batch would need more memory than the sums.
    """
    waiting: list[tuple[Tensor, Tensor]] = []
    fold, count = 0, 0

    def add() -> None:
        if len(waiting) == 1:
            folds[fold].add(*waiting[0])
        elif waiting:
            folds[fold].add(torch.cat([h for h, _ in waiting]), torch.cat([t for _, t in waiting]))
        waiting.clear()

    for unit, h, t in rows:
        if unit.fold != fold or count + len(h) > CHUNK:
            add()
            fold, count = unit.fold, 0
        waiting.append((h, t))
        count += len(h)
    add()


@dataclass(frozen=True)
class CallFit:
    """Solutions of one denoiser call.

    Attributes:
        whole: fitted on all prompts; what is kept.
        without: per fold, fitted on the others; what the prompts of that fold advance with.
        penalty: in units of the features' mean scatter.

    """

    whole: Solution
    without: list[Solution]
    penalty: float

    @classmethod
    def of(
        cls,
        folds: Sequence[NormalEquations],
        prior: CallFit | None = None,
    ) -> CallFit:
        """The ridge solution with the penalty of least held-out error.

        With a ``prior`` (the change shared by all steps) solutions are drawn to it instead of to
        zero; each fold to the prior that was fitted without it.
        """
        penalties = PENALTIES_WIDE if folds[0].features > WIDE else PENALTIES
        priors = None if prior is None else prior.without
        errors, solutions = held_out_errors(folds, penalties, priors)
        best = int(errors.argmin())
        without = [s[best] for s in solutions]
        del solutions  # a step's largest matrices follow
        everything = NormalEquations.merged(folds)
        whole = everything.solve([penalties[best]], None if prior is None else prior.whole)[0]
        return cls(whole, without, penalties[best])


class Judge:
    """Squared errors before and after, per unit; says whether a change is kept."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._index = {(u.prompt, u.part): i for i, u in enumerate(units)}
        self.before = torch.zeros(len(units), dtype=torch.float64)
        self.after = torch.zeros(len(units), dtype=torch.float64)
        self._seen: list[int] = []
        self._sums: list[Tensor] = []  # where the rows are

    def see(self, unit: Unit, before: Tensor, after: Tensor) -> None:
        """Errors of some rows of a unit under the solution that never saw them."""
        self._seen.append(self._index[unit.prompt, unit.part])
        squares = torch.stack([working(before).flatten(), working(after).flatten()]).square()
        self._sums.append(sum_pair(squares))

    @property
    def pending(self) -> Pending[None]:
        """What was seen; a verdict needs it settled."""
        seen, sums = torch.tensor(self._seen, dtype=torch.int64), self._sums
        self._seen, self._sums = [], []

        def arrived(*pairs: Tensor) -> None:
            for pair in pairs:
                before, after = pair.sum(1).unbind(-1)
                self.before.index_add_(0, seen, before)
                self.after.index_add_(0, seen, after)

        return Pending((torch.stack(sums),) if sums else (), arrived)

    def join(self, us: Processes) -> None:
        """Take in what the other processes saw; every unit is one process's."""
        self.before, self.after = us.summed(torch.stack([self.before, self.after]))

    def verdict(self, step: int, branch: int, penalty: float) -> HeadFit:
        """Keep the change only if the mean error over units falls, with 95 % confidence.

        One-sided Student interval of the paired differences; the bound is given relative to the
        mean error before.
        """
        mean = float(self.before.mean())
        if mean == 0:
            return HeadFit(step, branch, penalty, 1.0, 1.0, "there is no error to correct")
        change = (self.after - self.before) / mean
        left = 1 + float(change.mean())
        bound = left + student_margin(change)
        reason = "" if bound < 1 else "no certain improvement on held-out prompts"
        return HeadFit(step, branch, penalty, left, min(bound, 1e9), reason)


def blocks(units: Sequence[Unit], prompts: range, rows: int) -> Iterator[tuple[Unit, int]]:
    """Which of a batch's samples belong to which unit.

    A batch of P prompts with guidance has its samples branch after branch: sample r is prompt r % P.
    """
    size = len(prompts)
    for unit in units:
        if unit.prompt in prompts:
            for branch in range(rows // size):
                yield unit, branch * size + unit.prompt - prompts.start
