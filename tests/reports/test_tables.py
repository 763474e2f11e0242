"""Tables and words"""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_inputs import (
    BY_KEY,
    NOTHING,
    estimate,
)

import evenkeel.reports as reports
from evenkeel.errors import EvenkeelError
from evenkeel.reports.measures import COLUMNS, difference_text, value_text, verdict

LOWER = ["frechet_full_precision", "frechet_reference", "seconds_per_image", "seconds_per_step"]
HIGHER = ["alignment", "psnr", "ssim"]


def rows_of(text):
    """Cells of a text table: columns are at least two spaces apart."""
    return [re.split(r" {2,}", line) for line in text.splitlines()]


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [reports.text_table, reports.markdown_table])
def test_every_arm_and_column_is_in_the_table(table, results):
    text = table(results)
    for word in ("full-precision", "quantized", "q-drift", *(m.heading for m in COLUMNS)):
        assert word in text


def test_row_of_each_kind_of_cell(results):
    rows = {row[0]: row[1:] for row in reversed(rows_of(reports.text_table(results)))}
    same = "identical"
    assert rows["full-precision"] == [same, "7.50 ± 0.10", "0.90 ± 0.10", same, same, "-"]
    assert rows["quantized"] == ["10.00 ± 0.10"] * 6


def test_identical_is_said_of_the_full_precision_arm_alone(results):
    results["arms"][1]["psnr"] = NOTHING
    results["arms"][0]["ssim"] = estimate(0.95, 0.01)  # other seeds: not identical, so not said
    rows = {row[0]: row[1:] for row in reversed(rows_of(reports.text_table(results)))}
    assert rows["quantized"][3] == "-"
    assert rows["full-precision"][4] == "0.950 ± 0.010"


@pytest.mark.parametrize("missing", [None, NOTHING])
@pytest.mark.parametrize("key", sorted(m.key for m in COLUMNS))
def test_none_is_a_dash(results, key, missing):
    column = 1 + [m.key for m in COLUMNS].index(key)
    results["arms"][1][key] = missing
    row = next(r for r in rows_of(reports.text_table(results)) if r[0] == "quantized")
    assert [i for i, cell in enumerate(row) if cell == "-"] == [column]


def test_columns_line_up(results):
    lines = reports.text_table(results).splitlines()[:5]
    assert len({len(line) for line in lines}) == 1


def test_differences_have_one_row_per_measure_given(results):
    rows = [row for row in rows_of(reports.text_table(results)) if row[0] == "q-drift"][1:]
    assert [(row[1], row[2], row[5]) for row in rows] == [
        ("FD to full precision", "-1.00", "better"),
        ("FD to held-out", "+0.10", "no difference shown"),
        ("PSNR", "-1.00", "worse"),
    ]
    assert rows[0][3:5] == ["-1.20 to -0.80", "50"]


def test_a_corrected_arm_without_differences_is_named_as_such(results):
    del results["arms"][2]["difference_to_quantized"]
    assert "not compared" in reports.text_table(results)
    assert reports.summary(results) == ["q-drift was not compared with the quantized model."]


def test_without_corrected_arms_there_are_no_differences(results):
    results["arms"] = results["arms"][:2]
    assert "Paired" not in reports.text_table(results)
    assert "No corrected arm" in reports.summary(results)[0]


def test_markdown_cells_cannot_break_the_table(results):
    results["arms"][2]["name"] = "a|b\nc"
    lines = [x for x in reports.markdown_table(results).splitlines() if x.startswith("|")]
    assert any("a\\|b c" in line for line in lines)
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert bars == [8] * 5 + [7] * 5


@pytest.mark.parametrize(
    "arms", [[], [{"psnr": NOTHING}], [{"name": "a"}, {"name": "a"}]], ids=["none", "name", "twice"]
)
def test_arms_without_names_of_their_own_are_refused(arms):
    with pytest.raises(EvenkeelError, match="name"):
        reports.text_table({"arms": arms})


@pytest.mark.parametrize("bad", [math.nan, math.inf, "3", True])
def test_a_number_that_is_none_is_refused(results, bad):
    results["arms"][1]["psnr"] = {**estimate(3.0), "value": bad}
    with pytest.raises(EvenkeelError, match="finite number"):
        reports.text_table(results)


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "lower_word", "higher_word"),
    [
        (-2.0, -1.0, "better", "worse"),
        (1.0, 2.0, "worse", "better"),
        (-1.0, 1.0, "no difference shown", "no difference shown"),
        (-1.0, 0.0, "no difference shown", "no difference shown"),
        (0.0, 1.0, "no difference shown", "no difference shown"),
        (-1.0, -1e-12, "better", "worse"),
        (1e-12, 1.0, "worse", "better"),
        (None, 1.0, "not known", "not known"),
        (-1.0, None, "not known", "not known"),
    ],
)
def test_verdict_flips_where_the_interval_excludes_zero(low, high, lower_word, higher_word):
    difference = {"low": low, "high": high}
    assert {verdict(BY_KEY[key], difference) for key in LOWER} == {lower_word}
    assert {verdict(BY_KEY[key], difference) for key in HIGHER} == {higher_word}


def test_every_measure_has_a_direction_that_is_tested():
    assert sorted(BY_KEY) == sorted(LOWER + HIGHER)


def test_an_interval_the_wrong_way_round_is_refused():
    with pytest.raises(EvenkeelError, match="low <= high"):
        verdict(BY_KEY["psnr"], {"low": 1.0, "high": -1.0})


NUMBERS = st.floats(-1e4, 1e4).filter(lambda x: x == 0 or abs(x) > 1e-6)


@settings(derandomize=True, deadline=None)
@given(value=NUMBERS, stderr=st.floats(1e-6, 1e3))
def test_what_is_written_is_within_a_twentieth_of_a_standard_error(value, stderr):
    shown, error = map(float, value_text({"value": value, "stderr": stderr}).split(" ± "))
    # Whole numbers are the coarsest: at a standard error of 10 or more they are still a 20th of it.
    assert abs(shown - value) <= 0.0501 * stderr
    assert abs(error - stderr) <= 0.0501 * stderr


@settings(derandomize=True, deadline=None)
@given(bounds=st.tuples(NUMBERS, NUMBERS).map(sorted), key=st.sampled_from(sorted(BY_KEY)))
def test_verdict_can_be_checked_from_the_printed_interval(bounds, key):
    low, high = bounds
    value, width = (low + high) / 2, (high - low) / 4
    difference = {"value": value, "stderr": width, "low": low, "high": high, "n": 9}
    shown = [float(x) for x in difference_text(difference)[1].split(" to ")]
    printed = {"low": shown[0], "high": shown[1]}
    assert verdict(BY_KEY[key], printed) == verdict(BY_KEY[key], difference)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (estimate(0.5, 0.0), "0.500 ± 0"),
        ({"value": 1234.5, "stderr": 321.0}, "1234 ± 321"),
        ({"value": 0.0, "stderr": None}, "0"),
        ({"value": 3e-5, "stderr": 2.1e-6}, "0.0000300 ± 0.0000021"),
    ],
)
def test_digits(found, text):
    assert value_text(found) == text


def test_summary_calls_a_change_only_what_an_interval_shows(results):
    (sentence,) = reports.summary(results)
    better, worse, same = sentence.split("; ")
    assert "full-precision pictures (-1.00" in better
    assert "better: the interval excludes zero" in better
    assert "PSNR" in worse
    assert "worse: the interval excludes zero" in worse
    assert "no difference in the Fréchet distance to held-out" in same
    assert "includes zero" in same
