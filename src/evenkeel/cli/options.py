"""What several commands take, and how their words become pipelines, denoisers and corrections."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenkeel.cli.several import own_device

PIPELINE = "zoo:NAME, a local diffusers folder, or a hub id"
_QUANTIZED = "quantizer specification (w3a4-g32-r16), folder, or hub id of the quantized denoiser"
DTYPES = ("float32", "bfloat16", "float16")


def command(
    commands: Any, name: str, run: Any, text: str, *, example: str
) -> argparse.ArgumentParser:
    """A subcommand with ``--json``, whose help ends with an example that runs."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=textwrap.fill(text, 100),
        epilog=f"Example:\n  evenkeel {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an example is one line, to be copied
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object on stdout, nothing else; numbers that are not finite are null",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="where it went wrong, not only what"
    )
    return parser


def say(options: argparse.Namespace, found: Any, text: str) -> None:
    """The result, for a program or for people."""
    if options.json:
        from evenkeel.storage import valid_json

        text = valid_json(found)
    print(text)


def several(parser: argparse.ArgumentParser) -> None:
    """The command may be launched as several processes, which share its prompts."""
    parser.set_defaults(several=True)


def _whole(text: str, low: int, high: int) -> int:
    try:
        value = int(text) if len(text) < 30 else None
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {low} to {high}, got {text[:30]!a}"
        )
    return value


def positive(text: str) -> int:
    """A number of things: at least 1, and not more than a job can have."""
    return _whole(text, 1, 1_000_000)


def steps(text: str) -> int:
    """A number of inference steps."""
    return _whole(text, 1, 10_000)


def not_negative(text: str) -> int:
    """A number of things, or none."""
    return _whole(text, 0, 1_000_000)


def seed(text: str) -> int:
    """Of the first prompt's noise; those of the others follow it, in 64 bits with a sign."""
    return _whole(text, 0, 2**62)


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text[:30]!a}")
    return value


def sampling(parser: argparse.ArgumentParser) -> None:
    """What every command that samples takes."""
    parser.add_argument("pipeline", help=PIPELINE)
    parser.add_argument("--quantized", required=True, metavar="Q", help=_QUANTIZED)
    parser.add_argument(
        "--prompts", metavar="FILE", help="text, CSV, TSV, JSON or tensors; - for stdin"
    )
    parser.add_argument("--steps", type=steps, help="number of inference steps")
    parser.add_argument(
        "--guidance-scale", type=finite, help="default: the twin's or the pipeline's"
    )
    scheduler(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the first prompt's noise")
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


def device_of(options: argparse.Namespace) -> str | None:
    """``--device``, of several processes the own one; None for the CPU.

    Raises:
        EvenkeelError: no such device here.

    """
    name = own_device(options.device)
    if name is None:
        return None
    import torch

    from evenkeel.errors import EvenkeelError

    try:
        torch.ones(1, device=torch.device(name)).sum().item()
    except Exception as e:  # torch has another for each: no such word, no driver, no such number
        said = (str(e).splitlines() or [repr(e)])[0]
        raise EvenkeelError(f"--device {name!a} cannot be used here: {said[:200]}") from e
    return name


def loaded(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Pipeline, quantized denoiser, and the sampling settings with the twin's defaults filled in."""
    from evenkeel.cli.sources import load_denoiser

    pipeline, settings = pipeline_and_settings(options)
    options.stage = "loading the quantized denoiser"
    quantized = load_denoiser(options.quantized, pipeline)
    if options.device:
        quantized.to(pipeline.device)
    options.stage = f"running {options.command}"
    return pipeline, quantized, settings


def pipeline_and_settings(
    options: argparse.Namespace, steps_needed: bool = True
) -> tuple[Any, dict[str, Any]]:
    """Pipeline, and the sampling settings with the twin's defaults filled in, all of them tried.

    Raises:
        EvenkeelError: an argument that this pipeline, scheduler or machine does not take.

    """
    from evenkeel.cli.calling import parse_call
    from evenkeel.cli.sources import load_pipeline
    from evenkeel.errors import EvenkeelError

    number, guidance = sampling_of(options)
    if number is None and steps_needed:
        raise EvenkeelError("pass --steps, the number of inference steps you deploy with.")
    device = device_of(options)
    options.stage = "loading the pipeline"
    pipeline = load_pipeline(options.pipeline, options.dtype, options.scheduler)
    threads_for(options, pipeline)
    options.stage = "looking at the arguments"
    call = parse_call(options.call, pipeline)
    if number is not None:
        try_scheduler(pipeline, number, call)
    if device:
        pipeline.to(device)
    options.stage = f"running {options.command}"
    return pipeline, {"num_inference_steps": number, "guidance_scale": guidance, "call": call}


def try_scheduler(pipeline: Any, number: int, call: dict[str, Any]) -> None:
    """Refuse a scheduler that cannot make so many steps, before anything is made ready for them."""
    from evenkeel.hosts.scheduler.schedulers import check_usable

    if not {"timesteps", "sigmas"} & call.keys():
        check_usable(pipeline.scheduler, number)
