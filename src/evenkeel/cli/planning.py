"""The command that loads no weights: plan."""

from __future__ import annotations

import argparse
from typing import Any

from evenkeel.cli.options import DTYPES, PIPELINE, command, finite, positive, say, steps


def add_plan(commands: Any) -> None:
    """``evenkeel plan``."""
    parser = command(
        commands,
        "plan",
        _run_plan,
        "Say what every job will take in memory, denoiser calls and files, from configurations alone.",
        example="plan zoo:flux-schnell --quantized w4a16-g32",
    )
    parser.add_argument(
        "pipeline",
        nargs="?",
        default="zoo:pixart-sigma",
        help=f"{PIPELINE} whose configurations are in the cache (default: zoo:pixart-sigma)",
    )
    parser.add_argument(
        "--quantized",
        required=True,
        metavar="Q",
        help="quantizer specification (w4a16-g64), or a backend's format (nf4, int8, q4_k, nvfp4...)",
    )
    parser.add_argument("--steps", "--num-inference-steps", type=steps, help="of a run")
    parser.add_argument("--guidance-scale", type=finite, help="default: the pipeline's")
    parser.add_argument("--height", type=positive, help="in pixels")
    parser.add_argument("--width", type=positive, help="in pixels")
    parser.add_argument("--frames", type=positive, help="of a video")
    parser.add_argument("--count", "--prompts", type=positive, default=32, help="how many prompts")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--arms", type=positive, default=3, help="of a comparison")
    parser.add_argument(
        "--processes", type=positive, default=1, help="that share the prompts, a device each"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")


def _run_plan(options: argparse.Namespace) -> None:
    from evenkeel.planning.plan import plan

    found = plan(
        options.pipeline,
        quantized=options.quantized,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        height=options.height,
        width=options.width,
        num_frames=options.frames,
        prompts=options.count,
        batch_size=options.batch_size,
        arms=options.arms,
        dtype=options.dtype,
        processes=options.processes,
    )
    say(options, found.as_dict(), found.text())
