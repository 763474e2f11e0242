"""The registry of published cells: whole, consistent with the catalogues, and judged rightly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from evenkeel import zoo
from evenkeel.corrections.catalogue import ALL, FORMS
from evenkeel.errors import EvenkeelError
from evenkeel.estimate import Estimate
from evenkeel.quantizers.methods.catalogue import method_from
from evenkeel.reproduction import PAPERS, Row, judged, paper
from evenkeel.reproduction.page import page
from evenkeel.reproduction.run_cell import KIND, OURS, is_kept, variant
from evenkeel.reproduction.verdict import images_needed
from evenkeel.storage import read_json
from evenkeel.zoo.pictures import KINDS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ROWS = [(name, row) for name in PAPERS for row in paper(name).rows]
CELLS = [(name, row) for name, row in ROWS if row.cell is not None]
# The rows of the papers' tables, as they are printed there.
PRINTED = {
    "q-drift": "flux-dev flux-schnell sdxl sdxl-turbo sdxl-turbo-mixdq pixart sana | flux-dev flux-schnell "
    "sdxl sdxl-turbo pixart pixart-vidit-q sana | absolute lowest highest |",
    "dcnc-dns": "ldm-4 dit-xl-w8a8 dit-xl-w4a8 flux-dev | | | 10-3 20-3 40-3 20-0 20-6",
    "tac": "w8a8 w4a8 w3a8 w3a6 ptq4dm tdq eda-dm tfmq-dm efficientdm | church-w8a8 church-w4a8 church-w3a8 "
    "bedroom-w4a8 bedroom-w3a8 bedroom-w2a8 quest tfmq-dm eda-dm | | w4a32 w4a8 w3a8 | batch-64 batch-32 "
    "batch-16 batch-1 | w8a8 w3a8",
    "sampling-aware": "w8a8 w4a8 w4a4 | bedroom church | |",
}
LACKS = (
    "missing",
    "experiments/",
    "cell 1-ldm-4",
)  # weights, data, a method, numbers, or elsewhere


def names_of(asked: Any) -> list[str]:
    if isinstance(asked, list):
        return [name for part in asked for name in names_of(part)]
    return [asked if isinstance(asked, str) else asked["name"]]


@pytest.mark.parametrize("name", PAPERS)
def test_every_row_of_every_table_is_there_once(name: str) -> None:
    printed = [
        f"{number}-{row}" if row else str(number)
        for number, rows in enumerate(PRINTED[name].split("|"), 1)
        for row in rows.split() or [""]
    ]
    assert sorted(row.id for row in paper(name).rows) == sorted(printed)
    assert all(row.id.split("-")[0] == row.table for row in paper(name).rows)


@pytest.mark.parametrize(("name", "row"), ROWS, ids=lambda v: v.id if isinstance(v, Row) else v)
def test_a_row_has_a_cell_or_says_what_is_missing(name: str, row: Row) -> None:
    assert (row.cell is None) == bool(row.reason)
    assert row.cell is not None or any(word in row.reason for word in LACKS)
    assert "time" not in row.reason.split()
    cited = re.findall(r"experiments/\w+\.py", row.reason)
    assert all((EXPERIMENTS.parent / script).is_file() for script in cited)


@pytest.mark.parametrize(("name", "row"), CELLS, ids=lambda v: v.id if isinstance(v, Row) else v)
def test_a_cell_names_what_exists(name: str, row: Row) -> None:
    cell = row.cell
    assert cell is not None and row.claim is not None
    twin = zoo.twin(cell.twin)
    assert cell.sampler is None or twin.sampler(cell.sampler)
    assert str(method_from(cell.quantizer)).startswith(str(cell.quantizer["method"]))
    known = {*ALL, *FORMS}
    assert {n for asked in (*cell.arms.values(), *cell.also) for n in names_of(asked)} <= known
    kind = KINDS[twin.pictures]
    prompts = kind.prompts(2, 1) if cell.labels is None else [cell.labels] * 2
    assert len(kind.references(prompts, 1)) == 2
    arm, measure = row.claim
    assert arm in cell.arms and measure in OURS and measure in row.numbers[arm]
    assert row.gain() is not None


def test_gains_are_the_papers() -> None:
    assert paper("q-drift").row("1-pixart").gain() == pytest.approx(44.26 / 48.85 - 1)
    assert paper("tac").row("1-w3a8").gain() == pytest.approx(9.55 / 17.31 - 1)
    assert paper("tac").row("1-w3a8").damage() == pytest.approx(17.31 / 4.22)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(-8, -1, "reproduced"), (1, 8, "opposite"), (-1, 1, "null"), (-9, 3, "underpowered")],
)
def test_verdicts(low: float, high: float, word: str) -> None:
    change = Estimate((low + high) / 2, 1.0, low, high, 400)
    assert judged(-0.05, change, 100.0).word == word


def test_images_needed_grow_with_the_square_of_what_is_missing() -> None:
    change = Estimate(0.0, 1.0, -2.0, 2.0, 100)
    assert images_needed(-0.04, change, 100.0) == 100
    assert images_needed(-0.02, change, 100.0) == 400


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(EvenkeelError, match="q-drift, dcnc-dns"):
        paper("magic")
    with pytest.raises(EvenkeelError, match="there is 1-flux-dev"):
        paper("q-drift").row("9-nothing")


@pytest.mark.parametrize("name", PAPERS)
def test_the_pages_are_made_of_the_results_beside_them(name: str) -> None:
    folder, found = EXPERIMENTS / "reproduced" / name, paper(name)
    results = [read_json(place, KIND) for place in sorted(folder.glob("*.json"))]
    known = {(r["row"], variant(r["severity"], r["calibration_seed"])): r for r in results}
    assert (folder / "tables.md").read_text() == page(found, known)
    for place, result in zip(sorted(folder.glob("*.json")), results, strict=True):
        row, arms = found.row(result["row"]), [arm["name"] for arm in result["arms"]]
        assert row.cell is not None and row.claim is not None and row.claim[0] in arms
        assert is_kept(place, row, result["images"], arms[2:])
        assert (row.id, place.stem.removeprefix(f"{row.id}-")) in known and result[
            "twin"
        ] == row.cell.twin


def test_a_page_names_every_row() -> None:
    for name in PAPERS:
        text = page(paper(name), {})
        assert all(row.id in text for row in paper(name).rows) and paper(name).heading in text


def test_what_matrix_says_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import matrix

    places = [EXPERIMENTS / "MATRIX.md", matrix.CHOOSING, matrix.MATRIX]
    monkeypatch.setattr(Path, "write_text", lambda place, text: written.update({place: text}))
    written: dict[Path, str] = {}
    matrix.publish()
    assert written == {place: place.read_text() for place in places}
