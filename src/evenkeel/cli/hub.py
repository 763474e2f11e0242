"""The commands that bring results to the hub and back: push, pull."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evenkeel.cli.options import command, say


def add_push(commands: Any) -> None:
    """``evenkeel push``."""
    parser = command(
        commands,
        "push",
        _run_push,
        "Upload a record, a readout, restored adapters or a quantized denoiser to the hub, with a model card "
        "where there is none. Only safetensors, JSON, text and pictures go up.",
        example="push restored USER/pixart-sigma-w4a16-restored",
    )
    parser.add_argument("folder", type=Path, help="folder or file of evenkeel's")
    parser.add_argument("repo", help="USER/NAME; made if there is none")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--base", metavar="REPO", help="hub id of the model it belongs to")


def add_pull(commands: Any) -> None:
    """``evenkeel pull``."""
    parser = command(
        commands,
        "pull",
        _run_pull,
        "Download what was pushed, and check that it is whole. Every command takes the hub id itself, too.",
        example="pull USER/pixart-sigma-w4a16-restored --out restored",
    )
    parser.add_argument("repo", help="USER/NAME, or USER/NAME/FILE")
    parser.add_argument("--out", type=Path, help="copy it here (default: leave it in the cache)")


def _run_push(options: argparse.Namespace) -> None:
    from evenkeel.reports.hub_card import card_of
    from evenkeel.storage.hub import push

    place = options.folder
    has_card = place.is_dir() and (place / "README.md").is_file()
    card = None if has_card else card_of(place, options.repo, options.base)
    found = push(place, options.repo, card, private=options.private)
    say(options, {"repo": options.repo, "url": found}, found)


def _run_pull(options: argparse.Namespace) -> None:
    from evenkeel.errors import StorageError
    from evenkeel.reports.hub_card import kind_of_place
    from evenkeel.storage import check_folder
    from evenkeel.storage.hub import bring, local

    out = options.out
    if out is not None:
        if out.exists():
            raise StorageError(
                f"{out} is there already; give a place that is not, or move it away."
            )
        check_folder(out)
    place = local(options.repo)
    kind = kind_of_place(place)
    if out is not None:
        place = bring(place, out)
    say(options, {"out": str(place), "kind": kind}, f"{place}: {kind}")
