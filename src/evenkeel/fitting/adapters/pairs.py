"""Which (prompt, seed) pairs an adapter is fitted on, which choose between fits, and which confirm."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from evenkeel.hosts.run import Run

HELD_OUT = 8  # pairs that confirm, at least
CHOOSING = 4  # pairs that choose, at least
ENOUGH = 8  # from so many prompts on, those held out are others


@dataclass(frozen=True)
class Pairs:
    """Three disjoint sets of (prompt, seed) pairs, as runs.

    From eight prompts on, the last quarter confirms and the quarter before chooses; fewer prompts serve
    all three with other noise, as one prompt must do. No noise is used twice.

    Attributes:
        fit: on which the sums are collected.
        choose: which of several fits is kept.
        confirm: whether it is better than nothing.

    """

    fit: Run
    choose: Run
    confirm: Run

    @classmethod
    def of(cls, run: Run) -> Pairs:
        """Split the prompts of a run."""
        n = len(run.prompts)
        fit = choose = confirm = range(n)
        if n >= ENOUGH:
            quarter = n // 4
            fit, choose, confirm = (
                range(n - 2 * quarter),
                range(n - 2 * quarter, n - quarter),
                range(n - quarter, n),
            )
        choosing = [
            choose[i % len(choose)] for i in range(max(CHOOSING, min(len(choose), HELD_OUT)))
        ]
        confirming = [confirm[i % len(confirm)] for i in range(max(HELD_OUT, len(confirm)))]
        return cls(
            _part(run, list(fit), run.seed),
            _part(run, choosing, run.seed + n),
            _part(run, confirming, run.seed + n + len(choosing)),
        )


def _part(run: Run, which: list[int], seed: int) -> Run:
    """The same run for some of its prompts; what it has found out already is shared."""
    part = copy.copy(run)
    part.prompts, part.seed = run.prompts.take(which), seed
    return part
