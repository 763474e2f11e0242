"""What a record is told to expect: features computed by hand, and cells that are near count."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from synthetic_record import merged, part

from evenkeel.errors import EvenkeelError
from evenkeel.reproduction.recommend import (
    FEATURES,
    SURE,
    Case,
    Expected,
    advice,
    advice_text,
    expected,
    features_of,
    hit_rates,
    matrix,
    recommended,
)


def case(twin: str, correlation: float, **gains: float) -> Case:
    features = {"relative error": -4.0, "correlation": correlation, "common": 0.1, "steps": 3.0}
    return Case(twin, "w4a8", features, {name: (gain, 0.05) for name, gain in gains.items()})


def test_features_are_those_of_the_outputs() -> None:
    record = merged([part(i) for i in range(5)])
    found = features_of(record)
    assert set(found) == set(FEATURES)
    m = record.moments
    count = m.count.double()
    square = (m.s(0, 2) + count * m.mean_d**2).sum((0, 2)) / count.sum((0, 2))
    output = (m.s(2, 0) + count * m.mean_e**2).sum((0, 2)) / count.sum((0, 2))
    ratio = float(square.sum() / output.sum())
    assert found["relative error"] == pytest.approx(math.log(ratio), rel=1e-6)
    assert found["steps"] == pytest.approx(math.log(m.count.shape[1])) and 0 <= found["common"] <= 1
    lag = torch.diagonal(record.step_correlation(), 1).mean()
    assert found["correlation"] == pytest.approx(float(lag))


def test_near_cells_count_and_far_ones_do_not() -> None:
    cases = [
        case("a", 0.9, drift=-0.5, readout=0.8),
        case("b", 0.9, drift=-0.3, readout=1.0),
        case("c", -3.0, drift=2.0, readout=0.1),
    ]
    near = {e.name: e for e in expected(cases[0].features, cases)}
    assert near["drift"].gain == pytest.approx(-0.4, abs=0.01) and near["drift"].sure < 0.5
    assert near["readout"].gain == pytest.approx(0.9, abs=0.01) and near["readout"].sure > 0.5
    far = {e.name: e for e in expected(cases[2].features, cases)}
    assert far["drift"].gain == pytest.approx(2.0, abs=0.01)
    assert far["drift"].high - far["drift"].low > near["drift"].high - near["drift"].low
    with pytest.raises(EvenkeelError, match="no measured cells"):
        expected(cases[0].features, [])


def test_more_like_cells_make_it_surer() -> None:
    few = [case(f"t{i}", 0.9, readout=0.5 + 0.1 * (i % 2)) for i in range(3)]
    many = [case(f"t{i}", 0.9, readout=0.5 + 0.1 * (i % 2)) for i in range(30)]
    a, b = (expected(few[0].features, cases)[0] for cases in (few, many))
    assert b.high - b.low < 0.5 * (a.high - a.low) and b.sure > a.sure


def test_the_hit_rate_leaves_the_twin_out() -> None:
    cases = [
        case("a", 0.0, drift=10.0, readout=0.2),
        case("b", 0.0, drift=11.0, readout=0.2),
        case("c", 2.0, drift=-10.0, readout=8.0),
        case("d", 2.0, drift=-12.0, readout=9.0),
    ]
    found = {r.rule: r for r in hit_rates(cases, ("drift", "readout"))}
    assert found["recommended"].hits == 4
    assert found["recommended"].gain == pytest.approx((10 + 11 + 8 + 9) / 4)
    assert found["always nothing"].hits == 0 and found["always drift"].worst == -12.0
    alone = {r.rule: r for r in hit_rates(cases[:1], ("drift", "readout"))}
    assert alone["recommended"].gain == 0.0  # nothing of its own twin is used
    partly = [*cases[:2], replace(cases[2], gains={"readout": (8.0, 0.05)}), cases[3]]
    counted = {r.rule: r.cells for r in hit_rates(partly, ("drift", "readout", "unmeasured"))}
    assert counted == {
        "recommended": 4,
        "always nothing": 4,
        "always drift": 3,
        "always readout": 4,
    }
    small = [case("a", 0.0, drift=0.1), case("b", 0.0, drift=0.1)]
    assert hit_rates(small, ("drift",))[0].gain == 0.0  # likely, but not sure


def test_advice_on_a_record_names_cells_and_is_a_text() -> None:
    assert matrix() and all(c.gains and set(c.features) == set(FEATURES) for c in matrix())
    found = advice(merged([part(i) for i in range(5)]))
    names = [row["correction"] for row in found["expected"]]
    assert names and found["nearest"] and all(0 <= r["sure"] <= 1 for r in found["expected"])
    assert all(name in advice_text(found) for name in names)
    assert f"recommended: {found['recommended'] or 'nothing'}" in advice_text(found)


def test_recommended_is_the_first_that_is_sure() -> None:
    wild = [Expected("wild", 2.0, -8.0, 12.0, 9), Expected("calm", 1.0, 0.5, 1.5, 9)]
    choice = recommended([*wild, Expected("harm", -1.0, -1.1, -0.9, 9)])
    assert choice is not None and choice.name == "calm" and wild[0].sure < SURE < wild[1].sure
    assert recommended(wild, ["wild"]) is None and recommended([]) is None


def test_what_the_check_says_of_the_input_bias_stands_above_the_cells() -> None:
    def seen(twin: str, predicted: float | None, gain: float) -> Case:
        return replace(case(twin, 0.9), gains={"tac-ibc": (gain, 0.1)}, input_bias=predicted)

    cases = [seen("a", 0.4, 0.5), seen("b", 3.0, 2.8), seen("c", -0.1, -0.2), seen("d", None, -5.0)]
    (without,), (told,) = (expected(cases[0].features, cases, p) for p in (None, 2.0))
    assert told.gain == 2.0 and without.gain == pytest.approx((0.5 + 2.8 - 0.2 - 5.0) / 4, abs=0.01)
    assert told.high - told.low < without.high - without.low and told.sure > 0.9 > without.sure
    (nothing,) = expected(cases[3].features, cases[3:], 2.0)  # no case had a prediction
    assert nothing.cells == 0 and nothing.high - nothing.gain > 12
    record = merged([part(i) for i in range(5)])
    found = {r["correction"]: r["gain"] for r in advice(record, 0.3)["expected"]}
    assert found["tac-ibc"] == pytest.approx(-10 * math.log10(0.7 * (1 + 1 / record.prompts)))
    with pytest.raises(EvenkeelError, match="got 12"):
        advice(record, 12.0)
