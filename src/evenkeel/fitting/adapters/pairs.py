"""Which (prompt, seed) pairs an adapter is fitted on, which choose between fits, and which confirm."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from evenkeel.errors import CalibrationError
from evenkeel.hosts.run import Run

HELD_OUT = 8  # pairs that confirm, at least
CHOOSING = 4  # pairs that choose, at least
ENOUGH = 8  # from so many prompts on, those held out are others


@dataclass(frozen=True)
class Pairs:
    """Three disjoint sets of (prompt, seed) pairs, as runs.

    From eight prompts on, the last quarter confirms and the quarter before chooses, if there is anything
    to choose; fewer prompts serve all three with other noise, as one prompt must do. No noise is used
    twice.

    Attributes:
        fit: on which the sums are collected.
        held_out: pairs that choose, then pairs that confirm.
        choosing: how many of them choose.

    """

    fit: Run
    held_out: Run
    choosing: int

    @classmethod
    def of(cls, run: Run, *, choosing: bool = True) -> Pairs:
        """Split the prompts of a run.

        Raises:
            CalibrationError: the noise of too few prompts is given, so that none is left for the others.

        """
        n = len(run.prompts)
        if n < ENOUGH and "latents" in run.prompts.columns:
            raise CalibrationError(
                f"latents give the noise of {n} prompts, and none is left to hold out: pass at least "
                f"{ENOUGH} prompts, or leave latents out."
            )
        fit = choose = confirm = range(n)
        if n >= ENOUGH:
            quarter = n // 4
            first = n - quarter * (2 if choosing else 1)
            fit, choose, confirm = range(first), range(first, n - quarter), range(n - quarter, n)
        chosen_by = max(CHOOSING, min(len(choose), HELD_OUT)) if choosing else 0
        choose_all = [choose[i % len(choose)] for i in range(chosen_by)]
        confirm_all = [confirm[i % len(confirm)] for i in range(max(HELD_OUT, len(confirm)))]
        return cls(
            part(run, list(fit), run.seed),
            part(run, choose_all + confirm_all, run.seed + n),
            chosen_by,
        )

    @property
    def choose(self) -> range:
        """Which of those held out choose between fits."""
        return range(self.choosing)

    @property
    def confirm(self) -> range:
        """Which of those held out say whether the best one is better than nothing."""
        return range(self.choosing, len(self.held_out.prompts))


def part(run: Run, which: list[int], seed: int) -> Run:
    """The same run for some of its prompts; what it has found out already is shared."""
    found = copy.copy(run)
    found.prompts, found.seed = run.prompts.take(which), seed
    return found
