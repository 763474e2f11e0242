"""What several commands take, and how their words become pipelines, denoisers and corrections."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenkeel.cli.several import own_device

PIPELINE = "zoo:NAME, a local diffusers folder, or a hub id"
_QUANTIZED = "quantizer specification (w3a4-g32-r16), folder, or hub id of the quantized denoiser"
DTYPES = ("float32", "bfloat16", "float16")


def command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """A subcommand with ``--json``."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, nothing else"
    )
    return parser


def several(parser: argparse.ArgumentParser) -> None:
    """The command may be launched as several processes, which share its prompts."""
    parser.set_defaults(several=True)


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def sampling(parser: argparse.ArgumentParser) -> None:
    """What every command that samples takes."""
    parser.add_argument("pipeline", help=PIPELINE)
    parser.add_argument("--quantized", required=True, metavar="Q", help=_QUANTIZED)
    parser.add_argument("--prompts", metavar="FILE", help="one prompt per line, - for stdin")
    parser.add_argument("--steps", type=positive, help="number of inference steps")
    parser.add_argument(
        "--guidance-scale", type=float, help="default: the twin's or the pipeline's"
    )
    scheduler(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's noise")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--device",
        help="where to run, for example cuda (of several processes each its own); default: the CPU",
    )
    parser.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="further pipeline argument",
    )


def scheduler(parser: argparse.ArgumentParser) -> None:
    """Which scheduler samples."""
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help="instead of the pipeline's own: a twin's (see evenkeel zoo list), or a class of diffusers",
    )


def correcting(parser: argparse.ArgumentParser) -> None:
    """Which files corrections come from, and which mismatches are accepted."""
    parser.add_argument(
        "--record",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="from evenkeel calibrate or evenkeel readout; both can be given",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("denoiser", "scheduler", "guidance", "range"),
        help="accept this mismatch with the record",
    )


def corrections(
    paths: Sequence[Path], names: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, str], Any]:
    """The corrections of these names (None: all that the files allow), reasons for others, the record.

    Raises:
        EvenkeelError: an unknown name, or a name that the files do not allow.

    """
    from evenkeel.corrections.catalogue import ALL, FILE, FORMS, available, root_of
    from evenkeel.errors import EvenkeelError
    from evenkeel.record import Record, load

    files = [load(path) for path in paths]
    records = [f for f in files if isinstance(f, Record)]
    measured = {f.name: f for f in files if not isinstance(f, Record)}
    if len(records) > 1 or len(records) + len(measured) < len(files):
        raise EvenkeelError(
            "give --record once per kind of file: one record, one readout, one of adapters."
        )
    record = records[0] if records else None
    if record is not None:
        measured = {**record.closed_loop.corrections, **measured}
    formed = any(name in FORMS for name in names or ())
    evidence = None if record is None else record.evidence
    made, reasons = available(evidence, measured, forms=formed)
    if names is None:
        return made, reasons, record
    for name in names:
        if name not in ALL and name not in FORMS:
            raise EvenkeelError(
                f"no correction called {name}; there is {', '.join(ALL)}, and in their authors' form "
                f"{', '.join(FORMS)}."
            )
        if name not in made:
            maker = "calibrate"
            if root_of(name) == FILE:
                maker = "restore" if name == "adapters" else "readout"
            why = reasons.get(name) or (
                f"it needs --record FILE, made by evenkeel {maker}; the files given allow "
                f"{', '.join(made) or 'nothing'}."
            )
            raise EvenkeelError(f"{name}: {why}")
    return {name: made[name] for name in names}, {}, record


def sampling_of(options: argparse.Namespace) -> tuple[int | None, float | None]:
    """Number of inference steps and guidance scale, the twin's own where none is given."""
    from evenkeel import zoo

    steps, guidance = options.steps, options.guidance_scale
    if options.pipeline.startswith("zoo:"):
        twin = zoo.twin(options.pipeline[4:])
        steps = steps or twin.num_inference_steps
        guidance = twin.guidance_scale if guidance is None else guidance
    return steps, guidance


def threads_for(options: argparse.Namespace, pipeline: Any) -> None:
    """To the end of the command, loading, saving and reporting included: threads do not fight."""
    from evenkeel.hosts.pipeline.pipelines import denoiser_of
    from evenkeel.threads import sensible_threads

    options.closing.enter_context(sensible_threads(denoiser_of(pipeline)))


def loaded(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Pipeline, quantized denoiser, and the sampling settings with the twin's defaults filled in."""
    from evenkeel.cli.sources import load_denoiser, load_pipeline, parse_call
    from evenkeel.errors import EvenkeelError

    steps, guidance = sampling_of(options)
    if steps is None:
        raise EvenkeelError("pass --steps, the number of inference steps you deploy with.")
    pipeline = load_pipeline(options.pipeline, options.dtype, options.scheduler)
    threads_for(options, pipeline)
    quantized = load_denoiser(options.quantized, pipeline)
    device = own_device(options.device)
    if device:
        pipeline.to(device)
        quantized.to(device)
    settings = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "call": parse_call(options.call, pipeline),
    }
    return pipeline, quantized, settings
