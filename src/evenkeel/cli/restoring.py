"""The command that brings a quantized model nearer: restore."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from evenkeel.errors import EvenkeelError

if TYPE_CHECKING:
    from evenkeel.hosts.pipeline.prompts import Prompts

UNSEEN = "prompts and noise"
UNFINISHED = ".evenkeel-unfinished"  # in the folder, until it is complete


def add_restore(commands: Any) -> None:
    """``evenkeel restore``."""
    parser = command(
        commands,
        "restore",
        _run_restore,
        "Fit small adapters beside the layers of a quantized denoiser, keep what held-out pairs confirm, "
        "and write one folder with adapters, model card and what was measured.",
        example="restore zoo:flux-schnell --quantized w4a16-g32 --budget 11% --out restored",
    )
    sampling(parser)
    several(parser)
    parser.add_argument(
        "--count",
        type=positive,
        help="fit on so many prompts (default: 32 of a twin's, three quarters of a file's)",
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
        help="to measure on, of prompts that are not fitted on where there are enough; 0 measures nothing",
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


def _prompts(options: argparse.Namespace, pipeline: Any) -> tuple[Prompts, Prompts, str]:
    """To fit on, to measure on, and what of the latter the fit has not seen.

    A twin draws others. Of a file the last quarter is held out, or what ``--count`` leaves; where nothing
    is left the same prompts are measured with other noise, and that is said.
    """
    from evenkeel.cli.sources import load_prompts

    given, images = options.prompts, options.images
    if given is None:
        others = load_prompts(None, pipeline, max(images, 1), options.seed + 1)
        fit = load_prompts(None, pipeline, options.count, options.seed)
        return fit, others[:images], UNSEEN
    found = load_prompts(given, pipeline, None, options.seed)
    count = options.count or len(found) - min(images, len(found) // 4)
    if count > len(found):
        raise EvenkeelError(f"{given} holds {len(found)} prompts, {count} were asked for.")
    if count < len(found):
        return found[:count], found[count : count + images], UNSEEN
    return found, found[:images], "noise"


def _run_restore(options: argparse.Namespace) -> None:
    from evenkeel.cli.sources import evaluator_for
    from evenkeel.comparing.restore import restore
    from evenkeel.hosts.processes import processes
    from evenkeel.reports.restored import write_restored

    pipeline, quantized, settings = loaded(options)
    prompts, measured_on, unseen = _prompts(options, pipeline)
    found = restore(
        pipeline,
        quantized=quantized,
        prompts=prompts,
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
        "unseen": unseen,
        **settings,
    }
    written = bool(found.parts) or found.refitted is not None
    if written and processes().main:
        base = quantized if found.refitted is None else found.refitted
        write_restored(options.out, found, described, [*map(str, measured_on)], base)
    if processes().main:
        shutil.rmtree(options.out / UNFINISHED, ignore_errors=True)
        with contextlib.suppress(OSError):  # what is there stays
            options.out.rmdir()
    place = f"\n{options.out}" if written else "\nnothing was written"
    what = {"out": str(options.out) if written else None, **found.as_dict()}
    say(options, what, f"{found.sentence}\n{place}")
