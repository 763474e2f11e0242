"""The report"""

from __future__ import annotations

import base64
import copy
import os
import re
from html.parser import HTMLParser

import pytest
from report_inputs import (
    ATTACK,
    PLOTS,
    drawn,
    make_calibration,
    make_images,
    make_results,
    pixels_of,
)

import evenkeel.reports as reports
from evenkeel.errors import EvenkeelError
from evenkeel.reports.script import SCRIPT
from evenkeel.reports.summary import in_short

VOID = {"meta", "img", "br", "hr", "link", "input"}


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
        assert len(found) == len([v for k, v in self.attributes if k == "alt" and v])
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
    assert not {"link", "iframe", "object", "base"} & set(report.tags)
    assert report.tags.count("script") == 1 and SCRIPT in report.texts
    assert not [v for k, v in report.attributes if "http" in (v or "") or k.startswith("on")]
    style = report.texts[report.tags.index("style")] + "".join(report.texts)
    assert "prefers-color-scheme" in style
    assert not re.search(r"https?:|url\(|@import", style)
    assert ("lang", "en") in report.attributes


def test_every_picture_is_embedded_and_decodes(report, images):
    shown, plots = report.pictures[:6], report.pictures[6:]
    assert plots == [drawn(plot) for plot in PLOTS]
    for row in range(2):
        for image, png in zip(images.values(), shown[3 * row : 3 * row + 3], strict=True):
            assert (
                pixels_of(png) == image[row].permute(1, 2, 0).numpy()
            ).all()  # small ones to the bit
    assert report.tags.count("figcaption") == 6


def test_texts_from_outside_stay_texts(report):
    assert report.texts.count(ATTACK) == 2  # the prompt and the setting
    assert "left alone <here>" in report.texts
    assert report.tags.count("script") == 1
    assert "b" not in report.tags


def test_names_of_arms_stay_texts_and_attributes(tmp_path, results, images):
    results["calibration"] = None
    results["arms"][2]["name"] = ATTACK
    images[ATTACK] = images.pop("q-drift")
    path = reports.write_report(tmp_path / "r.html", results, images, ["a", "b"])
    report = Document(path.read_text(encoding="utf-8"))
    assert report.tags.count("script") == 1
    # Its row and its differences, the setting; its box and heading over pictures, its intervals.
    assert report.texts.count(ATTACK) == 1 + 3 + 1 + 2
    assert any(k == "alt" and ATTACK in v for k, v in report.attributes)


def test_report_holds_summary_tables_steps_and_settings(report, results):
    assert reports.summary(results)[0] in report.texts
    assert report.tags.count("table") == 4
    assert report.tags.count("tr") == (1 + 2) + (1 + 3) + (1 + 3) + (1 + 5)
    assert reports.summary(results)[0] != in_short(results)[0] in report.texts
    assert report.tags.count("circle") == report.tags.count("rect") == 1  # one better, one worse
    assert {"better", "worse", "no difference shown", "identical"} <= set(report.texts)
    for key, value in results["settings"].items():
        assert report.texts[report.texts.index(key) + 1] == str(value)


@pytest.mark.parametrize(
    ("change", "pictures", "words"),
    [
        ({"calibration": None}, 6, "No calibration"),
        ({"calibration": {**make_calibration(2, 1), "error_spectrum": None}}, 10, "no spectrum"),
        ({"calibration": None, "settings": {}}, 6, "No settings"),
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
