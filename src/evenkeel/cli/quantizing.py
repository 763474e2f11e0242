"""The command that quantizes: quantize."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from evenkeel.cli.options import (
    DTYPES,
    PIPELINE,
    command,
    finite,
    pipeline_and_settings,
    positive,
    say,
    scheduler,
    seed,
    steps,
)
from evenkeel.cli.outputs import denoiser, output


def add_quantize(commands: Any) -> None:
    """``evenkeel quantize``."""
    parser = command(
        commands,
        "quantize",
        _run_quantize,
        "Quantize a pipeline's denoiser with a method of the literature (simulated, reference quality).",
        example="quantize zoo:flux-schnell --method rtn --bits w4a16 --out quantized",
    )
    parser.add_argument("pipeline", help=PIPELINE)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--method", help="svdquant, mixdq, vidit-q, q-diffusion, ...")
    how.add_argument(
        "--budget",
        type=bits,
        metavar="BITS",
        help="so many bits per weight, 4.5bits, shared out over layers by what the final image feels; "
        "weights alone unless --set activation_bits=8, and branches with --set rank=16",
    )
    parser.add_argument("--bits", metavar="wXaY", help="for example w4a8; default: the paper's")
    parser.add_argument(
        "--layout",
        metavar="NAME",
        help="with --budget: gguf, torchao or sdnq, choose among its formats and write its configuration",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, value read as JSON if it is",
    )
    output(parser, denoiser, required=True, help="folder for the denoiser")
    parser.add_argument(
        "--prompts", metavar="FILE", help="text, CSV, TSV, JSON or tensors; - for stdin"
    )
    parser.add_argument("--count", type=positive, help="use so many prompts (default: all, or 32)")
    parser.add_argument("--steps", type=steps, help="number of inference steps of the pipeline")
    parser.add_argument(
        "--guidance-scale", type=finite, help="default: the twin's or the pipeline's"
    )
    parser.add_argument(
        "--calibration-steps",
        type=positive,
        default=8,
        help="denoiser calls to keep of every run (default 8)",
    )
    scheduler(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the first prompt's noise")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="where to run, for example cuda; default: the CPU")
    parser.add_argument(
        "--call", action="append", default=[], metavar="NAME=VALUE", help="pipeline argument"
    )


def bits(text: str) -> float:
    """``4.5bits`` or ``4.5``."""
    try:
        value = float(text.removesuffix("bits"))
    except ValueError:
        value = 0.0
    if not 1 <= value <= 16:
        raise argparse.ArgumentTypeError(f"expected bits per weight, such as 4.5bits, got {text}")
    return value


def _run_quantize(options: argparse.Namespace) -> None:
    if options.budget is not None:
        _run_budget(options)
        return
    from evenkeel.cli.sources import load_prompts
    from evenkeel.errors import QuantizationError
    from evenkeel.fitting.quantize import PARTIAL, quantize
    from evenkeel.hosts.pipeline.prompts import Prompt
    from evenkeel.quantizers.methods.catalogue import method_named

    if options.layout is not None:
        raise QuantizationError("--layout goes with --budget.")
    kind = method_named(options.method)
    chosen = parse_options(options.set)
    method = kind.of_bits(options.bits, **chosen) if options.bits else kind.from_dict(chosen)
    pipeline, settings = _asked(options, method.calibrated)
    prompts: Sequence[Prompt] = []
    if method.calibrated:
        prompts = load_prompts(options.prompts, pipeline, options.count, options.seed)
    options.kept = (
        f"finished layers are kept in {options.out / PARTIAL}; the same command continues"
    )
    _, report = quantize(
        pipeline,
        method,
        prompts=prompts,
        calibration_steps=options.calibration_steps,
        **settings,
    )
    operations = _operations(options, report)
    found = {"quantized": str(options.out), **report.as_dict()}
    say(
        options,
        found | {"bit_operations": operations and operations.as_dict()},
        f"{report.table()}\n\n{report}\n  {_counted(operations)}\n\nquantized denoiser: {options.out}",
    )


def _operations(options: argparse.Namespace, report: Any) -> Any:
    """Of a call; None where the pipeline's configurations do not tell, or the layers are a backend's."""
    from evenkeel.errors import EvenkeelError
    from evenkeel.planning.bit_operations import bit_operations

    if report is None:
        return None
    call = parse_options(options.call)
    size = {k: call[k] for k in ("height", "width", "num_frames") if isinstance(call.get(k), int)}
    try:
        return bit_operations(options.pipeline, report, **size)
    except EvenkeelError:
        return None


def _counted(operations: Any) -> str:
    return "bit operations: not known here" if operations is None else str(operations)


def _run_budget(options: argparse.Namespace) -> None:
    from evenkeel.cli.sources import load_prompts
    from evenkeel.errors import EvenkeelError
    from evenkeel.fitting.bits.quantize_to_budget import WEIGHT_ONLY, quantize_to_budget
    from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
    from evenkeel.quantizers.saved.report import report_on

    if options.bits is not None:
        raise EvenkeelError(
            "--budget chooses the bits of weights: leave --bits out, and round inputs with "
            "--set activation_bits=8."
        )
    method = RoundToNearest.from_dict({**WEIGHT_ONLY.as_dict(), **parse_options(options.set)})
    pipeline, settings = _asked(options, True)
    module, report = quantize_to_budget(
        pipeline,
        options.budget,
        prompts=load_prompts(options.prompts, pipeline, options.count, options.seed),
        method=method,
        layout=options.layout,
        **settings,
    )
    operations = _operations(options, report_on(module))
    found = {"quantized": str(options.out), **report.as_dict()}
    say(
        options,
        found | {"bit_operations": operations and operations.as_dict()},
        f"{report.table()}\n\n{report.text()}\n{_counted(operations)}\n\n{options.out}",
    )


def _asked(options: argparse.Namespace, steps_needed: bool) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and what every way of quantizing it takes."""
    pipeline, settings = pipeline_and_settings(options, steps_needed)
    return pipeline, {
        **settings,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "out": options.out,
        "progress": not options.json,
    }


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``["rank=16", "rounding=gptq"]`` to keywords.

    Raises:
        EvenkeelError: not NAME=VALUE, or a value nested without end.

    """
    from evenkeel.cli.calling import read_value
    from evenkeel.errors import EvenkeelError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise EvenkeelError(f"--set {pair!r}: expected NAME=VALUE, for example rank=16.")
        found[key] = read_value(value)
    return found
