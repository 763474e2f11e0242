"""The command that quantizes: quantize."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from evenkeel.cli.options import (
    DTYPES,
    PIPELINE,
    command,
    positive,
    sampling_of,
    scheduler,
    threads_for,
)


def add_quantize(commands: Any) -> None:
    """``evenkeel quantize``."""
    parser = command(
        commands,
        "quantize",
        _run_quantize,
        "Quantize a pipeline's denoiser with a method of the literature (simulated, reference quality).",
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
    parser.add_argument("--out", type=Path, required=True, help="folder for the denoiser")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt per line, - for stdin")
    parser.add_argument("--count", type=positive, help="use so many prompts (default: all, or 32)")
    parser.add_argument("--steps", type=positive, help="number of inference steps of the pipeline")
    parser.add_argument(
        "--guidance-scale", type=float, help="default: the twin's or the pipeline's"
    )
    parser.add_argument(
        "--calibration-steps",
        type=positive,
        default=8,
        help="denoiser calls to keep of every run (default 8)",
    )
    scheduler(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's noise")
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
    from evenkeel.fitting.quantize import quantize
    from evenkeel.quantizers.methods.catalogue import method_named

    if options.layout is not None:
        raise QuantizationError("--layout goes with --budget.")
    kind = method_named(options.method)
    chosen = parse_options(options.set)
    method = kind.of_bits(options.bits, **chosen) if options.bits else kind.from_dict(chosen)
    pipeline, settings = _asked(options)
    prompts = []
    if method.calibrated:
        prompts = load_prompts(options.prompts, pipeline, options.count, options.seed)
    _, report = quantize(
        pipeline,
        method,
        prompts=prompts,
        calibration_steps=options.calibration_steps,
        **settings,
    )
    if options.json:
        print(json.dumps({"quantized": str(options.out), **report.as_dict()}))
    else:
        print(f"{report.table()}\n\n{report}\n\nquantized denoiser: {options.out}")


def _run_budget(options: argparse.Namespace) -> None:
    from evenkeel.cli.sources import load_prompts
    from evenkeel.errors import EvenkeelError
    from evenkeel.fitting.bits.quantize_to_budget import WEIGHT_ONLY, quantize_to_budget
    from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest

    if options.bits is not None:
        raise EvenkeelError(
            "--budget chooses the bits of weights: leave --bits out, and round inputs with "
            "--set activation_bits=8."
        )
    method = RoundToNearest.from_dict({**WEIGHT_ONLY.as_dict(), **parse_options(options.set)})
    if sampling_of(options)[0] is None:
        raise EvenkeelError("pass --steps, the number of inference steps you deploy with.")
    pipeline, settings = _asked(options)
    _, report = quantize_to_budget(
        pipeline,
        options.budget,
        prompts=load_prompts(options.prompts, pipeline, options.count, options.seed),
        method=method,
        layout=options.layout,
        **settings,
    )
    if options.json:
        print(json.dumps({"quantized": str(options.out), **report.as_dict()}))
    else:
        print(f"{report.table()}\n\n{report.text()}\n\n{options.out}")


def _asked(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and what every way of quantizing it takes."""
    from evenkeel.cli.sources import load_pipeline, parse_call

    pipeline = load_pipeline(options.pipeline, options.dtype, options.scheduler)
    threads_for(options, pipeline)
    if options.device:
        pipeline.to(options.device)
    steps, guidance = sampling_of(options)
    settings = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "call": parse_call(options.call, pipeline),
        "out": options.out,
        "progress": not options.json,
    }
    return pipeline, settings


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``["rank=16", "rounding=gptq"]`` to keywords.

    Raises:
        EvenkeelError: not NAME=VALUE.

    """
    from evenkeel.errors import EvenkeelError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise EvenkeelError(f"--set {pair!r}: expected NAME=VALUE, for example rank=16.")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
