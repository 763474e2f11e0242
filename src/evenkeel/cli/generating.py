"""Commands that generate: demo, sample, compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evenkeel.cli.options import (
    command,
    correcting,
    corrections,
    loaded,
    positive,
    sampling,
    say,
    several,
)
from evenkeel.cli.outputs import comparison, demonstration, output, pictures, try_outputs


def add_demo(commands: Any) -> None:
    """``evenkeel demo``."""
    parser = command(
        commands,
        "demo",
        _run_demo,
        "Quantize the embedded pipeline, restore it, and show what that changed.",
        example="demo --images 8 --out demo",
    )
    parser.add_argument("--images", type=positive, default=256, help="per arm")
    parser.add_argument("--calibration-prompts", type=positive, default=32)
    parser.add_argument("--quantizer", default="w3a16-g32", help="specification")
    output(parser, demonstration, default=Path("evenkeel-demo"), help="folder for the results")


def _run_demo(options: argparse.Namespace) -> None:
    enough_images(options.images)
    if not options.json:
        print(_duration(options.images, options.calibration_prompts), flush=True)
    try_outputs(options)
    options.kept = (
        f"finished images are kept in {options.out / 'images'}; the same command continues"
    )
    from evenkeel.cli.demo import demo
    from evenkeel.threads import sensible_threads

    with sensible_threads(0):  # the embedded pipeline is small, from loading it to the report
        results = demo(
            images=options.images,
            calibration_prompts=options.calibration_prompts,
            quantizer=options.quantizer,
            out=options.out,
            progress=not options.json,
        )
    from evenkeel.reports import text_table

    say(options, results, f"{text_table(results)}\n\nreport: {options.out / 'report.html'}")


def enough_images(images: int | None) -> None:
    """Refuse so few that no distance between two sets of them exists.

    Raises:
        EvenkeelError: fewer than three.

    """
    from evenkeel.errors import EvenkeelError

    if images is not None and images < 3:
        raise EvenkeelError(
            f"{images} images are too few to measure a distance with its interval: expected at least 3, "
            f"better some hundred."
        )


def _duration(images: int, prompts: int) -> str:
    """What to expect; seconds of one core as benchmarks/README.md measured them."""
    minutes = max(1, round((15 + 1.3 * prompts + 0.4 * images) / 60))
    return (
        f"This takes about {minutes} minute{'s' * (minutes > 1)} and a processor core. Nothing is "
        f"downloaded."
    )


def add_sample(commands: Any) -> None:
    """``evenkeel sample``."""
    parser = command(
        commands,
        "sample",
        _run_sample,
        "Generate images, corrected or not.",
        example="sample zoo:flux-schnell --quantized w4a16-g32 --images 4 --out images",
    )
    several(parser)
    sampling(parser)
    correcting(parser)
    parser.add_argument(
        "--correction",
        default=None,
        help="by name, as evenkeel compare lists them: q-drift, dns, tac, readout...; none without",
    )
    parser.add_argument("--images", type=positive, help="how many prompts to use")
    output(parser, pictures, required=True, help="folder for PNG files")


def _run_sample(options: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from evenkeel.cli.pictures import write_pictures
    from evenkeel.cli.sources import load_prompts
    from evenkeel.comparing.generation import Arm, generate, remove_kept
    from evenkeel.errors import EvenkeelError
    from evenkeel.hosts.processes import processes
    from evenkeel.hosts.run import Run
    from evenkeel.metrics.inputs import black_rows, black_text

    if (options.correction is None) != (not options.record):
        raise EvenkeelError("--correction and --record belong together: give both, or neither.")
    chosen = None
    if options.correction is not None:
        chosen = corrections(options.record, [options.correction])[0][options.correction]
    pipeline, quantized, settings = loaded(options)
    prompts = load_prompts(options.prompts, pipeline, options.images, options.seed)
    arm = Arm("sample", quantized, chosen, tuple(options.allow))
    us, kept = processes(), options.out / "unfinished"
    options.kept = f"finished batches are kept in {kept}; the same command continues"
    with tqdm(desc="sample", unit="batch", disable=options.json or not us.main) as bar:
        run = Run(pipeline, prompts, seed=options.seed, batch_size=options.batch_size, **settings)
        images, seconds = generate(run, arm, kept, bar.update)
    if not us.main:
        return
    described = {"pipeline": options.pipeline, "quantized": options.quantized, **settings}
    files = write_pictures(options.out, images, prompts, described)
    remove_kept(kept)
    each, black = float(torch.tensor(seconds).mean()), black_rows(images)
    found = {"images": [str(f) for f in files], "seconds_per_image": each, "black": black}
    words = [f"{len(files)} images in {options.out}, {each:.3f} s each"]
    say(options, found, "\n".join(words + ([black_text(black, len(images))] if black else [])))


def add_compare(commands: Any) -> None:
    """``evenkeel compare``."""
    parser = command(
        commands,
        "compare",
        _run_compare,
        "Same prompts, same noise: full precision, quantized, and every correction, with intervals.",
        example="compare zoo:flux-schnell --quantized w4a16-g32 --record record.safetensors --images 4",
    )
    several(parser)
    sampling(parser)
    correcting(parser)
    parser.add_argument("--corrections", default="all", help="comma-separated, or all")
    parser.add_argument("--images", type=positive, help="prompts per arm (default: all, or 32)")
    parser.add_argument(
        "--more",
        action="store_true",
        help="spatial and kernel distances, class score, precision and recall, perceptual distance, shifts",
    )
    parser.add_argument(
        "--evaluator",
        action="append",
        metavar="KIND:PLACE",
        help="clip:FOLDER, dinov2:FOLDER, inception:FILE, inception-adm:FILE, torchscript:FILE, lpips:NET, "
        "imagereward:MODEL (repeatable; beside the twin's own, if it is one)",
    )
    output(parser, comparison, default=Path("evenkeel-compare"), help="folder")


def _run_compare(options: argparse.Namespace) -> None:
    from evenkeel.cli.sources import evaluator_for, load_prompts, references_for
    from evenkeel.comparing.comparison import compare, standard_arms
    from evenkeel.comparing.evaluators import evaluator_named
    from evenkeel.comparing.packaged_evaluators import Several
    from evenkeel.corrections import applicable
    from evenkeel.errors import EvenkeelError
    from evenkeel.hosts.processes import processes
    from evenkeel.hosts.run import Run
    from evenkeel.reports import text_table
    from evenkeel.reports.save import save_results

    if not options.record:
        raise EvenkeelError(
            "compare needs --record FILE, made by evenkeel calibrate or evenkeel readout."
        )
    if options.pipeline.startswith("zoo:"):  # others come without an evaluator
        enough_images(options.images)
    names = None if options.corrections == "all" else options.corrections.split(",")
    chosen, reasons, record = corrections(options.record, names)
    asked = [evaluator_named(text) for text in options.evaluator or ()]
    pipeline, quantized, settings = loaded(options)
    evaluator = evaluator_for(pipeline)
    if asked:
        evaluator = Several([*asked, evaluator])
    prompts = load_prompts(options.prompts, pipeline, options.images, options.seed + 1)
    law = Run(pipeline, prompts, **settings).law(quantized)
    chosen, others = applicable(chosen, law, allow_range="range" in options.allow)
    reasons |= others
    options.kept = (
        f"finished batches are kept in {options.out / 'images'}; the same command continues"
    )
    measured = compare(
        pipeline,
        standard_arms(pipeline, quantized, chosen, allow=tuple(options.allow)),
        prompts=prompts,
        seed=1_000_000 + options.seed,
        batch_size=options.batch_size,
        evaluator=evaluator,
        reference_images=references_for(pipeline, prompts, options.seed + 1),
        folder=options.out / "images",
        more=options.more,
        progress=not options.json,
        **settings,
    )
    if not processes().main:
        return
    described = {
        "pipeline": options.pipeline,
        "quantized": options.quantized,
        "scheduler": type(pipeline.scheduler).__name__,
        "record": ", ".join(str(path) for path in options.record),
        "images": len(prompts),
        "seed": options.seed,
        **settings,
    }
    results = save_results(
        options.out, measured, described, record, [*map(str, prompts)], not_applicable=reasons
    )
    say(options, results, text_table(results))
