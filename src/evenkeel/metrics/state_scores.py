"""Does a sampler end closer to full precision? Three scores of a few dozen final states, one verdict.

What a set of images would show is predicted from the final latent states, by three scores. All are
paired with the quantized arm, negative where the arm is better, with 95 % delete-one jackknife
intervals over prompts:

``squared_error``, the primary score
    Mean over prompts of log(squared error / quantized arm's). PSNR to full precision is this number
    times -4.34 dB, as far as the decoder is linear. The Fréchet distance to full precision follows
    it too: it cannot be large while every image is close to its twin.
``systematic``
    Change of |E delta|^2, the error that all prompts share, as a share of the quantized arm's
    squared error. A shared error shifts the distribution of images, which the Fréchet distance
    weighs far more than the same squared error spread over directions that differ by prompt.
``marginal``
    Relative change of the Fréchet distance between the final states' channel means and spreads (one
    of each per channel and prompt) and those of full precision: lost contrast, shifted colours.
    With a few dozen prompts it is noisy, and only shows what is gross.

A score counts as better or worse where its interval excludes zero and its value is at least
``PRACTICAL``, 1 %. Then an arm is

- *expected to help* where the squared error gets better and no score worse;
- *expected to hurt* where some score gets worse and the squared error, intervals aside, no lower;
- *neutral* otherwise.

Confidence, of help or hurt: 1 - p of the two-sided t test of the score that decided. Of neutral: the
probability, by the same distribution, that the squared error changes by less than ``PRACTICAL``.
Where that is low, neutral means "cannot be told from so few prompts", not "no effect".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import scipy.stats

from evenkeel.errors import CalibrationError, MetricError
from evenkeel.estimate import Estimate
from evenkeel.metrics.feature_moments import GroupMoments
from evenkeel.metrics.frechet import frechet_between
from evenkeel.metrics.interval import student_interval
from evenkeel.metrics.jackknife import jackknife
from evenkeel.statistics.marginals import (
    PairedStates,
    Statistic,
    log_error_ratio,
    mean_of,
    systematic_part,
)

Verdict = Literal["expected to help", "neutral", "expected to hurt"]
HELP: Verdict = "expected to help"
NEUTRAL: Verdict = "neutral"
HURT: Verdict = "expected to hurt"
PRACTICAL = 0.01
"""Changes below 1 % are neutral however certain: 0.04 dB of PSNR, which no one will see."""
SCORES = ("squared_error", "systematic", "marginal")


def scores_of(arm: PairedStates, quantized: PairedStates, resolution: float) -> dict[str, Estimate]:
    """The three scores of the module's description, with delete-one jackknife intervals.

    Args:
        arm: of the same prompts and noise as the quantized one.
        quantized: what it is compared with.
        resolution: of the states' dtype; errors below it, relative to the state, count as equal.

    Raises:
        CalibrationError: the quantized arm's error is below the resolution: there is nothing to
            correct.

    """
    n = len(quantized.final_error)
    floor = resolution**2 * quantized.mean_square[:, -1]
    mine, theirs = arm.squared_error[:, -1], quantized.squared_error[:, -1]
    if bool((theirs <= floor).all()):
        raise CalibrationError(
            "the quantized sampler ends in the states of the full-precision one: there is nothing to "
            "correct. Check that the second arm's denoiser is the quantized one."
        )
    shared = systematic_part(arm.final_error), systematic_part(quantized.final_error)
    squared = mean_of(theirs)
    return {
        "squared_error": _leaving_one_out(mean_of(log_error_ratio(mine, theirs, floor)), n),
        "systematic": _leaving_one_out(lambda i: (shared[0](i) - shared[1](i)) / squared(i), n),
        "marginal": _marginal(arm, quantized),
    }


def shared_part(sampler: PairedStates) -> Estimate:
    """Share of a sampler's final squared error that is the same for every prompt, |E delta|^2 / E |delta|^2.

    What a correction that moves every state alike (TAC's input bias) can take off at most; unbiased, so it
    may be below 0 where nothing is shared. With delete-one jackknife interval over prompts.
    """
    shared, squared = (
        systematic_part(sampler.final_error),
        mean_of(sampler.squared_error[:, -1]),
    )
    return _leaving_one_out(lambda i: shared(i) / squared(i), len(sampler.final_error))


def input_bias_gain(shared: float, prompts: float = math.inf) -> float:
    """What a correction that moves every state alike brings, in dB: -10 log10((1 - s)(1 + 1/n)).

    It takes off the share s that all prompts have in common (`shared_part`; below 0 counts as 0) and adds
    1/n of the rest, as its own mean is of n prompts.

    >>> round(input_bias_gain(0.2, 32), 2), round(input_bias_gain(0.2), 2)
    (0.84, 0.97)

    """
    rest = 1 - min(max(shared, 0.0), 0.999)
    return -10 * math.log10(rest * (1 + 1 / prompts))


def verdict_of(scores: Mapping[str, Estimate]) -> tuple[Verdict, float]:
    """Verdict and confidence by the rule of the module's description.

    >>> sure = Estimate(-0.5, 0.05, -0.6, -0.4, 32)
    >>> same = Estimate(0.0, 0.05, -0.1, 0.1, 32)
    >>> verdict_of({"squared_error": sure, "systematic": same, "marginal": same})[0]
    'expected to help'
    >>> verdict_of({"squared_error": same, "systematic": same, "marginal": same})[0]
    'neutral'
    """
    primary = scores["squared_error"]
    worse = [s for s in scores.values() if s.low > 0 and s.value >= PRACTICAL]
    if primary.high < 0 and primary.value <= -PRACTICAL and not worse:
        return HELP, 1 - _two_sided(primary)
    if worse and primary.value >= 0:
        return HURT, 1 - min(_two_sided(s) for s in worse)
    return NEUTRAL, _below(primary, PRACTICAL) - _below(primary, -PRACTICAL)


def _leaving_one_out(statistic: Statistic, n: int) -> Estimate:
    value, stderr = jackknife(statistic, n, groups=n)
    return student_interval(value, stderr, n, dof=n - 1)


def _marginal(arm: PairedStates, quantized: PairedStates) -> Estimate:
    """NaN where an arm is so far off that its moments overflow."""
    n = len(quantized.final_error)
    reference, mine = arm.descriptors()
    r, a, q = (GroupMoments(d, n) for d in (reference, mine, quantized.descriptors()[1]))

    def change(i: int | None) -> float:
        origin = r.without(i)
        there = frechet_between(origin, q.without(i))
        return frechet_between(origin, a.without(i)) / there - 1

    try:
        return _leaving_one_out(change, n)
    except MetricError:
        return Estimate(math.nan, math.nan, math.nan, math.nan, n)


def _two_sided(e: Estimate) -> float:
    """The p value of the hypothesis that the true value is zero."""
    if e.stderr == 0:
        return float(e.value == 0)
    return float(2 * scipy.stats.t.sf(abs(e.value) / e.stderr, e.n - 1))


def _below(e: Estimate, bound: float) -> float:
    """The probability that the true value is below the bound."""
    if e.stderr == 0:
        return float(e.value < bound)
    return float(scipy.stats.t.cdf((bound - e.value) / e.stderr, e.n - 1))
