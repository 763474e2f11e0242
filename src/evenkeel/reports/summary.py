"""The outcome in sentences: what a correction changed, and what it did not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evenkeel.reports.measures import MEASURES, Verdict, difference_text, verdict
from evenkeel.reports.table import corrected_arms


def summary(results: Mapping[str, Any]) -> list[str]:
    """One sentence per corrected arm; only what an interval shows is called a change.

    Args:
        results: as for :func:`evenkeel.reports.text_table`.

    Raises:
        EvenkeelError: no arms, or a number that is not finite (None is how to say so).

    >>> change = {"value": -2.0, "stderr": 0.5, "low": -3.0, "high": -1.0, "n": 100}
    >>> arm = {"name": "q-drift", "difference_to_quantized": {"frechet_reference": change}}
    >>> print(summary({"arms": [arm]})[0])  # doctest: +ELLIPSIS
    Compared with the quantized model without correction, q-drift made the Fréchet distance to ...

    """
    arms = corrected_arms(results)
    if not arms:
        return ["No corrected arm was compared, so nothing is said about a correction."]
    return [_sentence(arm) for arm in arms]


def in_short(results: Mapping[str, Any]) -> list[str]:
    """Two sentences per corrected arm: what changed, and in what no difference was shown.

    Args:
        results: as for :func:`evenkeel.reports.text_table`.

    Raises:
        EvenkeelError: no arms, or a number that is not finite (None is how to say so).

    >>> change = {"value": -2.0, "stderr": 0.5, "low": -3.0, "high": -1.0, "n": 100}
    >>> arm = {"name": "q-drift", "difference_to_quantized": {"frechet_reference": change}}
    >>> in_short({"arms": [arm]})
    ['q-drift is better than the quantized arm in FD to held-out, and worse in nothing.']

    """
    arms = corrected_arms(results)
    return [_short(arm) for arm in arms] or summary(results)


def _short(arm: Mapping[str, Any]) -> str:
    differences = arm.get("difference_to_quantized") or {}
    if not differences:
        return _sentence(arm)
    found: dict[Verdict, list[str]] = {}
    for measure in MEASURES:
        if measure.key in differences:
            word = verdict(measure, differences[measure.key])
            found.setdefault(word, []).append(measure.heading)
    better, worse = (_joined(found.get(w, ["nothing"])) for w in ("better", "worse"))
    text = f"{arm['name']} is better than the quantized arm in {better}, and worse in {worse}."
    rest = found.get("no difference shown", []) + found.get("not known", [])
    return f"{text} In {_joined(rest)} no difference was shown." if rest else text


def _sentence(arm: Mapping[str, Any]) -> str:
    name, differences = arm["name"], arm.get("difference_to_quantized") or {}
    if not differences:
        return f"{name} was not compared with the quantized model."
    found: dict[Verdict, list[str]] = {}
    for measure in MEASURES:
        difference = differences.get(measure.key)
        if difference is None:
            continue
        value, interval = difference_text(difference)
        word = verdict(measure, difference)
        shown = word in ("better", "worse")
        numbers = f" ({value}, 95 % interval {interval})" if shown else f" ({interval})"
        found.setdefault(word, []).append(measure.words + (numbers if interval != "-" else ""))
    clauses = [
        f"made {_joined(found[word])} {word}: {_intervals(found[word])} zero"
        for word in ("better", "worse")
        if word in found
    ]
    if "no difference shown" in found:
        same = found["no difference shown"]
        clauses.append(f"showed no difference in {_joined(same)}: {_intervals(same, 'in')} zero")
    if "not known" in found:
        clauses.append(f"cannot be judged by {_joined(found['not known'])}: there is no interval")
    start = f"Compared with the quantized model without correction, {name} "
    return start + "; it ".join(clauses) + "."


def _intervals(phrases: list[str], start: str = "ex") -> str:
    return f"the interval {start}cludes" if len(phrases) == 1 else f"the intervals {start}clude"


def _joined(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]
