"""What the check before generation says, as text for the terminal."""

from __future__ import annotations

import math
import textwrap

from evenkeel.comparing.marginal_check import ArmCheck, MarginalCheck
from evenkeel.estimate import Estimate
from evenkeel.metrics.state_scores import input_bias_gain

ABSENT = "-"
HEADINGS = (
    "correction",
    "verdict",
    "confidence",
    "squared error",
    "shared error",
    "marginal",
    "ms/step",
)
LEGEND = (
    "Squared error: change of the final latents' squared error to full precision against the "
    "quantized arm, 95 % interval. Shared error: change of the part that is the same for every "
    "prompt, in percent of the quantized arm's squared error. Marginal: change of the Fréchet distance "
    "between the latents' channel means and spreads. ms/step: extra time per prompt. Best first by squared "
    "error; neutral with low confidence means: not to be told from so few prompts."
)


def check_text(check: MarginalCheck) -> str:
    """One line per correction, then the corrections that do not apply, with the reasons.

    >>> check_text(MarginalCheck(32, 20, None, None, [], {"q-drift": "no step has noise"})).splitlines()[-1]
    '- q-drift: no step has noise'
    """
    lines = [
        f"Prediction from {check.prompts} prompts, {check.num_inference_steps} steps, every arm from "
        f"the same noise",
        "",
    ]
    if check.shared is not None:
        gain = input_bias_gain(check.shared.value)
        lines[1:1] = [
            f"Of the quantized arm's squared error {_plain(check.shared)} is the same for every prompt: an "
            f"input bias (tac-ibc) can take {gain:.2f} dB, less what its own mean "
            f"is off (evenkeel recommend RECORD --shared {check.shared.value:.3g})"
        ]
    if check.arms:
        rows = [HEADINGS, *(_row(arm) for arm in check.ranked())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [_line(rows[0], widths), "  ".join("-" * w for w in widths)]
        lines += [_line(row, widths) for row in rows[1:]]
        best = [arm.name for arm in check.ranked("marginal")[:3]]
        lines += ["", f"By the marginal: {', '.join(best)}.", "", *textwrap.wrap(LEGEND, 100)]
    else:
        lines.append("No correction could be checked.")
    if check.not_applicable:
        reasons = check.not_applicable.items()
        lines += ["", "Not applicable here:", *(f"- {name}: {why}" for name, why in reasons)]
    return "\n".join(lines)


def _row(arm: ArmCheck) -> tuple[str, ...]:
    return (
        arm.name,
        arm.verdict,
        # Never 100 %: the interval is itself an estimate.
        f"{min(arm.confidence, 0.999):.1%}",
        _interval(_ratio(arm.scores["squared_error"])),
        _interval(arm.scores["systematic"]),
        _interval(arm.scores["marginal"]),
        ABSENT if arm.extra_seconds is None else f"{1000 * arm.extra_seconds.value:+.1f}",
    )


def _ratio(log_ratio: Estimate) -> Estimate:
    """From the logarithm of a ratio to the relative change."""
    e = log_ratio
    value, low, high = (_change(x) for x in (e.value, e.low, e.high))
    return Estimate(value, math.nan, low, high, e.n)


def _change(log_ratio: float) -> float:
    return math.expm1(log_ratio) if log_ratio < 100 else math.inf


def _interval(e: Estimate) -> str:
    return f"{e.value:+.1%} [{e.low:+.1%}, {e.high:+.1%}]"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    left = 2
    cells = [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _plain(e: Estimate) -> str:
    return f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"
