"""Reports say what the results say: no more, no less, and safely."""

from __future__ import annotations

import ast
import base64
import copy
import functools
import importlib
import io
import math
import os
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import evenkeel.reports as reports
from evenkeel.errors import EvenkeelError, MissingExtra
from evenkeel.reports.measures import COLUMNS, MEASURES, difference_text, value_text, verdict

BY_KEY = {measure.key: measure for measure in MEASURES}
LOWER = ["frechet_full_precision", "frechet_reference", "seconds_per_image", "seconds_per_step"]
HIGHER = ["alignment", "psnr", "ssim"]
VOID = {"meta", "img", "br", "hr", "link", "input"}
ATTACK = "<script>alert(1)</script> & \"quoted\" 'too'"
PLOTS = [
    reports.factor_plot,
    reports.variance_plot,
    reports.gain_slope_plot,
    reports.correlation_plot,
    reports.spectrum_plot,
]


def estimate(value, stderr=0.1, n=50):
    return {
        "value": value,
        "stderr": stderr,
        "low": value - 2 * stderr,
        "high": value + 2 * stderr,
        "n": n,
    }


NOTHING = {"value": None, "stderr": None, "low": None, "high": None, "n": 50}


def make_calibration(steps=5, channels=3):
    def row(k, scale, start=0.0):
        return [start + scale * (1 + c) * math.exp(-k / 3) for c in range(channels)]

    return {
        "prompts": 16,
        "quantizer": "w4a8",
        "steps": [
            {
                "step": k,
                "timestep": 999 - 100 * k,
                "noise_to_signal": None if k == 0 else 10.0 / k,
                "factor": row(k, 0.05, 1.0),
                "factor_low": row(k, 0.04, 1.0),
                "factor_high": row(k, 0.06, 1.0),
                "variance": row(k, 1e-3),
                "gain": row(k, -0.02),
                "slope": row(k, -0.03),
                "explanation": "left alone <here>" if k == steps - 1 else "",
            }
            for k in range(steps)
        ],
        "step_correlation": [[0.5 ** abs(i - j) for j in range(steps)] for i in range(steps)],
        "error_spectrum": [[math.exp(-b) * (k + 1) for b in range(8)] for k in range(steps)],
    }


def make_results():
    quantized = {key: estimate(10.0) for key in BY_KEY}
    return {
        "settings": {"pipeline": "toy <b>", "quantizer": "w4a8", "steps": 5, "note": ATTACK},
        "arms": [
            {
                "name": "full-precision",
                "frechet_full_precision": estimate(0.0, 0.0),
                "frechet_reference": estimate(7.5),
                "alignment": estimate(0.9),
                "psnr": NOTHING,
                "ssim": estimate(1.0, 0.0),
                "seconds_per_image": NOTHING,
            },
            {"name": "quantized", **quantized},
            {
                "name": "q-drift",
                **{key: estimate(9.0) for key in BY_KEY},
                "difference_to_quantized": {
                    "frechet_full_precision": estimate(-1.0),
                    "frechet_reference": estimate(0.1),
                    "psnr": estimate(-1.0),
                },
            },
        ],
        "calibration": make_calibration(),
    }


def make_images():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 8, 8), dtype=np.uint8)
    names = ("full-precision", "quantized", "q-drift")
    return dict(zip(names, torch.from_numpy(pixels), strict=True))


@pytest.fixture
def results():
    return make_results()


@pytest.fixture
def images():
    return make_images()


@functools.cache
def drawn(plot):
    return plot(make_calibration())


def pixels_of(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


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


# --- plots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "channels"), [(1, 1), (4, 16)])
@pytest.mark.parametrize("plot", PLOTS)
def test_plots_decode_and_show_something(plot, steps, channels):
    pixels = pixels_of(plot(make_calibration(steps, channels)))
    assert min(pixels.shape[:2]) > 300
    assert pixels.min() < 100
    assert (pixels == 255).all(-1).any()  # a white ground, for dark pages


@pytest.mark.parametrize(
    ("plot", "change"),
    [
        (reports.factor_plot, lambda c: c["steps"][2]["factor"].__setitem__(0, 1.2)),
        (reports.factor_plot, lambda c: c["steps"][2]["factor_high"].__setitem__(0, 1.2)),
        (reports.variance_plot, lambda c: c["steps"][2]["variance"].__setitem__(0, 1.0)),
        (reports.variance_plot, lambda c: c["steps"][2]["variance"].__setitem__(0, 0.0)),
        (reports.gain_slope_plot, lambda c: c["steps"][2]["gain"].__setitem__(0, 1.0)),
        (reports.gain_slope_plot, lambda c: c["steps"][2]["slope"].__setitem__(0, 1.0)),
        (reports.correlation_plot, lambda c: c["step_correlation"][0].__setitem__(4, -1.0)),
        (reports.spectrum_plot, lambda c: c["error_spectrum"][4].__setitem__(0, 9.0)),
    ],
)
def test_every_number_reaches_its_plot(plot, change):
    changed = make_calibration()
    change(changed)
    assert plot(changed) != drawn(plot)


@pytest.mark.parametrize("plot", PLOTS)
def test_equal_numbers_give_equal_bytes(plot):
    assert plot(make_calibration()) == drawn(plot)
    assert b"matplotlib" not in drawn(plot).lower()  # nor does its version get in


def test_a_variance_of_zero_is_told_from_one_that_is_not_known():
    zero, unknown = make_calibration(), make_calibration()
    zero["steps"][2]["variance"][0] = 0.0
    unknown["steps"][2]["variance"][0] = None
    assert reports.variance_plot(zero) != reports.variance_plot(unknown)  # both are gaps


@pytest.mark.filterwarnings("error")
def test_zero_variances_and_missing_bands_are_drawn_without_complaint():
    calibration = make_calibration()
    for step in calibration["steps"]:
        step.update(variance=[0.0] * 3, factor_low=None, factor_high=None)
    assert pixels_of(reports.variance_plot(calibration)).std() > 0
    assert reports.factor_plot(calibration) != drawn(reports.factor_plot)


@pytest.mark.parametrize(
    ("plot", "change", "word"),
    [
        (reports.factor_plot, {"steps": []}, "steps"),
        (reports.correlation_plot, {"step_correlation": [[1.0, 0.5]]}, "square"),
        (reports.spectrum_plot, {"error_spectrum": None}, "spectrum"),
    ],
)
def test_what_cannot_be_plotted_is_refused(plot, change, word):
    with pytest.raises(EvenkeelError, match=word):
        plot({**make_calibration(), **change})


def test_channels_that_come_and_go_are_refused():
    calibration = make_calibration()
    calibration["steps"][1]["gain"].pop()
    with pytest.raises(EvenkeelError, match="one number per channel"):
        reports.gain_slope_plot(calibration)


def test_pyplot_is_never_used_and_matplotlib_is_not_needed_to_import(monkeypatch, images):
    folder = Path(reports.__file__).parent
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    assert reports.factor_plot(make_calibration())
    assert reports.image_grid(images, ["a", "b"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for source in sorted(folder.glob("*.py")):
        assert runpy.run_path(str(source))
    with pytest.raises(ImportError):
        importlib.import_module("matplotlib")
    imports = [n for f in folder.glob("*.py") for n in ast.walk(ast.parse(f.read_text()))]
    names = [a.name for n in imports if isinstance(n, ast.Import) for a in n.names]
    assert "json" in names  # the walk sees imports
    assert not [name for name in names if "pyplot" in name]


def test_without_matplotlib_the_extra_is_named(monkeypatch, images):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (reports.factor_plot, reports.gain_slope_plot, reports.correlation_plot):
        with pytest.raises(MissingExtra, match=r"pip install 'evenkeel\[reports\]'"):
            plot(make_calibration())
    with pytest.raises(MissingExtra, match=r"pip install 'evenkeel\[reports\]'"):
        reports.image_grid(images, ["a", "b"])


# --- image grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 3, 5])
def test_grid_repeats_pixels_and_changes_none(scale):
    colours = [(12, 200, 34), (201, 13, 35), (14, 36, 202), (90, 91, 10)]
    tiles = torch.tensor(colours, dtype=torch.uint8).reshape(2, 2, 3, 1, 1).repeat(1, 1, 1, 7, 9)
    pixels = pixels_of(reports.image_grid({"a": tiles[0], "b": tiles[1]}, ["x", "y"], scale))
    for colour in colours:
        ys, xs = np.nonzero((pixels == colour).all(-1))
        assert len(ys) == 7 * 9 * scale**2
        assert (np.ptp(ys) + 1, np.ptp(xs) + 1) == (7 * scale, 9 * scale)


def test_grid_has_arms_as_columns_and_prompts_as_rows_the_right_way_up():
    def corner(k, j):
        picture = torch.full((3, 8, 8), 128, dtype=torch.uint8)
        picture[:, 0, 0] = torch.tensor([255, 40 * j, 40 * k])  # top left
        picture[:, 7, 7] = torch.tensor([1, 40 * j, 40 * k])  # bottom right
        return picture

    arms = {f"arm {j}": torch.stack([corner(k, j) for k in range(3)]) for j in range(2)}
    pixels = pixels_of(reports.image_grid(arms, ["a", "b", "c"], scale=2))

    def place(colour):
        return np.argwhere((pixels == colour).all(-1)).mean(0)

    # Red alone is also how text is never drawn: labels are black on white.
    for k in range(3):
        for j in range(2):
            top, bottom = place((255, 40 * j, 40 * k)), place((1, 40 * j, 40 * k))
            assert (bottom - top).tolist() == [14, 14]
    assert place((255, 0, 40))[0] > place((255, 0, 0))[0]  # second prompt below the first
    assert place((255, 40, 0))[1] > place((255, 0, 0))[1]  # second arm right of the first


@pytest.mark.filterwarnings("error")
def test_prompts_are_text_and_not_formulas(images):
    formula = reports.image_grid(images, ["$\\frac{$", "it costs $5 or $6"])
    assert formula != reports.image_grid(images, ["$\\frac{$", "it costs 5 or 6"])


def test_a_long_prompt_stays_in_its_row_and_left_of_the_pictures(images):
    white = {name: torch.full_like(x, 255) for name, x in images.items()}
    pixels = pixels_of(reports.image_grid(white, ["W" * 400, "m w " * 100], scale=12))
    plain = pixels_of(reports.image_grid(white, ["x", "x"], scale=12))
    assert pixels.shape == plain.shape
    columns = np.nonzero((pixels != plain).any((0, 2)))[0]
    assert columns.max() < pixels.shape[1] - 3 * 96  # three columns of pictures


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x: {}, "at least one arm"),
        (lambda x: {**x, "quantized": x["quantized"].float()}, "'quantized' are torch.float32"),
        (lambda x: {**x, "quantized": x["quantized"][:1]}, "quantized"),
        (lambda x: {**x, "quantized": x["quantized"][:, :1]}, "quantized"),
        (lambda x: {**x, "quantized": x["quantized"][..., :4]}, "quantized"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(images, change, word):
    with pytest.raises(EvenkeelError, match=word):
        reports.image_grid(change(images), ["a", "b"])


def test_scale_below_one_is_refused(images):
    with pytest.raises(EvenkeelError, match="scale"):
        reports.image_grid(images, ["a", "b"], scale=0)


# --- HTML -----------------------------------------------------------------------------------------


class Document(HTMLParser):
    """Tags must close in order; texts, attributes and tags are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def pictures(self):
        found = [v for k, v in self.attributes if k == "src"]
        assert all(v.startswith("data:image/png;base64,") for v in found)
        return [base64.b64decode(v.split(",", 1)[1], validate=True) for v in found]


@pytest.mark.parametrize("text", ["<p><b></p></b>", "<p>"])
def test_the_parser_used_here_notices_unbalanced_tags(text):
    with pytest.raises(AssertionError):
        Document(text)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("reports") / "new" / "report.html"
    reports.write_report(path, make_results(), make_images(), [ATTACK, "kite"])
    return Document(path.read_text(encoding="utf-8"))


def test_report_is_whole_and_loads_nothing(report):
    assert not {"script", "link", "iframe", "object", "base"} & set(report.tags)
    assert not [v for k, v in report.attributes if "http" in (v or "") or k.startswith("on")]
    style = report.texts[report.tags.index("style")] + "".join(report.texts)
    assert "prefers-color-scheme" in style
    assert not re.search(r"https?:|url\(|@import", style)
    assert ("lang", "en") in report.attributes


def test_every_picture_is_embedded_and_decodes(report, images):
    grid, *plots = report.pictures
    assert grid == reports.image_grid(images, [ATTACK, "kite"], scale=12)
    assert plots == [drawn(plot) for plot in PLOTS]
    assert all(pixels_of(png).std() > 0 for png in report.pictures)
    assert report.tags.count("figcaption") == 6


def test_texts_from_outside_stay_texts(report):
    assert report.texts.count(ATTACK) == 2  # the prompt and the setting
    assert "left alone <here>" in report.texts
    assert "script" not in report.tags
    assert "b" not in report.tags


def test_names_of_arms_stay_texts_and_attributes(tmp_path, results, images):
    results["calibration"] = None
    results["arms"][2]["name"] = ATTACK
    images[ATTACK] = images.pop("q-drift")
    path = reports.write_report(tmp_path / "r.html", results, images, ["a", "b"])
    report = Document(path.read_text(encoding="utf-8"))
    assert "script" not in report.tags
    assert report.texts.count(ATTACK) == 1 + 3 + 1  # its row, its differences, and the setting
    assert any(k == "alt" and ATTACK in v for k, v in report.attributes)


def test_report_holds_summary_tables_steps_and_settings(report, results):
    assert reports.summary(results)[0] in report.texts
    assert report.tags.count("table") == 3
    assert report.tags.count("tr") == (1 + 3) + (1 + 3) + (1 + 5)
    assert {"better", "worse", "no difference shown", "identical"} <= set(report.texts)
    for key, value in results["settings"].items():
        assert report.texts[report.texts.index(key) + 1] == str(value)


@pytest.mark.parametrize(
    ("change", "pictures", "words"),
    [
        ({"calibration": None}, 1, "No calibration"),
        ({"calibration": {**make_calibration(2, 1), "error_spectrum": None}}, 5, "no spectrum"),
        ({"calibration": None, "settings": {}}, 1, "No settings"),
    ],
)
def test_what_is_missing_is_said(tmp_path, results, images, change, pictures, words):
    path = reports.write_report(tmp_path / "r.html", {**results, **change}, images, ["a", "b"])
    report = Document(path.read_text(encoding="utf-8"))
    assert len(report.pictures) == pictures
    assert any(words in text for text in report.texts)


def test_a_report_without_pictures_says_so(tmp_path, results):
    results["calibration"] = None
    path = reports.write_report(str(tmp_path / "r.html"), results, {}, [])
    assert "No pictures were given to this report." in path.read_text(encoding="utf-8")


def test_a_report_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path, results, images):
    results["calibration"] = None
    path = tmp_path / "r.html"
    path.write_text("old")
    before = copy.deepcopy(results)
    assert reports.write_report(path, results, images, ["a", "b"]) == path
    assert os.listdir(tmp_path) == ["r.html"]
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert results == before


def test_a_report_that_fails_leaves_the_old_one(tmp_path, results, images, monkeypatch):
    results["calibration"] = None
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(EvenkeelError):
        reports.write_report(path, {**results, "arms": []}, images, ["a", "b"])

    def broken(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk"):
        reports.write_report(path, results, images, ["a", "b"])
    assert os.listdir(tmp_path) == ["r.html"]
    assert path.read_text() == "old"
