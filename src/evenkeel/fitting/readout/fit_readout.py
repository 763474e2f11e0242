"""Fit a readout: all prompts advance together, and at every step the output head is refitted.

Each denoiser call of the quantized network pauses at its output head. When all prompts are there, the
normal equations of the step are solved, and every prompt goes on with the head that was fitted
*without* it: the states of later steps are those that new prompts will meet, and the error that is
left is an honest one. Only one step's sums are held. ``head_run`` runs it, ``strategies`` solves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from evenkeel.corrections.readout import FORMS, Readout
from evenkeel.errors import CalibrationError
from evenkeel.fitting.readout.head_run import HeadRun
from evenkeel.fitting.readout.strategies import Fixed, PerStep, Shared, Solved
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run


def fit_readout(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    form: str = "per-step",
    head: str | None = None,
    guided_rows: bool = True,
    side_by_side: bool = True,
    call: dict[str, Any] | None = None,
    layout: LatentLayout | None = None,
    feature_memory: float = 256e6,
    progress: bool = True,
) -> Readout:
    """Refit the output head of ``quantized`` per step, in closed form, on its corrected trajectory.

    Costs one run of both denoisers (two for the forms that need a shared change first). Prompt i
    starts from noise of seed ``seed + i``.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: the quantized denoiser; not changed.
        prompts: texts, or class labels; a few are enough, one works.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call; all calls advance together.
        form: ``per-step``, ``shared`` or ``hierarchical``, see ``Readout``.
        head: name of the output layer, where it is not found by itself.
        guided_rows: also count what the branches' combination at this guidance scale leaves, beside
            the branches themselves. Guidance amplifies their difference; the table stays valid at
            other scales.
        side_by_side: keep both denoisers where they are; False moves the idle one to the CPU.
        call: further arguments of the pipeline call.
        layout: where the latent's channels are; found by itself for known pipelines.
        feature_memory: bytes of head inputs kept while a step is solved; prompts beyond it run their
            quantized denoiser a second time.
        progress: show a bar.

    Returns:
        The readout; ``evenkeel.apply(pipe, readout)`` uses it, ``evenkeel.save(readout, path)`` keeps it.

    Raises:
        CalibrationError: no prompts, identical twins, non-finite outputs.
        UnsupportedPipeline: no output head that can be refitted.

    Example: see ``examples/readout.py``.

    """
    run = Run(
        pipeline,
        prompts,
        num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        call=call,
        quantized=quantized,
        layout=layout,
        side_by_side=side_by_side,
    )
    if form not in FORMS:
        raise CalibrationError(f"form must be one of {FORMS}, got {form!r}.")
    fit = HeadRun(run, head, feature_memory, guided_rows)
    us = processes()
    with us.telling(), torch.no_grad(), run.undisturbed(), fit.in_place():
        run.agreed("readout", form=form)
        solved: Solved = PerStep(fit)
        if form != "per-step":
            shared = Shared(fit)
            fit.go_through(shared, progress)
            prior = shared.solution()
            solved = Fixed(fit, prior) if form == "shared" else PerStep(fit, prior)
        passed = fit.go_through(solved, progress)
    made_for = run.provenance(passed.law, passed.first, correction=f"readout(form={form!r})")
    return solved.readout(form, made_for, passed.moments)
