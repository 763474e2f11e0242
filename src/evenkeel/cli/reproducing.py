"""The command for other people's numbers: reproduce."""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenkeel.cli.options import command, not_negative, positive

if TYPE_CHECKING:
    from evenkeel.reproduction import Paper

_UNITS = {"s": 1, "m": 60, "h": 3600}


def add_reproduce(commands: Any) -> None:
    """``evenkeel reproduce``."""
    parser = command(
        commands,
        "reproduce",
        _run_reproduce,
        "Run the cells of a paper's tables on the zoo and judge its claims: reproduced, null, opposite.",
        example="reproduce q-drift --list",
    )
    parser.add_argument("paper", help="q-drift, dcnc-dns, tac or sampling-aware")
    parser.add_argument("--cell", action="append", metavar="ID", help="only these (repeatable)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="the cells, and why others have none")
    what.add_argument(
        "--table", action="store_true", help="the page of what is on disk, and no run"
    )
    parser.add_argument("--severity", choices=("bits", "damage", "both"), default="bits")
    parser.add_argument(
        "--calibration-seed",
        type=not_negative,
        default=0,
        metavar="N",
        help="other calibration prompts and noise (0)",
    )
    parser.add_argument("--images", type=positive, help="per arm (default: what the gain needs)")
    parser.add_argument(
        "--arms", default="", metavar="NAMES", help="beside the claimed one, comma-separated (all)"
    )
    parser.add_argument(
        "--budget", type=duration, metavar="TIME", help="begin no cell after 30m, 2h, 90s"
    )
    parser.add_argument("--out", type=Path, default=Path("reproduced"), metavar="FOLDER")
    parser.add_argument(
        "--force", action="store_true", help="replace what is there and is not this command's own"
    )


def duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``2h``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 30m or 2h, got {text!r}")
    return float(found.group(1)) * _UNITS[found.group(2)]


def _run_reproduce(options: argparse.Namespace) -> None:
    from evenkeel.cli.generating import enough_images
    from evenkeel.reproduction import paper
    from evenkeel.reproduction.page import page, summary
    from evenkeel.reproduction.run_cell import (
        KIND,
        SEVERITIES,
        claim_cell,
        is_kept,
        run_cell,
        variant,
        why_no_damage,
    )
    from evenkeel.storage import FileOutput, valid_json, write_atomically, write_json

    found = paper(options.paper)
    wanted = [found.row(name) for name in options.cell or ()]
    rows = wanted or [row for row in found.rows if row.cell is not None]
    if options.list or not (rows or options.table):
        _list(found, options.json)
        return
    enough_images(options.images)
    began, folder = time.monotonic(), options.out / found.name
    tables = folder / "tables.md"
    FileOutput("page of reproduced tables", found.wrote).check(tables, options.force)
    severities = SEVERITIES if options.severity == "both" else (options.severity,)
    seed, only = options.calibration_seed, [name for name in options.arms.split(",") if name]
    asked = [] if options.table else list(itertools.product(rows, severities))
    without = {} if wanted else {row.id: why for row in rows if (why := why_no_damage(row))}
    if without and "damage" in severities:
        asked = [(row, s) for row, s in asked if s != "damage" or row.id not in without]
        if not options.json:
            print("\n".join(f"no damage to match: {why}." for why in without.values()))
    places = {(row.id, s): folder / f"{row.id}-{variant(s, seed)}.json" for row, s in asked}
    left = 0
    for place in places.values():
        FileOutput(KIND.name, KIND.wrote).check(place, options.force)
    options.kept = f"what was finished is kept in {folder}; the same command continues"

    def told(cell: str) -> Callable[[str], None]:
        return lambda text: None if options.json else print(f"{cell}: {text}", flush=True)

    for row, severity in asked:
        place = places[row.id, severity]
        if is_kept(place, row, options.images, only):
            claim_cell(row, folder / place.stem)
            continue
        if options.budget is not None and time.monotonic() - began > options.budget:
            left += 1
            continue
        options.stage = f"cell {row.id}"
        result = run_cell(
            row,
            folder / place.stem,
            severity=severity,
            calibration_seed=seed,
            images=options.images,
            only=only,
            said=told(row.id),
        )
        write_json(place, KIND, result)
        write_atomically(tables, page(found, _known(folder, found)))
    known = _known(folder, found)
    write_atomically(tables, page(found, known))
    keys = [(row.id, variant(severity, seed)) for row, severity in asked]
    results = [known[key] for key in keys if key in known] or list(known.values())
    if options.json:
        print(valid_json([{k: v for k, v in r.items() if k != "arms"} for r in results]))
    else:
        print(summary(results))
        print(f"{tables}" + (f"; {left} cells are left, run again" if left else ""))


def _known(folder: Path, found: Paper) -> dict[tuple[str, str], dict[str, Any]]:
    """Every cell that is on disk, in the order of the paper."""
    from evenkeel.reproduction.run_cell import KIND, variant
    from evenkeel.storage import read_json

    known = {}
    for row in found.rows:
        for place in sorted(folder.glob(f"{row.id}-*.json")):
            result = read_json(place, KIND)
            if result["row"] == row.id:
                known[row.id, variant(result["severity"], result["calibration_seed"])] = result
    return known


def _list(found: Any, as_json: bool) -> None:
    from evenkeel.storage import valid_json

    said = [
        {"cell": r.id, "model": r.model, "published": r.gain(), "reason": r.reason}
        for r in found.rows
    ]
    if as_json:
        print(valid_json(said))
        return
    print(f"{found.title}, {found.source}. {found.data}.")
    for row in said:
        gain = row["published"]
        print(
            f"  {row['cell']:24} {row['model']}: "
            + (row["reason"] if gain is None else f"{100 * gain:+.1f} %")
        )
