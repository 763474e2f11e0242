"""What will help here, from a record alone: the nearest cells of a matrix of measured ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from evenkeel.errors import EvenkeelError
from evenkeel.metrics.state_scores import input_bias_gain
from evenkeel.record import Record

MATRIX = Path(__file__).resolve().parent / "matrix.json"
# What a record says of a case, and by how much two cases must differ to be unlike. Of the matrix's cells
# narrower ones predict worse than a plain mean, and ones half as wide again as well.
FEATURES = {
    "relative error": 1.4,  # natural logarithm of E|D|^2 / E|e|^2
    "correlation": 0.6,  # of the error between neighbouring steps
    "common": 0.4,  # share of the error that is the same in all prompts, by channel
    "steps": 1.4,  # natural logarithm
}
INPUT_BIAS = "tac-ibc"
SURE = 0.75  # a recommendation that harms more often than one time in four is none
PRIOR = 1.0  # dB: scatter of a gain between cells, as long as there are few


def features_of(record: Record) -> dict[str, float]:
    """What ``FEATURES`` names, of a record.

    The share that is common is |mean over prompts and places of D|^2 over E|D|^2, by channel; a step
    counts as much as its error.
    """
    pooled = record.moments.pooled(0)
    mean = pooled.mean_d
    square = pooled.s(0, 2) / pooled.count + mean.square()
    target = pooled.s(2, 0) / pooled.count + pooled.mean_e.square()
    lag = record.step_correlation().diagonal(1)
    return {
        "relative error": math.log(float(square.sum() / target.sum())),
        "correlation": float(lag.mean()) if len(lag) else 0.0,
        "common": float(mean.square().sum() / square.sum()),
        "steps": math.log(len(mean)),
    }


@dataclass(frozen=True)
class Case:
    """A measured cell.

    Attributes:
        twin, quantizer: what it was.
        features: of its record.
        gains: by correction, change of PSNR against quantized in dB, and its standard error.
        input_bias: what the marginal check predicted of `INPUT_BIAS`, dB.

    """

    twin: str
    quantizer: str
    features: Mapping[str, float]
    gains: Mapping[str, tuple[float, float]]
    input_bias: float | None = None


@dataclass(frozen=True)
class Expected:
    """What a correction is expected to do.

    Attributes:
        name: of the correction.
        gain: change of PSNR to full precision, dB.
        low, high: 95 % interval of what another pipeline like these will see, not of the mean.
        cells: how many measured ones the interval rests on, those near another twin's counted in full.

    """

    name: str
    gain: float
    low: float
    high: float
    cells: float

    @property
    def sure(self) -> float:
        """Probability that it helps at all, by the same distribution."""
        half = (self.high - self.low) / 2
        spread = half / float(stats.t.ppf(0.975, self.cells + 1))
        return float(stats.t.cdf(self.gain / spread, self.cells + 1))


@cache
def matrix() -> tuple[Case, ...]:
    """The cells that were measured; made by ``experiments/matrix.py``."""
    found = json.loads(MATRIX.read_text(encoding="utf-8"))
    return tuple(
        Case(
            c["twin"],
            c["quantizer"],
            c["features"],
            {k: (v[0], v[1]) for k, v in c["gains"].items()},
            c["input_bias"],
        )
        for c in found
    )


def expected(
    features: Mapping[str, float], cases: Sequence[Case], input_bias: float | None = None
) -> list[Expected]:
    """By correction, best first: the mean gain of the cases, weighted by their likeness.

    A case weighs exp(-d^2 / 2), d the distance in ``FEATURES``, each in its own unit; so cases far away say
    nothing. The interval is that of one new case: how far the gains lie from what the same rule says of
    them from the other twins' cases, with ``PRIOR`` as one case's worth of evidence, and the error of the
    mean. The nearer the features are to a case, the more those count that were near one, too.
    ``input_bias``, in dB, is what the marginal check predicts (`input_bias_gain`) of the correction
    ``INPUT_BIAS``: its mean then, with the distance of all cases from their own predictions.

    Raises:
        EvenkeelError: no cases.

    >>> far, near = ({"relative error": x, "correlation": 0, "common": 0, "steps": 3} for x in (-14.0, -4.0))
    >>> cases = [Case("a", "w4", near, {"cnc": (1.0, 0.1)}), Case("b", "w4", far, {"cnc": (-1.0, 0.1)})]
    >>> round(expected(near, cases)[0].gain, 3)
    1.0

    """
    if not cases:
        raise EvenkeelError("there are no measured cells to compare with.")
    found = []
    for name in sorted({name for case in cases for name in case.gains}):
        having = [c for c in cases if name in c.gains]
        if name == INPUT_BIAS and input_bias is not None:
            said = _Prediction(input_bias, 1.0, math.inf)
            told = [(c.gains[name][0], c.input_bias) for c in having if c.input_bias is not None]
            off = [(1.0, gain - predicted) for gain, predicted in told]
        else:
            said, off = _prediction(name, features, having), []
            for case in having:
                if others := [o for o in having if o.twin != case.twin]:
                    again = _prediction(name, case.features, others)
                    off.append((again.near, case.gains[name][0] - again.gain))
        found.append(_expected(name, said, off))
    return sorted(found, key=lambda e: -e.gain)


class _Prediction(NamedTuple):
    """A mean gain, the likeness of the nearest case, and how many cases it is of."""

    gain: float
    near: float
    cases: float


def _prediction(name: str, features: Mapping[str, float], cases: Sequence[Case]) -> _Prediction:
    weights = [_likeness(features, case.features) for case in cases]
    total = sum(weights)
    gain = sum(w * c.gains[name][0] for w, c in zip(weights, cases, strict=True)) / total
    return _Prediction(gain, max(weights), total**2 / sum(w * w for w in weights))


def _expected(name: str, said: _Prediction, off: Sequence[tuple[float, float]]) -> Expected:
    """``off``: how near earlier predictions were to a case, and what they were off by."""
    near, anywhere = (
        (sum(w * x * x for w, x in some) + PRIOR**2) / (sum(w for w, _ in some) + 1)
        for some in (off, [(1.0, x) for _, x in off])
    )
    variance = (said.near * near + (1 - said.near) * anywhere) * (1 + 1 / said.cases)
    cells = sum(w for w, _ in off)
    half = float(stats.t.ppf(0.975, cells + 1)) * math.sqrt(variance)
    return Expected(name, said.gain, said.gain - half, said.gain + half, cells)


def _likeness(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    squares = ((a[name] - b[name]) / unit for name, unit in FEATURES.items())
    return math.exp(-sum(x**2 for x in squares) / 2) + 1e-12


def recommended(found: Sequence[Expected], allowed: Sequence[str] | None = None) -> Expected | None:
    """Of what is ``SURE`` to help the one that gains most; None where nothing is.

    Args:
        found: what `expected` says, best first.
        allowed: names to choose from; None, of all.

    """
    able = (e for e in found if allowed is None or e.name in allowed)
    return next((e for e in able if e.gain > 0 and e.sure > SURE), None)


@dataclass(frozen=True)
class HitRate:
    """How a rule did on cells of twins that it had not seen.

    Attributes:
        rule: its name.
        cells: how many.
        hits: in how many its choice was best, or within 0.1 dB of it.
        gain: mean change of PSNR of its choices, dB.
        worst: the lowest of them.

    """

    rule: str
    cells: int
    hits: int
    gain: float
    worst: float


def hit_rates(cases: Sequence[Case], allowed: Sequence[str]) -> list[HitRate]:
    """Of the recommendation with the case's twin left out, of every single correction, and of nothing.

    Only cases that measured one of the ``allowed`` are counted, and for a single correction only those
    that measured it.
    """
    cases = [c for c in cases if any(name in c.gains for name in allowed)]

    def chosen(case: Case) -> float:
        others = [c for c in cases if c.twin != case.twin]
        measured = [name for name in allowed if name in case.gains]
        found = expected(case.features, others, case.input_bias) if others else []
        choice = recommended(found, measured)
        return 0.0 if choice is None else case.gains[choice.name][0]

    found = [
        _rate("recommended", cases, [chosen(c) for c in cases], allowed),
        _rate("always nothing", cases, [0.0 for _ in cases], allowed),
    ]
    for name in allowed:
        if having := [c for c in cases if name in c.gains]:
            gains = [c.gains[name][0] for c in having]
            found.append(_rate(f"always {name}", having, gains, allowed))
    return found


def _rate(
    rule: str, cases: Sequence[Case], got: Sequence[float], allowed: Sequence[str]
) -> HitRate:
    best = [max(0.0, *(c.gains[n][0] for n in allowed if n in c.gains)) for c in cases]
    hits = sum(g > b - 0.1 for g, b in zip(got, best, strict=True))
    return HitRate(rule, len(cases), hits, sum(got) / len(got), min(got))


def advice(record: Record, shared: float | None = None) -> dict[str, Any]:
    """For JSON: the record's features, the nearest cells, and every correction with what to expect.

    ``shared`` is the share of the final state error that all prompts have in common, of the marginal check.

    Raises:
        EvenkeelError: ``shared`` is no such share.

    """
    if shared is not None and not -1 < shared < 1:
        raise EvenkeelError(
            f"expected a share below 1, as the check of evenkeel calibrate prints it, got {shared:g}."
        )
    features, cases = features_of(record), matrix()
    input_bias = None if shared is None else input_bias_gain(shared, record.prompts)
    found = expected(features, cases, input_bias)
    choice = recommended(found)
    near = sorted(cases, key=lambda c: -_likeness(features, c.features))[:3]
    return {
        "features": features,
        "nearest": [f"{c.twin} {c.quantizer}" for c in near],
        "recommended": choice and choice.name,
        "expected": [
            {
                "correction": e.name,
                "gain": e.gain,
                "low": e.low,
                "high": e.high,
                "sure": e.sure,
                "cells": e.cells,
            }
            for e in found
        ],
    }


def advice_text(found: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    lines = [
        "expected change of PSNR to full precision, from cells like this one "
        f"(nearest: {', '.join(found['nearest'])}); twins of a few million parameters, so a guess elsewhere",
        "",
        f"{'correction':<22}  {'dB':>6}  {'95 % of pipelines':>17}  helps",
    ]
    for row in found["expected"]:
        between = f"{row['low']:+.2f} to {row['high']:+.2f}"
        lines.append(
            f"{row['correction']:<22}  {row['gain']:+6.2f}  {between:>17}  {100 * row['sure']:.0f} %"
        )
    choice = found["recommended"]
    lines += [
        "",
        f"recommended: {choice}, the one that gains most of those that help in three cases of four"
        if choice
        else "recommended: nothing; no correction is sure enough to help here",
    ]
    return "\n".join(lines)
