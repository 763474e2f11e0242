"""The command that knows the zoo: zoo list, zoo card, zoo path."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evenkeel.cli.options import command, say


def add_zoo(commands: Any) -> None:
    """``evenkeel zoo``."""
    text = "The small trained twins: which there are, where they are, how good they are."
    parser = commands.add_parser("zoo", help=text, description=text)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|card|path")
    command(
        actions,
        "list",
        _run_list,
        "All twins, with their originals' settings.",
        example="zoo list",
    )
    card = command(
        actions,
        "card",
        _run_card,
        "The model card of a twin.",
        example="zoo card flux-schnell",
    )
    card.add_argument("name", metavar="NAME")
    path = command(
        actions,
        "path",
        _run_path,
        "The folder of a twin.",
        example="zoo path flux-schnell",
    )
    path.add_argument("name", metavar="NAME")


def _run_list(options: argparse.Namespace) -> None:
    from evenkeel import zoo
    from evenkeel.zoo.folders import described

    found = [described(twin) for twin in zoo.TWINS.values()]
    if options.json:
        say(options, {"twins": found}, "")
        return
    rows = [("name", "class", "original", "steps", "guidance", "weights", "on disk", "schedulers")]
    for twin in found:
        here = twin["path"] is not None
        rows.append(
            (
                twin["name"],
                twin["class"],
                twin["original"],
                str(twin["num_inference_steps"]),
                "-" if twin["guidance_scale"] is None else str(twin["guidance_scale"]),
                f"{twin['denoiser_weights'] / 1e6:.2f} M" if here else "not here",
                f"{twin['bytes'] / 1e6:.1f} MB" if here else "-",
                " ".join(twin["schedulers"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def _run_card(options: argparse.Namespace) -> None:
    from evenkeel.zoo import path_of
    from evenkeel.zoo.folders import card_of

    card = card_of(options.name)
    found = {"name": options.name, "path": str(path_of(options.name)), "card": card}
    say(options, found | {"quality": _quality(path_of(options.name))}, card)


def _quality(folder: Path) -> Any:
    from evenkeel.storage import parse_json

    file = folder / "quality.json"
    return parse_json(file.read_bytes()) if file.is_file() else None


def _run_path(options: argparse.Namespace) -> None:
    from evenkeel.zoo import path_of

    place = path_of(options.name)
    say(options, {"name": options.name, "path": str(place)}, str(place))
