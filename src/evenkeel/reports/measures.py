"""What is measured, which way is better, and how one number with its uncertainty is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evenkeel.errors import EvenkeelError
from evenkeel.metrics.picture_statistics import STATISTICS

FULL_PRECISION = "full-precision"
QUANTIZED = "quantized"
ABSENT = "-"

Verdict = Literal["better", "worse", "no difference shown", "not known"]


@dataclass(frozen=True, slots=True)
class Measure:
    """One column: its key in the results, its heading, what it says, and which way is better.

    ``itself`` is what comparing the full-precision arm with itself gives (None: infinite), up to
    ``tolerance``; only measures with ``to_itself`` are such comparisons. ``only_difference``: measured
    against the quantized arm, so that an arm by itself has none.
    """

    key: str
    heading: str
    words: str
    better: Literal["lower", "higher"]
    to_itself: bool = False
    itself: float | None = None
    tolerance: float = 0.0
    only_difference: bool = False


MEASURES: tuple[Measure, ...] = (
    Measure(
        "frechet_full_precision",
        "FD to full precision",
        "the Fréchet distance to the full-precision pictures",
        "lower",
        to_itself=True,
        itself=0.0,
        tolerance=1e-3,  # a matrix square root in float64 leaves this much of an exact zero
    ),
    Measure(
        "frechet_reference",
        "FD to held-out",
        "the Fréchet distance to held-out real pictures",
        "lower",
    ),
    Measure("alignment", "alignment", "the match between pictures and prompts", "higher"),
    Measure(
        "psnr",
        "PSNR",
        "PSNR, the pixel-by-pixel closeness to full precision",
        "higher",
        to_itself=True,
    ),
    Measure(
        "ssim",
        "SSIM",
        "SSIM, the structural closeness to full precision",
        "higher",
        to_itself=True,
        itself=1.0,
        tolerance=1e-6,
    ),
    Measure("seconds_per_image", "s/image", "the seconds per image", "lower"),
    Measure(
        "seconds_per_step",
        "s/image and step",
        "the extra seconds per image and step",
        "lower",
        only_difference=True,
    ),
)
# Measured where they were asked for, and shown in a table of their own.
FURTHER: tuple[Measure, ...] = (
    Measure(
        "spatial_frechet_full_precision",
        "spatial FD to full precision",
        "the Fréchet distance of activations that keep their place (as sFID), to full precision",
        "lower",
    ),
    Measure(
        "spatial_frechet_reference",
        "spatial FD to held-out",
        "the same to held-out real pictures",
        "lower",
    ),
    Measure(
        "kernel_full_precision",
        "kernel distance to full precision",
        "the kernel distance (KID) to the full-precision pictures",
        "lower",
    ),
    Measure(
        "kernel_reference",
        "kernel distance to held-out",
        "the kernel distance (KID) to held-out real pictures",
        "lower",
    ),
    Measure(
        "cmmd_full_precision",
        "CMMD to full precision",
        "CMMD, a kernel distance of CLIP's embeddings, to the full-precision pictures",
        "lower",
    ),
    Measure("cmmd_reference", "CMMD to held-out", "the same to held-out real pictures", "lower"),
    Measure(
        "inception_score",
        "class score",
        "the inception score with the evaluator's own classes",
        "higher",
    ),
    Measure(
        "precision",
        "precision",
        "the share of pictures within the manifold of real ones",
        "higher",
    ),
    Measure("recall", "recall", "the share of real pictures within their manifold", "higher"),
    Measure(
        "perceptual",
        "perceptual distance",
        "the distance to full precision in a network's activations (as LPIPS, unweighted)",
        "lower",
    ),
    Measure(
        "prompt_score",
        "prompt score",
        "how well pictures fit their prompts, by the evaluator (CLIP score)",
        "higher",
    ),
    Measure(
        "image_reward",
        "ImageReward",
        "how much people would like the pictures for their prompts, by ImageReward",
        "higher",
    ),
    *(
        Measure(name, f"shift of {name}", f"how far the mean {name} has moved", "lower")
        for name in STATISTICS
    ),
)
COLUMNS = tuple(m for m in MEASURES if not m.only_difference)


def finite_or_none(estimate: Mapping[str, Any] | None, field: str) -> float | None:
    """One number of an estimate; None where it is not available.

    Raises:
        EvenkeelError: the number is NaN, infinite, or no number.

    >>> finite_or_none({"value": 2.5}, "value")
    2.5

    """
    found = None if estimate is None else estimate.get(field)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise EvenkeelError(
            f"an estimate holds {field} = {found!r}; expected a finite number, or None where there "
            f"is none. Write estimates with Estimate.as_dict()."
        )
    return float(found)


def verdict(measure: Measure, difference: Mapping[str, Any]) -> Verdict:
    """In words, what a 95 % interval of (arm minus quantized) shows.

    A direction only where the interval excludes zero; touching zero does not.

    Args:
        measure: says which way is better.
        difference: ``{"value", "stderr", "low", "high", "n"}``.

    Raises:
        EvenkeelError: a bound is not finite, or the bounds are the wrong way round.

    >>> verdict(MEASURES[0], {"low": -3.0, "high": -1.0})
    'better'
    >>> verdict(MEASURES[0], {"low": -3.0, "high": 1.0})
    'no difference shown'

    """
    low, high = finite_or_none(difference, "low"), finite_or_none(difference, "high")
    if low is None or high is None:
        return "not known"
    if low > high:
        raise EvenkeelError(
            f"the interval of {measure.key} runs from {low} to {high}; expected low <= high."
        )
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (high < 0) == (measure.better == "lower") else "worse"


def value_text(estimate: Mapping[str, Any] | None) -> str:
    """``value ± stderr`` with two significant digits of the standard error.

    >>> value_text({"value": 12.3456, "stderr": 0.1234, "low": 12.1, "high": 12.6, "n": 50})
    '12.35 ± 0.12'
    >>> value_text({"value": 12.3456, "stderr": None})
    '12.3'
    >>> value_text(None)
    '-'
    """
    value, stderr = finite_or_none(estimate, "value"), finite_or_none(estimate, "stderr")
    if value is None:
        return ABSENT
    if not stderr:
        plain = f"{value:.{_decimals(value, 3)}f}"
        return plain if stderr is None else f"{plain} ± 0"
    digits = _decimals(stderr, 2)
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def arm_text(arm: Mapping[str, Any], measure: Measure) -> str:
    """One cell: ``identical`` where the full-precision arm is compared with itself."""
    estimate = arm.get(measure.key)
    if arm["name"] == FULL_PRECISION and measure.to_itself:
        value = finite_or_none(estimate, "value")
        # A number that is not the identity's (other seeds, say) is shown, not hidden.
        if value is None or (
            measure.itself is not None and abs(value - measure.itself) <= measure.tolerance
        ):
            return "identical"
    return value_text(estimate)


def difference_text(difference: Mapping[str, Any]) -> tuple[str, str]:
    """The signed difference, and its interval in as many digits.

    >>> difference_text({"value": -1.234, "stderr": 0.1, "low": -1.43, "high": -1.03, "n": 50})
    ('-1.23', '-1.43 to -1.03')
    """
    value, stderr, low, high = (
        finite_or_none(difference, field) for field in ("value", "stderr", "low", "high")
    )
    digits = _decimals(stderr, 2) if stderr else _decimals(value or 1.0, 3)
    # A bound that is not zero must not be written as zero: the verdict hangs on it.
    digits = max([digits, *(_decimals(bound, 1) for bound in (low, high) if bound)])
    signed = ABSENT if value is None else _signed(value, digits)
    if low is None or high is None:
        return signed, ABSENT
    return signed, f"{_signed(low, digits)} to {_signed(high, digits)}"


def _signed(x: float, digits: int) -> str:
    text = f"{x:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def _decimals(x: float, significant: int) -> int:
    """Decimals that show so many significant digits of x; none are needed for large x or for 0."""
    return 0 if x == 0 else max(0, significant - 1 - math.floor(math.log10(abs(x))))
