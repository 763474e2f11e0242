"""Every method against the damage: what the papers' cells and the matrix give, in one figure.

From the results on disk in matrix/ and reproduced/; nothing is run. Writes GAINS.md and gains.svg.

    python experiments/gain_against_damage.py
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured_cells import reproduced

from evenkeel.storage import write_atomically

HERE = Path(__file__).parent
BETTER, WORSE, UNDECIDED = "#1b6ca8", "#c1440e", "#999999"
COLUMNS = 5
FD = "frechet_full_precision"


@dataclass(frozen=True)
class Point:
    """One arm of one cell.

    Attributes:
        method: as the catalogue calls it.
        cell: which.
        damage: PSNR of the quantized arm to full precision, dB; lower is more.
        fd: the arm's Fréchet distance to full precision over the quantized arm's, and its 95 % interval.
        psnr: change of PSNR to full precision, dB, and its 95 % interval.

    """

    method: str
    cell: str
    damage: float
    fd: tuple[float, float, float] | None
    psnr: tuple[float, float, float] | None


def points() -> list[Point]:
    """All that is on disk; an arm that rows of two tables share counts once."""
    found = {(p.method, p.damage, p.fd, p.psnr): p for p in (*_of_papers(), *_of_matrix())}
    return list(found.values())


def _of_matrix() -> Iterator[Point]:
    for place in sorted((HERE / "matrix").glob("*.json")):
        cell = json.loads(place.read_text())
        before = cell["quantized"]
        for method, found in cell["changes"].items():
            changes = {k: tuple(v[i] for i in (0, 2, 3)) for k, v in found.items()}
            name = f"{cell['twin']} {cell['quantizer']}"
            yield _point(method, name, before["psnr"], before[FD], changes)


def _of_papers() -> Iterator[Point]:
    for _, label, result in reproduced():
        arms = {arm["name"]: arm for arm in result["arms"]}
        before = arms["quantized"]
        asked = result["cell"]
        for arm, found in arms.items():
            method = arm if arm in asked["also"] else _called(asked["arms"].get(arm))
            if method is None or "difference_to_quantized" not in found:
                continue
            changes = {
                k: (v["value"], v["low"], v["high"])
                for k, v in found["difference_to_quantized"].items()
            }
            yield _point(method, label, before["psnr"]["value"], before[FD]["value"], changes)


def _called(asked: Any) -> str | None:
    """The catalogue's name of a paper's arm; None for what the catalogue has no name for."""
    return asked if isinstance(asked, str) else None


def _point(
    method: str, cell: str, damage: float, distance: float, changes: dict[str, Any]
) -> Point:
    fd, psnr = changes.get(FD), changes.get("psnr")
    ratio = None if fd is None else tuple(1 + v / distance for v in fd)
    known = psnr is not None and all(v is not None and math.isfinite(v) for v in psnr)
    return Point(method, cell, damage, ratio, psnr if known else None)  # type: ignore[arg-type]


def by_method(found: list[Point]) -> dict[str, list[Point]]:
    """Sorted by mean change of PSNR, best first."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in found:
        groups[point.method].append(point)
    return dict(sorted(groups.items(), key=lambda item: -_mean(item[1])))


def _mean(group: list[Point]) -> float:
    values = [p.psnr[0] for p in group if p.psnr is not None]
    return sum(values) / len(values) if values else -math.inf


def side(interval: tuple[float, float, float] | None, none: float, up: int) -> int:
    """1 better, -1 worse, 0 where the interval includes what changes nothing; up: which way is better."""
    if interval is None or interval[1] <= none <= interval[2]:
        return 0
    return up if interval[1] > none else -up


def page(groups: dict[str, list[Point]]) -> str:
    """GAINS.md."""
    cells = {p.cell for group in groups.values() for p in group}
    lines = [
        "# Gain against damage",
        "",
        *(__doc__ or "").split("\n\n")[1].splitlines(),
        "",
        f"{len(cells)} cells, each a pipeline of the zoo, a quantizer and a sampler; what they are: "
        "[MATRIX.md](MATRIX.md) and reproduced/*/tables.md. A cell counts as better or worse where the "
        "paired 95 % interval excludes no change; one in twenty does by chance.",
        "",
        "![gain against damage](gains.svg)",
        "",
        "Each point is a cell: to the right more damage (PSNR of the quantized arm falls), below the line "
        "nearer to full precision. Blue better, orange worse, grey undecided.",
        "",
        "| method | cells | distance: better / worse | PSNR: better / worse | mean, dB | worst | best |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, group in groups.items():
        fd = [side(p.fd, 1.0, -1) for p in group]
        psnr = [side(p.psnr, 0.0, 1) for p in group]
        values = [p.psnr[0] for p in group if p.psnr is not None]
        lines.append(
            f"| {method} | {len(group)} | {fd.count(1)} / {fd.count(-1)} | "
            f"{psnr.count(1)} / {psnr.count(-1)} | {_mean(group):+.2f} | {min(values):+.2f} | "
            f"{max(values):+.2f} |"
        )
    return "\n".join(lines) + "\n"


def figure(groups: dict[str, list[Point]], place: Path) -> None:
    """A panel per method: distance over the quantized arm's, against the quantized arm's PSNR."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "gains", "svg.fonttype": "none"}
    from matplotlib import pyplot

    rows = -(-len(groups) // COLUMNS)
    picture, panels = pyplot.subplots(
        rows, COLUMNS, figsize=(2.4 * COLUMNS, 1.9 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (method, group) in zip(panels.flat, groups.items(), strict=False):
        axes.axhline(1, color="#bbbbbb", linewidth=1)
        for point in group:
            if point.fd is None:
                continue
            colour = {1: BETTER, -1: WORSE, 0: UNDECIDED}[side(point.fd, 1.0, -1)]
            value, low, high = (max(v, 0.02) for v in point.fd)
            axes.plot([point.damage] * 2, [low, high], color=colour, linewidth=1)
            axes.plot(point.damage, value, ".", color=colour)
        axes.set_title(method, fontsize=9)
        axes.set_yscale("log")
    panels[0, 0].set_ylim(0.03, 10)
    panels[0, 0].invert_xaxis()
    picture.supxlabel("PSNR of the quantized arm, dB (damage grows to the right)", fontsize=9)
    picture.supylabel("FD to full precision, over the quantized arm's", fontsize=9)
    picture.tight_layout()
    picture.savefig(place, metadata={"Date": None})


def main() -> None:
    groups = by_method(points())
    write_atomically(HERE / "GAINS.md", page(groups))
    figure(groups, HERE / "gains.svg")


if __name__ == "__main__":
    main()
