"""Plots and picture grids"""

from __future__ import annotations

import ast
import importlib
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from report_inputs import (
    PLOTS,
    drawn,
    make_calibration,
    pixels_of,
)

import evenkeel.reports as reports
from evenkeel.errors import EvenkeelError, MissingExtra

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
