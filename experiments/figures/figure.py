"""What a figure is, where its result lies, and the page that shows all of a paper."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from evenkeel import zoo
from evenkeel.quantizers.methods.catalogue import method_from
from evenkeel.reproduction import paper
from evenkeel.reproduction.run_cell import Bench, claim_cell
from evenkeel.storage import write_atomically

HERE = Path(__file__).parent
Numbers = dict[str, Any]
LARGEST = 150_000  # bytes of a picture


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        numbers: as JSON knows them; plots are drawn from them and sentences written.
        pictures: further columns of a panel, by heading, one image per row; not kept.

    """

    numbers: Numbers
    pictures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """One figure of a paper.

    Attributes:
        name: of its files.
        title: what it shows and on which axes, after the paper.
        row: of the registry, whose cell it is drawn on.
        paper: sample of the paper.
        here: sample here, with a place for ``count``.
        count: so many prompts or images.
        limits: what differs from the paper, and why.
        measure: of the cell's bench and ``count``.
        draw: a figure of matplotlib.
        read: what it shows here, sentences from the numbers.
        pictured: it needs pictures, which are not kept here, to be drawn again.

    """

    name: str
    title: str
    row: str
    paper: str
    here: str
    count: int
    limits: str
    measure: Callable[[Bench, int], Found]
    draw: Callable[[Found], Any]
    read: Callable[[Numbers], Sequence[str]]
    pictured: bool = False


@dataclass(frozen=True)
class Figures:
    """Those of one paper.

    Attributes:
        paper: its name in the registry.
        all: in its order.
        without: its other figures and why they are not drawn.

    """

    paper: str
    all: Sequence[Figure]
    without: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Of the results."""
        return HERE / self.paper

    def named(self, name: str) -> Figure:
        """The figure of that name.

        Raises:
            SystemExit: there is none; lists those that there are.

        """
        for figure in self.all:
            if figure.name == name:
                return figure
        raise SystemExit(
            f"{self.paper} has no figure {name!r}; there is {', '.join(f.name for f in self.all)}"
        )

    def result(self, figure: Figure) -> Numbers | None:
        """What was measured for it, if it was."""
        place = self.folder / f"{figure.name}.json"
        return json.loads(place.read_text()) if place.exists() else None

    def make(self, figure: Figure, *, again: bool = False) -> None:
        """Measure and draw, unless that is done with this row and count."""
        known = self.result(figure)
        asked = {"row": figure.row, "count": figure.count}
        if known is not None and not again and asked.items() <= known.items():
            return
        found = figure.measure(bench(self.paper, figure.row), figure.count)
        self.folder.mkdir(exist_ok=True)
        said = {**asked, **found.numbers}
        text = json.dumps(rounded(said), separators=(",", ":"))
        write_atomically(self.folder / f"{figure.name}.json", text + "\n")
        self._drawn(figure, Found(json.loads(text), found.pictures))

    def draw(self, figure: Figure) -> None:
        """Once more, from what was measured; one with pictures is left as it is."""
        known = self.result(figure)
        if known is not None and not figure.pictured:
            self._drawn(figure, Found(known))

    def _drawn(self, figure: Figure, found: Found) -> None:
        place = self.folder / f"{figure.name}.png"
        figure.draw(found).savefig(place, dpi=80)
        if place.stat().st_size > LARGEST:
            raise SystemExit(f"{place} has {place.stat().st_size:,} bytes; at most {LARGEST:,}")

    def write_page(self) -> None:
        """All that is on disk."""
        write_atomically(self.folder / "figures.md", self.page())

    def page(self) -> str:
        """Markdown."""
        whole = paper(self.paper)
        known = {f.name: self.result(f) for f in self.all}
        lines = [f"# {whole.title}: its figures, here", "", _HEAD.format(self.paper), ""]
        missing = [f.name for f in self.all if known[f.name] is None]
        if missing:
            lines += [f"Not drawn yet: {', '.join(missing)}.", ""]
        for figure in self.all:
            numbers = known[figure.name]
            if numbers is not None:
                lines += self._section(figure, numbers)
        if self.without:
            lines += ["## Not here", ""]
            lines += [f"- {name}: {why}." for name, why in self.without.items()]
        return "\n".join(lines).rstrip("\n") + "\n"

    def _section(self, figure: Figure, numbers: Numbers) -> list[str]:
        row = paper(self.paper).row(figure.row)
        assert row.cell is not None
        cell, parts = row.cell, figure.name.split("-", 2)
        heading = " ".join(parts[:2]).capitalize().replace("Fig", "Fig.")
        heading += f", {parts[2]}" if len(parts) > 2 else ""
        twin = zoo.twin(cell.twin)
        guidance = twin.guidance_scale if cell.guidance_scale is None else cell.guidance_scale
        asked = [cell.twin, cell.sampler or next(iter(twin.schedulers)), f"{cell.steps} steps"]
        asked += [f"guidance {guidance:g}"] if guidance is not None else []
        asked += [str(method_from(cell.quantizer))]
        here = figure.here.format(count=f"{numbers['count']:,}")
        return [
            f"## {heading}",
            "",
            f"{figure.title}",
            "",
            f"![{heading}]({figure.name}.png)",
            "",
            *(f"- {line}" for line in figure.read(numbers)),
            "",
            f"Cell `{row.id}` ({row.model}): {', '.join(asked)}. Paper: {figure.paper}. Here: {here}. "
            f"{figure.limits}",
            "",
        ]


_HEAD = """\
Drawn on the cell of the zoo that stands for the paper's (`src/evenkeel/reproduction/papers/{0}.json`) by
`python experiments/paper_figures.py {0}`. The sentences are written from the numbers beside the pictures; an
interval that includes 0 decides nothing."""


@lru_cache(maxsize=1)
def bench(name: str, row: str) -> Bench:
    """The cell of that row, in the folder in which ``evenkeel reproduce`` keeps it."""
    asked = paper(name).row(row)
    assert asked.cell is not None
    folder = HERE.parent / "reproduced" / name / f"{row}-bits"
    claim_cell(asked, folder)
    return Bench(asked.cell, folder)


def rounded(value: Any) -> Any:
    """Numbers to five digits, in whatever holds them; None for what is not finite."""
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
