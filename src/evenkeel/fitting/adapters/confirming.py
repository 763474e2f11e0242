"""Whether something is better than nothing: some pairs say so, or four times as many do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from evenkeel.fitting.adapters.pairs import Pairs
from evenkeel.statistics.student import mean_and_bound

# Of being wrong at the first look, and at the second: together 5 %, however the looks depend on each other.
ERRORS = (0.03, 0.02)


class Confirmation(NamedTuple):
    """What the pairs said.

    Attributes:
        mean: dB, of all pairs that were asked.
        bound: one-sided lower bound of it, which holds with 95 % confidence over both looks.
        pairs: that were asked.

    """

    mean: float
    bound: float
    pairs: int

    @property
    def holds(self) -> bool:
        """Whether it is better than nothing."""
        return self.bound > 0


def confirmation(pairs: Pairs, gains: Callable[[range], torch.Tensor]) -> Confirmation:
    """Ask the confirming pairs; the further ones, too, where these lean to yes and are not sure.

    The further pairs have the prompts of the first with other noise, and what a prompt gains is alike
    for any noise. So the second bound is over the means of each pair and its repetitions, as many values
    as at the first look.

    Args:
        pairs: of the fit.
        gains: of held-out pairs (``Pairs.held_out``), (pairs,) dB.

    """
    found = gains(pairs.confirm)
    mean, bound = mean_and_bound(found, 1 - ERRORS[0])
    if mean > 0 >= bound and pairs.further:
        found = torch.cat([found, gains(pairs.further)])
        each = found.view(-1, len(pairs.confirm)).mean(0)
        mean, bound = mean_and_bound(each, 1 - ERRORS[1])
    return Confirmation(mean, bound, len(found))
