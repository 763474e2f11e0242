"""Commands that generate: demo, sample, compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from evenkeel.cli.options import (
    command,
    correcting,
    corrections,
    loaded,
    positive,
    sampling,
    several,
)


def add_demo(commands: Any) -> None:
    """``evenkeel demo``."""
    parser = command(
        commands,
        "demo",
        _run_demo,
        "Quantize the embedded pipeline, restore it, and show what that changed.",
    )
    parser.add_argument("--images", type=positive, default=256, help="per arm")
    parser.add_argument("--calibration-prompts", type=positive, default=32)
    parser.add_argument("--quantizer", default="w3a16-g32", help="specification")
    parser.add_argument(
        "--out", type=Path, default=Path("evenkeel-demo"), help="folder for the results"
    )


def _run_demo(options: argparse.Namespace) -> None:
    if not options.json:
        print(_duration(options.images, options.calibration_prompts), flush=True)
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
    if options.json:
        print(json.dumps(results))
        return
    from evenkeel.reports import text_table

    print(text_table(results))
    print(f"\nreport: {options.out / 'report.html'}")


def _duration(images: int, prompts: int) -> str:
    """What to expect; seconds of one core as benchmarks/README.md measured them."""
    minutes = max(1, round((15 + 1.3 * prompts + 0.4 * images) / 60))
    return (
        f"This takes about {minutes} minute{'s' * (minutes > 1)} and a processor core. Nothing is "
        f"downloaded."
    )


def add_sample(commands: Any) -> None:
    """``evenkeel sample``."""
    parser = command(commands, "sample", _run_sample, "Generate images, corrected or not.")
    several(parser)
    sampling(parser)
    correcting(parser)
    parser.add_argument(
        "--correction",
        default=None,
        help="by name, as evenkeel compare lists them: q-drift, dns, tac, readout...; none without",
    )
    parser.add_argument("--images", type=positive, help="how many prompts to use")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNG files")


def _run_sample(options: argparse.Namespace) -> None:
    from functools import partial

    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from evenkeel.cli.sources import load_prompts
    from evenkeel.comparing.generation import Arm, generate
    from evenkeel.errors import EvenkeelError
    from evenkeel.hosts.processes import processes
    from evenkeel.hosts.run import Run
    from evenkeel.storage import write_atomically

    if (options.correction is None) != (not options.record):
        raise EvenkeelError("--correction and --record belong together: give both, or neither.")
    pipeline, quantized, settings = loaded(options)
    prompts = load_prompts(options.prompts, pipeline, options.images, options.seed)
    chosen = None
    if options.correction is not None:
        chosen = corrections(options.record, [options.correction])[0][options.correction]
    arm = Arm("sample", quantized, chosen, tuple(options.allow))
    us = processes()
    with tqdm(desc="sample", unit="batch", disable=options.json or not us.main) as bar:
        run = Run(pipeline, prompts, seed=options.seed, batch_size=options.batch_size, **settings)
        images, seconds = generate(run, arm, on_batch=bar.update)
    if not us.main:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, image in enumerate(images):
        files.append(options.out / f"{i:05d}.png")
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        write_atomically(files[-1], partial(picture.save, format="PNG"))
    write_atomically(options.out / "prompts.txt", "\n".join(map(str, prompts)) + "\n")
    each = float(torch.tensor(seconds).mean())
    if options.json:
        print(json.dumps({"images": [str(f) for f in files], "seconds_per_image": each}))
    else:
        print(f"{len(files)} images in {options.out}, {each:.3f} s each")


def add_compare(commands: Any) -> None:
    """``evenkeel compare``."""
    parser = command(
        commands,
        "compare",
        _run_compare,
        "Same prompts, same noise: full precision, quantized, and every correction, with intervals.",
    )
    several(parser)
    sampling(parser)
    correcting(parser)
    parser.add_argument("--corrections", default="all", help="comma-separated, or all")
    parser.add_argument("--images", type=positive, help="prompts per arm (default: all, or 32)")
    parser.add_argument("--out", type=Path, default=Path("evenkeel-compare"), help="folder")


def _run_compare(options: argparse.Namespace) -> None:
    from evenkeel.cli.sources import evaluator_for, load_prompts, references_for
    from evenkeel.comparing.comparison import compare, standard_arms
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
    names = None if options.corrections == "all" else options.corrections.split(",")
    chosen, reasons, record = corrections(options.record, names)
    pipeline, quantized, settings = loaded(options)
    prompts = load_prompts(options.prompts, pipeline, options.images, options.seed + 1)
    law = Run(pipeline, prompts, **settings).law(quantized)
    chosen, others = applicable(chosen, law, allow_range="range" in options.allow)
    reasons |= others
    comparison = compare(
        pipeline,
        standard_arms(pipeline, quantized, chosen, allow=tuple(options.allow)),
        prompts=prompts,
        seed=1_000_000 + options.seed,
        batch_size=options.batch_size,
        evaluator=evaluator_for(pipeline),
        reference_images=references_for(pipeline, prompts, options.seed + 1),
        folder=options.out / "images",
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
        options.out, comparison, described, record, [*map(str, prompts)], not_applicable=reasons
    )
    print(json.dumps(results) if options.json else text_table(results))
