"""The command ``evenkeel``: parse, call one function, print. Nothing heavy is imported for --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
_PIPELINE = "zoo:NAME, a local diffusers folder, or a hub id"
_QUANTIZED = "quantizer specification (w3a4-g32-r16), folder, or hub id of the quantized denoiser"
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for an error of the user's, 130 for Ctrl-C."""
    options = build_parser().parse_args(argv)
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        print("interrupted; finished batches are kept where a folder was given", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_ERROR
    except Exception as e:
        from evenkeel.errors import EvenkeelError

        if not isinstance(e, (EvenkeelError, OSError)):
            raise
        print(f"evenkeel {options.command}: {e}", file=sys.stderr)
        return EXIT_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from evenkeel import __version__

    parser = argparse.ArgumentParser(
        prog="evenkeel",
        description="Quantized diffusion models that sample as if they had never been quantized.",
    )
    parser.add_argument("--version", action="version", version=f"evenkeel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _demo(commands)
    _calibrate(commands)
    _inspect(commands)
    _sample(commands)
    _compare(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, nothing else"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def _sampling(parser: argparse.ArgumentParser) -> None:
    """What every command that samples takes."""
    parser.add_argument("pipeline", help=_PIPELINE)
    parser.add_argument("--quantized", required=True, metavar="Q", help=_QUANTIZED)
    parser.add_argument("--prompts", metavar="FILE", help="one prompt per line, - for stdin")
    parser.add_argument("--steps", type=_positive, help="number of inference steps")
    parser.add_argument(
        "--guidance-scale", type=float, help="default: the twin's or the pipeline's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's noise")
    parser.add_argument("--batch-size", type=_positive, default=8)
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--device", help="where to run, for example cuda; default: the CPU")
    parser.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="further pipeline argument",
    )


def _demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _run_demo,
        "Quantize the embedded pipeline, calibrate, correct with Q-Drift, and show what it changed.",
    )
    parser.add_argument("--images", type=_positive, default=512, help="per arm")
    parser.add_argument("--calibration-prompts", type=_positive, default=32)
    parser.add_argument("--quantizer", default="w3a4-g32-r16", help="specification")
    parser.add_argument(
        "--out", type=Path, default=Path("evenkeel-demo"), help="folder for the results"
    )


def _run_demo(options: argparse.Namespace) -> None:
    from evenkeel.demo import demo

    results = demo(
        images=options.images,
        calibration_prompts=options.calibration_prompts,
        quantizer=options.quantizer,
        out=options.out,
        progress=not options.json,
    )
    if options.json:
        print(json.dumps(results))
        return
    from evenkeel.reports import text_table

    print(text_table(results))
    print(f"\nreport: {options.out / 'report.html'}")


def _calibrate(commands: Any) -> None:
    parser = _command(
        commands,
        "calibrate",
        _run_calibrate,
        "Run full-precision and quantized denoiser on the same states and keep statistics.",
    )
    _sampling(parser)
    parser.add_argument("--count", type=_positive, help="use so many prompts (default: all, or 32)")
    parser.add_argument("--out", type=Path, default=Path("record.safetensors"), help="the record")
    parser.add_argument(
        "--trajectory", choices=("full-precision", "quantized"), default="full-precision"
    )
    parser.add_argument("--no-histograms", action="store_true", help="smaller record, no trimming")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="keep finished batches here")


def _run_calibrate(options: argparse.Namespace) -> None:
    from evenkeel.calibration import calibrate
    from evenkeel.inspection import describe, text
    from evenkeel.sources import load_prompts

    pipeline, quantized, settings = _loaded(options)
    prompts = load_prompts(options.prompts, pipeline, options.count, options.seed)
    record = calibrate(
        pipeline,
        quantized=quantized,
        prompts=prompts,
        seed=options.seed,
        batch_size=options.batch_size,
        trajectory=options.trajectory,
        histograms=not options.no_histograms,
        resume=options.resume,
        progress=not options.json,
        **settings,
    )
    record.save(options.out)
    description = describe(record)
    if options.json:
        print(json.dumps({"record": str(options.out), **description}))
    else:
        print(text(description))
        print(f"\nrecord: {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


def _inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", _run_inspect, "Say what a record measured, and for what."
    )
    parser.add_argument("record", type=Path)


def _run_inspect(options: argparse.Namespace) -> None:
    from evenkeel.inspection import describe, text
    from evenkeel.record import Record

    description = describe(Record.load(options.record))
    print(json.dumps(description) if options.json else text(description))


def _correcting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=Path, help="from evenkeel calibrate")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("denoiser", "scheduler", "guidance", "range"),
        help="accept this mismatch with the record",
    )


def _sample(commands: Any) -> None:
    parser = _command(commands, "sample", _run_sample, "Generate images, corrected or not.")
    _sampling(parser)
    _correcting(parser)
    parser.add_argument("--correction", default=None, help="q-drift, exact-drift; none without")
    parser.add_argument("--images", type=_positive, help="how many prompts to use")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNG files")


def _run_sample(options: argparse.Namespace) -> None:
    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from evenkeel.errors import EvenkeelError
    from evenkeel.generation import Arm, generate
    from evenkeel.record import Record
    from evenkeel.sources import load_prompts

    if (options.correction is None) != (options.record is None):
        raise EvenkeelError("--correction and --record belong together: give both, or neither.")
    pipeline, quantized, settings = _loaded(options)
    prompts = load_prompts(options.prompts, pipeline, options.images, options.seed)
    chosen = None
    if options.correction is not None:
        chosen = _corrections(Record.load(options.record), [options.correction])[0]
    arm = Arm("sample", quantized, chosen, tuple(options.allow))
    with tqdm(desc="sample", unit="batch", disable=options.json) as bar:
        images, seconds = generate(
            pipeline, arm, prompts, options.seed, options.batch_size, settings, None, bar.update
        )
    options.out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, image in enumerate(images):
        files.append(options.out / f"{i:05d}.png")
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(files[-1])
    (options.out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    each = float(torch.tensor(seconds).mean())
    if options.json:
        print(json.dumps({"images": [str(f) for f in files], "seconds_per_image": each}))
    else:
        print(f"{len(files)} images in {options.out}, {each:.3f} s each")


def _compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        _run_compare,
        "Same prompts, same noise: full precision, quantized, and every correction, with intervals.",
    )
    _sampling(parser)
    _correcting(parser)
    parser.add_argument("--corrections", default="q-drift", help="comma-separated, or all")
    parser.add_argument("--images", type=_positive, help="prompts per arm (default: all, or 32)")
    parser.add_argument("--out", type=Path, default=Path("evenkeel-compare"), help="folder")


def _run_compare(options: argparse.Namespace) -> None:
    from evenkeel.comparison import compare, standard_arms
    from evenkeel.corrections import ALL
    from evenkeel.errors import EvenkeelError
    from evenkeel.record import Record
    from evenkeel.reports import text_table
    from evenkeel.results import save_results
    from evenkeel.sources import evaluator_for, load_prompts, references_for

    if options.record is None:
        raise EvenkeelError("compare needs --record FILE, made by evenkeel calibrate.")
    names = list(ALL) if options.corrections == "all" else options.corrections.split(",")
    record = Record.load(options.record)
    corrections = _corrections(record, names)
    pipeline, quantized, settings = _loaded(options)
    prompts = load_prompts(options.prompts, pipeline, options.images, options.seed + 1)
    comparison = compare(
        pipeline,
        standard_arms(pipeline, quantized, corrections, allow=tuple(options.allow)),
        prompts=prompts,
        seed=1_000_000 + options.seed,
        batch_size=options.batch_size,
        evaluator=evaluator_for(pipeline),
        reference_images=references_for(pipeline, prompts, options.seed + 1),
        folder=options.out / "images",
        progress=not options.json,
        **settings,
    )
    described = {
        "pipeline": options.pipeline,
        "quantized": options.quantized,
        "record": str(options.record),
        "images": len(prompts),
        "seed": options.seed,
        **settings,
    }
    results = save_results(options.out, comparison, described, record, prompts)
    print(json.dumps(results) if options.json else text_table(results))


def _corrections(record: Any, names: list[str]) -> list[Any]:
    from evenkeel.corrections import ALL
    from evenkeel.errors import EvenkeelError

    unknown = [n for n in names if n not in ALL]
    if unknown:
        raise EvenkeelError(
            f"no correction called {', '.join(unknown)}; there is {', '.join(ALL)}."
        )
    return [ALL[n](record.evidence) for n in names]


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Pipeline, quantized denoiser, and the sampling settings with the twin's defaults filled in."""
    from evenkeel import zoo
    from evenkeel.errors import EvenkeelError
    from evenkeel.sources import load_denoiser, load_pipeline, parse_call

    steps, guidance = options.steps, options.guidance_scale
    if options.pipeline.startswith("zoo:"):
        twin = zoo.twin(options.pipeline[4:])
        steps = steps or twin.num_inference_steps
        guidance = twin.guidance_scale if guidance is None else guidance
    if steps is None:
        raise EvenkeelError("pass --steps, the number of inference steps you deploy with.")
    pipeline = load_pipeline(options.pipeline, options.dtype)
    quantized = load_denoiser(options.quantized, pipeline)
    if options.device:
        pipeline.to(options.device)
        quantized.to(options.device)
    settings = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "call": parse_call(options.call, pipeline),
    }
    return pipeline, quantized, settings


if __name__ == "__main__":
    sys.exit(main())
