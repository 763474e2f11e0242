"""Train recovery adapters further: from the closed form, on the error of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from evenkeel.corrections.recovery_adapters import RecoveryAdapters
from evenkeel.errors import CalibrationError
from evenkeel.fitting.adapters.fit_adapters import fitted
from evenkeel.fitting.adapters.pairs import ENOUGH, part
from evenkeel.fitting.training.adapters_beside import AdaptersBeside
from evenkeel.fitting.training.held_out import HeldOut
from evenkeel.fitting.training.losses import Loss
from evenkeel.fitting.training.same_state import SameState
from evenkeel.fitting.training.step_weights import StepWeighted
from evenkeel.fitting.training.trainer import TrainingReport, stages_of, train
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.run import Run

Start = Literal["closed-form", "zero"]
Weighting = Literal["step-law", "even"]


def train_adapters(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    optimizer_steps: int = 1600,
    start: Start = "closed-form",
    weighting: Weighting = "step-law",
    closed_loop: bool = True,
    rate: float = 3e-3,
    budget: float | None = None,
    rank: int | None = None,
    bits: int | None = None,
    evaluations: int = 10,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 2,
    call: dict[str, Any] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> tuple[RecoveryAdapters, TrainingReport]:
    """Recovery adapters that gradient descent brought further than ``fit_adapters`` does.

    Layers, ranks and bytes are those of the closed form; the packed factors' values are trained with
    straight-through gradients on w_t || eps_hat - eps ||^2 after guidance, where w_t is the square of what
    step t's output moves in the final sample (the last row of the step law's trajectory weights), and eps is
    full precision at the same state. Ours; nothing is merged into a weight, so any backend's layers do whose
    inputs pass gradients on. The result is kept by final samples of (prompt, seed) pairs that are not trained
    on, and only where it is better than its start with 95 % confidence; else the start comes back.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: its quantized denoiser; not changed.
        prompts: texts, or class labels; from eight on the last quarter is held out, below that other noise.
        num_inference_steps: as deployed.
        optimizer_steps: one for each denoiser call of a training run.
        start: ``closed-form``, or ``zero``: adapters that add nothing, of the same layers and ranks.
        weighting: ``step-law``, or ``even``: w_t = 1.
        closed_loop: the runs go on with the trained denoiser's own output, so that it learns at the states
            that it will meet; False: with full precision.
        rate: of AdamW, relative to a factor's root mean square; falls to zero in a straight line.
        budget: see ``fit_adapters``.
        rank: see ``fit_adapters``.
        bits: see ``fit_adapters``.
        evaluations: how often the held-out error is measured.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of noise and of the order of prompts.
        batch_size: prompts of a training run.
        call: further arguments of the pipeline call.
        out: folder for the state of an interrupted training, which then goes on; None keeps nothing.
        progress: show a bar.

    Returns:
        The adapters, for ``evenkeel.apply`` and ``evenkeel.save``, and what held-out samples said.

    Raises:
        CalibrationError: nothing is quantized, an argument is out of range, or the closed form has no adapter
            to start from.
        QuantizationError: the loss is not finite.
        StorageError: the folder belongs to another training.

    """
    if start not in ("closed-form", "zero") or weighting not in ("step-law", "even"):
        raise CalibrationError(
            f"start is 'closed-form' or 'zero', weighting 'step-law' or 'even'; got {start!r} and "
            f"{weighting!r}."
        )
    run = Run(
        pipeline,
        prompts,
        num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        call=call,
        quantized=quantized,
    )
    closed = fitted(run, budget, rank=rank, bits=bits, progress=progress)
    if not closed.adapters.layers:
        raise CalibrationError(
            f"the closed form found no adapter that helps, so there is none to train. "
            f"{closed.report.text()}"
        )
    count = len(run.prompts)
    held = range(count - count // 4, count) if count >= ENOUGH else range(count)
    learning = part(run, list(range(held.start or count)), seed)
    learning.batch_size = batch_size
    source = SameState(learning, "student" if closed_loop else "full-precision")
    loss: Any = Loss()
    if weighting == "step-law":
        loss = StepWeighted(loss, run, source.levels, quantized)
    student = AdaptersBeside(quantized, closed.adapters.layers, zero=start == "zero")
    report = train(
        student,
        student.groups(rate),
        stages_of([source], optimizer_steps),
        loss,
        HeldOut(part(run, list(held), seed), student.finished()),
        weight_decay=0.0,
        evaluations=evaluations,
        folder=None if out is None else Path(out),
        identity={
            "start": start,
            "weighting": weighting,
            "rate": rate,
            "optimizer_steps": optimizer_steps,
            "adapters": closed.adapters.digest(),
            "trajectories": source.identity,
        },
        progress=progress,
    )
    if start == "zero" and not report.confirmed:
        return replace(closed.adapters, layers=()), report
    return replace(closed.adapters, layers=student.packed()), report
