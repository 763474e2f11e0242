"""Which (prompt, seed) pairs an adapter is fitted on, which choose between fits, and which confirm."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from evenkeel.errors import CalibrationError
from evenkeel.hosts.run import Run

HELD_OUT = 8  # pairs that confirm, at least
FURTHER = 3  # times as many are asked, too, where these do not decide
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
        held_out: pairs that choose, pairs that confirm, and further ones for what these do not decide.
        choosing: how many of them choose.
        confirming: how many of them confirm.

    """

    fit: Run
    held_out: Run
    choosing: int
    confirming: int

    @classmethod
    def of(cls, run: Run, *, choosing: bool = True) -> Pairs:
        """Split the prompts of a run.

        Raises:
            CalibrationError: the noise of too few prompts is given, so that none is left for the others.

        """
        n, given = len(run.prompts), "latents" in run.prompts.columns
        if n < ENOUGH and given:
            raise CalibrationError(
                f"latents give the noise of {n} prompts, and none is left to hold out: pass at least "
                f"{ENOUGH} prompts, or leave latents out."
            )
        fit = choose = confirm = range(n)
        if n >= ENOUGH:
            quarter = n // 4
            first = n - quarter * (2 if choosing else 1)
            fit, choose, confirm = range(first), range(first, n - quarter), range(n - quarter, n)
        # A prompt may serve again with other noise; not where its noise is given.
        chosen_by = 0
        if choosing:
            chosen_by = len(choose) if given else max(CHOOSING, min(len(choose), HELD_OUT))
        confirmed_by = len(confirm) if given else max(HELD_OUT, len(confirm))
        choose_all = [choose[i % len(choose)] for i in range(chosen_by)]
        confirm_all = [confirm[i % len(confirm)] for i in range(confirmed_by)]
        further_all = [] if given else FURTHER * confirm_all
        return cls(
            part(run, list(fit), run.seed),
            part(run, choose_all + confirm_all + further_all, run.seed + n),
            chosen_by,
            confirmed_by,
        )

    @property
    def choose(self) -> range:
        """Which of those held out choose between fits."""
        return range(self.choosing)

    @property
    def confirm(self) -> range:
        """Which of those held out say whether the best one is better than nothing."""
        return range(self.choosing, self.choosing + self.confirming)

    @property
    def further(self) -> range:
        """Which are asked, too, where those do not decide: their prompts again, in turn, with other noise."""
        return range(self.confirm.stop, len(self.held_out.prompts))


def part(run: Run, which: list[int], seed: int) -> Run:
    """The same run for some of its prompts; what it has found out already is shared."""
    found = copy.copy(run)
    found.prompts, found.seed = run.prompts.take(which), seed
    return found
