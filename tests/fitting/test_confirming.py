"""Eight pairs say whether something is better than nothing, or all of them do."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from evenkeel.fitting.adapters.confirming import ERRORS, confirmation
from evenkeel.fitting.adapters.fit_adapters import _best
from evenkeel.fitting.adapters.pairs import Pairs


def pairs(confirming: int = 8, further: int = 24) -> Pairs:
    class Given:
        prompts = range(4 + confirming + further)

    return Pairs(None, Given(), choosing=4, confirming=confirming)  # type: ignore[arg-type]


def asked_of(gains: Tensor) -> tuple[list[range], object]:
    asked: list[range] = []

    def of(over: range) -> Tensor:
        asked.append(over)
        return gains[over.start : over.stop]

    return asked, of


@pytest.mark.parametrize(("mean", "looks"), [(5.0, 1), (-0.5, 1), (0.5, 2)])
def test_further_pairs_are_asked_only_where_the_first_lean_to_yes_and_are_not_sure(mean, looks):
    gains = mean + torch.linspace(-2, 2, 8, dtype=torch.float64).repeat(5)[:36]
    asked, of = asked_of(gains)
    found = confirmation(pairs(), of)
    assert asked == [range(4, 12), range(12, 36)][:looks]
    asked_for = gains[4 : 12 if looks == 1 else 36]
    used = asked_for.view(-1, 8).mean(0)
    quantile = scipy.stats.t.ppf(1 - ERRORS[looks - 1], len(used) - 1)
    bound = used.mean() - quantile * used.std() / math.sqrt(len(used))
    assert found.pairs == len(asked_for)
    assert found.mean == pytest.approx(float(used.mean()), rel=1e-12)
    assert found.bound == pytest.approx(float(bound), rel=1e-12)
    assert found.holds == (bound > 0)


def test_where_noise_is_given_there_are_no_further_pairs():
    asked, of = asked_of(0.5 + torch.linspace(-2, 2, 12, dtype=torch.float64))
    assert confirmation(pairs(further=0), of).pairs == 8
    assert asked == [range(4, 12)]


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_nothing_is_confirmed_too_often(shared):
    """Of changes worth nothing at most 5 % pass both looks, however much a prompt's pairs have in common."""
    generator = torch.Generator().manual_seed(0)
    trials, passed = 3000, 0
    for _ in range(trials):
        own = torch.randn(36, generator=generator, dtype=torch.float64)
        prompts = torch.randn(8, generator=generator, dtype=torch.float64).repeat(4)
        gains = own * (1 - shared) ** 0.5
        gains[4:] += prompts * shared**0.5
        passed += confirmation(pairs(), asked_of(gains)[1]).holds
    assert passed / trials < 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)
    assert passed / trials > 0.02


def test_of_fits_that_pairs_cannot_tell_apart_the_first_is_taken():
    noise = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert _best([torch.ones(4), torch.ones(4) + noise]) == 0
    assert _best([torch.ones(4) - 0.1, torch.ones(4)]) == 1  # surely behind
    assert _best([torch.ones(1), 2 * torch.ones(1)]) == 0  # one pair tells nothing
