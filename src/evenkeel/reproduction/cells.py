"""What the papers' tables print, and the cell of the zoo that stands for each row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenkeel.errors import EvenkeelError

FOLDER = Path(__file__).resolve().parent / "papers"
PAPERS = ("q-drift", "dcnc-dns", "tac", "sampling-aware")
FULL_PRECISION, QUANTIZED = "full precision", "quantized"


@dataclass(frozen=True)
class Cell:
    """A pipeline of the zoo, quantized and corrected as a row of a paper says.

    Attributes:
        twin: of the paper's model.
        quantizer: of the paper, as ``Method.as_dict`` writes it.
        steps: as passed to the pipeline.
        calibration_prompts: how many.
        arms: by the paper's name, what stands for it: a name of the catalogue of corrections, with a form
            after a colon, a dictionary of a name and options, or a list of these that act together.
        also: names of ours, measured beside.
        guidance_scale: None is the twin's.
        sampler: short name of one of the twin's; None is its own.
        labels: class of every image; None draws prompts.
        subset: so many of the calibration prompts are used, those subsets of which the factors deviate
            most, by what Q-Drift's Table 3 calls it; None uses all.
        trajectory: of the calibration, as of ``calibrate``.

    """

    twin: str
    quantizer: Mapping[str, Any]
    steps: int
    calibration_prompts: int
    arms: Mapping[str, Any]
    also: Sequence[str] = ()
    guidance_scale: float | None = None
    sampler: str | None = None
    labels: int | None = None
    subset: Mapping[str, Any] | None = None
    trajectory: str = "full-precision"


@dataclass(frozen=True)
class Row:
    """A row of a table, or the rows of it that belong together.

    Attributes:
        id: unique in the paper, starting with the table.
        table: its number.
        model: what was measured, in the paper's words.
        numbers: by the paper's name of the arm, its numbers by measure.
        claim: arm and measure that the row is printed for; None where there is no cell.
        cell: or None.
        reason: why there is none: which weights, data, method or numbers are missing.
        note: what differs from the paper.

    """

    id: str
    table: str
    model: str
    numbers: Mapping[str, Mapping[str, float]]
    claim: tuple[str, str] | None = None
    cell: Cell | None = None
    reason: str = ""
    note: str = ""

    def gain(self) -> float | None:
        """The paper's relative change of the claimed measure against its quantized arm."""
        if self.claim is None:
            return None
        arm, measure = self.claim
        before, after = self.numbers[QUANTIZED][measure], self.numbers[arm][measure]
        return (after - before) / before

    def damage(self) -> float | None:
        """The paper's claimed measure of the quantized arm over that of full precision."""
        if self.claim is None or FULL_PRECISION not in self.numbers:
            return None
        measure = self.claim[1]
        return self.numbers[QUANTIZED][measure] / self.numbers[FULL_PRECISION][measure]


@dataclass(frozen=True)
class Paper:
    """A paper's tables.

    Attributes:
        name: on the command line.
        title, source: for people.
        data: what it was calibrated and measured on, and what stands for it here.
        rows: all of them.

    """

    name: str
    title: str
    source: str
    data: str
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def heading(self) -> str:
        """Of its page."""
        return f"# {self.title}: its tables, here"

    def wrote(self, place: Path) -> bool:
        """Whether a file is a page of this paper."""
        return place.read_bytes().startswith(self.heading.encode())

    def row(self, row_id: str) -> Row:
        """The row of that id.

        Raises:
            EvenkeelError: there is none; lists those that have cells.

        """
        found = next((r for r in self.rows if r.id == row_id), None)
        if found is None:
            cells = ", ".join(r.id for r in self.rows if r.cell is not None)
            raise EvenkeelError(f"{self.name} has no cell {row_id!r}; there is {cells}.")
        return found


def paper(name: str) -> Paper:
    """The tables of one of ``PAPERS``.

    Raises:
        EvenkeelError: no such paper.

    >>> paper("q-drift").row("1-flux-schnell").gain()  # doctest: +ELLIPSIS
    -0.0385...

    """
    if name not in PAPERS:
        raise EvenkeelError(f"no paper called {name!r}; there is {', '.join(PAPERS)}.")
    said = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    rows = tuple(_row(r) for r in said["rows"])
    return Paper(name, said["title"], said["source"], said["data"], rows)


def _row(said: Mapping[str, Any]) -> Row:
    cell, claim = said.get("cell"), said.get("claim")
    return Row(
        said["id"],
        said["table"],
        said["model"],
        said["numbers"],
        None if claim is None else (claim[0], claim[1]),
        None if cell is None else Cell(**cell),
        said.get("reason", ""),
        said.get("note", ""),
    )
