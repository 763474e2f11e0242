"""Commands that measure and fit: calibrate, readout, refit, fold, inspect."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evenkeel.cli.options import (
    DTYPES,
    command,
    finite,
    loaded,
    not_negative,
    positive,
    sampling,
    say,
    several,
)
from evenkeel.cli.outputs import denoiser, output, readout, record


def _prompts(parser: argparse.ArgumentParser) -> None:
    """What every command that measures or fits takes."""
    several(parser)
    sampling(parser)
    parser.add_argument("--count", type=positive, help="use so many prompts (default: all, or 32)")


def _asked(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and what every measurement and fit is asked for."""
    from evenkeel.cli.sources import load_prompts

    pipeline, quantized, settings = loaded(options)
    return pipeline, {
        "quantized": quantized,
        "prompts": load_prompts(options.prompts, pipeline, options.count, options.seed),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "progress": not options.json,
        **settings,
    }


def add_calibrate(commands: Any) -> None:
    """``evenkeel calibrate``."""
    parser = command(
        commands,
        "calibrate",
        _run_calibrate,
        "Run full-precision and quantized denoiser on the same states and keep statistics.",
        example="calibrate zoo:flux-schnell --quantized w4a16-g32 --count 8 --out record.safetensors",
    )
    _prompts(parser)
    output(parser, record, default=Path("record.safetensors"), help="the record")
    parser.add_argument(
        "--trajectory", choices=("full-precision", "quantized", "noised"), default="full-precision"
    )
    parser.add_argument(
        "--closed-loop",
        action="store_true",
        help="also fit TAC, its input bias alone and StepbaQ, and keep them in the record",
    )
    parser.add_argument(
        "--closed-loop-forms",
        metavar="NAMES",
        help="fit these instead, comma-separated: tac:published, tac-unconditional:published, ...",
    )
    parser.add_argument(
        "--check",
        type=not_negative,
        default=32,
        metavar="N",
        help="prompts of the marginal check at the end; 0 leaves it out",
    )
    parser.add_argument("--no-histograms", action="store_true", help="smaller record, no trimming")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="keep finished batches here")


def _run_calibrate(options: argparse.Namespace) -> None:
    from evenkeel.fitting import calibrate
    from evenkeel.hosts.processes import processes
    from evenkeel.record.describe import describe, text
    from evenkeel.reports.verdicts import check_text

    pipeline, asked = _asked(options)
    if options.resume is not None:
        options.kept = f"finished batches are kept in {options.resume}; the same command continues"
    forms = options.closed_loop_forms
    record = calibrate(
        pipeline,
        trajectory=options.trajectory,
        histograms=not options.no_histograms,
        closed_loop=forms.split(",") if forms else options.closed_loop,
        resume=options.resume,
        **asked,
    )
    if not processes().main:
        return
    record.save(options.out)
    options.kept = f"the record is written, {options.out}; only the check of it is missing"
    description = describe(record)
    check = _checked(options, pipeline, record, asked) if options.check else None
    found = {"record": str(options.out), **description}
    parts = [text(description), *([] if check is None else [check_text(check)])]
    parts.append(f"record: {options.out} ({options.out.stat().st_size / 1e3:.0f} kB)")
    say(options, found | ({} if check is None else {"check": check.as_dict()}), "\n\n".join(parts))


def _checked(options: argparse.Namespace, pipeline: Any, record: Any, asked: dict[str, Any]) -> Any:
    """Every correction of the record on a few other prompts."""
    from dataclasses import replace

    from evenkeel.cli.sources import load_prompts
    from evenkeel.comparing.comparison import standard_arms
    from evenkeel.comparing.marginal_check import marginal_check
    from evenkeel.corrections import applicable

    made, reasons = record.corrections()
    found, others = applicable(made, record.law)
    settings = {k: v for k, v in asked.items() if k not in ("quantized", "prompts", "seed")}
    check = marginal_check(
        pipeline,
        standard_arms(pipeline, asked["quantized"], found),
        prompts=load_prompts(options.prompts, pipeline, options.check, options.seed + 2),
        **settings,
    )
    return replace(check, not_applicable={**reasons, **others, **check.not_applicable})


def add_readout(commands: Any) -> None:
    """``evenkeel readout``."""
    parser = command(
        commands,
        "readout",
        _run_readout,
        "Refit the output head of the quantized denoiser per step, in closed form.",
        example="readout zoo:flux-schnell --quantized w4a16-g32 --form shared --out readout.safetensors",
    )
    _prompts(parser)
    output(parser, readout, default=Path("readout.safetensors"), help="the file")
    parser.add_argument(
        "--form",
        choices=("per-step", "shared", "hierarchical"),
        default="per-step",
        help="shared: one change for all steps, which evenkeel fold can write into the checkpoint",
    )
    parser.add_argument("--head", help="name of the output layer, if it is not found by itself")


def _run_readout(options: argparse.Namespace) -> None:
    from evenkeel.fitting import fit_readout
    from evenkeel.hosts.processes import processes
    from evenkeel.record import save

    pipeline, asked = _asked(options)
    found = fit_readout(
        pipeline,
        form=options.form,
        head=options.head,
        **asked,
    )
    if not processes().main:
        return
    save(found, options.out)
    size = f"{options.out.stat().st_size / 1e6:.2f} MB"
    said = {"record": str(options.out), **found.description()}
    say(options, said, f"{found}\n\nreadout: {options.out} ({size})")


def add_refit(commands: Any) -> None:
    """``evenkeel refit``."""
    parser = command(
        commands,
        "refit",
        _run_refit,
        "Refit the low-rank branches, weight scales and biases of the quantized layers, in closed form.",
        example="refit zoo:flux-schnell --quantized w4a16-g32-r8 --count 8 --out refitted",
    )
    _prompts(parser)
    parser.add_argument(
        "--metric",
        choices=("output", "uniform", "local"),
        help="of recovery adapters, for layers with branches alone (default: each layer's own error)",
    )
    output(parser, denoiser, required=True, help="folder for the denoiser")


def _run_refit(options: argparse.Namespace) -> None:
    from evenkeel.cli.sources import save_denoiser
    from evenkeel.fitting import refit_branches
    from evenkeel.hosts.processes import processes

    pipeline, asked = _asked(options)
    refitted, report = refit_branches(pipeline, metric=options.metric, **asked)
    if not processes().main:
        return
    save_denoiser(refitted, options.out)
    found = {"quantized": str(options.out), **report.as_dict()}
    say(options, found, f"{report.text()}\n\nquantized denoiser: {options.out}")


def add_fold(commands: Any) -> None:
    """``evenkeel fold``."""
    parser = command(
        commands,
        "fold",
        _run_fold,
        "Write a readout of form shared into the quantized denoiser's own weights.",
        example="fold zoo:flux-schnell --quantized w4a16-g32 --record readout.safetensors --out new",
    )
    parser.add_argument("pipeline", help="as for evenkeel readout")
    parser.add_argument("--quantized", required=True, metavar="Q", help="as for evenkeel readout")
    parser.add_argument("--record", type=Path, required=True, help="from evenkeel readout")
    output(parser, denoiser, required=True, help="folder for the denoiser")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def _run_fold(options: argparse.Namespace) -> None:
    from evenkeel.cli.sources import load_denoiser, load_pipeline, save_denoiser
    from evenkeel.errors import Incompatible
    from evenkeel.hosts.actuators.head_switch import fold
    from evenkeel.hosts.pipeline.fingerprint import fingerprint
    from evenkeel.record import load_correction

    readout = load_correction("readout", options.record)
    quantized = load_denoiser(options.quantized, load_pipeline(options.pipeline, options.dtype))
    made_for, heads = readout.made_for, readout.heads
    assert made_for is not None and heads is not None  # a readout has both
    if fingerprint(quantized) != made_for.quantized:
        raise Incompatible(
            f"{options.record} was fitted for another quantized denoiser "
            f"({made_for.quantizer}, {made_for.quantized})."
        )
    fold(quantized, heads.table, heads.layer)
    save_denoiser(quantized, options.out)
    found = {"quantized": str(options.out), "head": heads.layer}
    say(options, found, f"quantized denoiser: {options.out}")


def add_recommend(commands: Any) -> None:
    """``evenkeel recommend``."""
    parser = command(
        commands,
        "recommend",
        _run_recommend,
        "Say from a record what will help, by how much, and how sure that is, before anything is made.",
        example="recommend record.safetensors",
    )
    parser.add_argument("record", type=Path)
    parser.add_argument(
        "--shared",
        type=finite,
        metavar="S",
        help="share of the state error that all prompts have in common, from the check of evenkeel calibrate",
    )


def _run_recommend(options: argparse.Namespace) -> None:
    from evenkeel.record import Record
    from evenkeel.reproduction.recommend import advice, advice_text

    found = advice(Record.load(options.record), options.shared)
    say(options, found, advice_text(found))


def add_inspect(commands: Any) -> None:
    """``evenkeel inspect``."""
    parser = command(
        commands,
        "inspect",
        _run_inspect,
        "Say what a record measured, and for what.",
        example="inspect record.safetensors",
    )
    parser.add_argument("record", type=Path)


def _run_inspect(options: argparse.Namespace) -> None:
    from evenkeel.record import Record, load
    from evenkeel.record.describe import describe, text

    found = load(options.record)
    if isinstance(found, Record):
        description = describe(found)
        say(options, description, text(description))
    else:
        say(options, found.description(), str(found.report))
