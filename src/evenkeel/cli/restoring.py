"""The command that brings a quantized model nearer: restore."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenkeel.cli.options import (
    command,
    finite,
    loaded,
    not_negative,
    positive,
    sampling,
    say,
    several,
)
from evenkeel.cli.outputs import output, restored

UNFINISHED = ".evenkeel-unfinished"  # in the folder, until it is complete


def add_restore(commands: Any) -> None:
    """``evenkeel restore``."""
    parser = command(
        commands,
        "restore",
        _run_restore,
        "Fit small adapters beside the layers of a quantized denoiser, keep what held-out pairs confirm, "
        "and write one folder with adapters, model card and what was measured.",
    )
    sampling(parser)
    several(parser)
    parser.add_argument(
        "--count", type=positive, help="fit on so many prompts (default: all, or 32)"
    )
    parser.add_argument(
        "--budget",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="bytes of the adapters over those of the quantized denoiser, 5%% or 0.05 (default: 5%%)",
    )
    parser.add_argument(
        "--images",
        type=not_negative,
        default=16,
        help="other images to measure on; 0 measures nothing",
    )
    parser.add_argument("--no-readout", action="store_true", help="adapters alone")
    said = "folder; after a kill the same command goes on with what it finds there"
    output(parser, restored, default=Path("restored"), help=said)


def share(text: str) -> float:
    """``5%`` or ``0.05``."""
    value = finite(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"expected a share above 0 and at most 1 (100%), got {text}"
        )
    return value


def _run_restore(options: argparse.Namespace) -> None:
    from evenkeel.cli.sources import evaluator_for, load_prompts
    from evenkeel.comparing.restore import restore
    from evenkeel.hosts.pipeline.prompts import Prompt
    from evenkeel.hosts.processes import processes
    from evenkeel.reports.restored import write_restored

    pipeline, quantized, settings = loaded(options)
    measured_on: Sequence[Prompt] = []
    if options.images:
        measured_on = load_prompts(options.prompts, pipeline, None, options.seed + 1)[
            : options.images
        ]
    found = restore(
        pipeline,
        quantized=quantized,
        prompts=load_prompts(options.prompts, pipeline, options.count, options.seed),
        measured_on=measured_on,
        budget=options.budget,
        seed=options.seed,
        batch_size=options.batch_size,
        evaluator=evaluator_for(pipeline),
        readout=not options.no_readout,
        folder=options.out / UNFINISHED,
        progress=not options.json,
        **settings,
    )
    described = {
        "pipeline": options.pipeline,
        "quantized": options.quantized,
        "scheduler": type(pipeline.scheduler).__name__,
        "budget": options.budget,
        "seed": options.seed,
        **settings,
    }
    written = bool(found.parts) or found.refitted is not None
    if written and processes().main:
        write_restored(options.out, found, described, [*map(str, measured_on)])
    if processes().main:
        shutil.rmtree(options.out / UNFINISHED, ignore_errors=True)
        with contextlib.suppress(OSError):  # what is there stays
            options.out.rmdir()
    place = f"\n{options.out}" if written else "\nnothing was written"
    what = {"out": str(options.out) if written else None, **found.as_dict()}
    say(options, what, f"{found.sentence}\n{place}")
