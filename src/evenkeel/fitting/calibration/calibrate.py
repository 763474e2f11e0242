"""Calibrate: run the full-precision and the quantized denoiser side by side and keep statistics.

Both see the same states, after guidance and everything else the pipeline does, because the second
run is led through the states of the first (``hosts.tape``). Raw outputs are dropped as soon as their
moments are taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from evenkeel.corrections.base import Correction
from evenkeel.errors import CalibrationError
from evenkeel.fitting.calibration.batch import FULL_PRECISION, NOISED, SideBySide
from evenkeel.fitting.calibration.kept_batches import Parts
from evenkeel.fitting.closed_loop.forms import DEFAULT, fit_closed_loop, known_forms
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.record import Record
from evenkeel.record.closed_loop import ClosedLoop
from evenkeel.storage import alone


def calibrate(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    trajectory: str = "full-precision",
    correction: Correction | None = None,
    histograms: bool = True,
    closed_loop: bool | Sequence[str] = False,
    side_by_side: bool = True,
    call: dict[str, Any] | None = None,
    layout: LatentLayout | None = None,
    pilot: Record | None = None,
    noise_floor_limit: float = 0.05,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Record:
    """Measure the quantization error of ``quantized`` along ``pipeline``'s own trajectories.

    Prompt i starts from noise of seed ``seed + i``, whatever the batch size. Under torchrun the
    batches are shared between the processes and every process returns the whole record.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: the quantized denoiser, same call signature.
        prompts: texts, or class labels for class-conditional pipelines.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call.
        trajectory: whose outputs advance the sample: ``full-precision`` (as published),
            ``quantized``, or ``corrected`` (quantized with ``correction`` applied). ``noised``: no
            trajectory, but the full-precision results with fresh noise of every step's level (DCNC,
            Algorithm 1, whose x_0 are photographs); takes half as long again.
        correction: needed for, and only for, ``corrected``.
        histograms: also keep error histograms, for trimming.
        closed_loop: also fit what needs it and keep it in the record: True for TAC, its input bias alone
            and StepbaQ, or the names of ``fitting.closed_loop.forms.RULES`` that are wanted, such as
            ``["tac:published", "tac-ner"]``. Takes as long again for each, with both denoisers in memory.
        side_by_side: keep both denoisers where they are; False moves the idle one to the CPU.
        call: further arguments of the pipeline call, such as ``{"height": 512}``.
        layout: where the latent's channels are; found by itself for known pipelines.
        pilot: a record whose histogram frame to use, so that the two can be merged.
        noise_floor_limit: how much two runs of the same denoiser may differ, relative to the error.
        resume: a folder for finished batches. After a kill, the same call continues there and gives
            the bit-identical record; the folder is removed at the end.
        progress: show a bar.

    Returns:
        The record; save it with ``record.save(path)``.

    Raises:
        CalibrationError: no prompts, identical twins, non-finite outputs, outputs of another shape,
            a pipeline that is not repeatable.
        StorageError: the resume folder is of another calibration, damaged, or another process's now.
        UnsupportedPipeline, UnsupportedSampler: see there.

    Example: see ``examples/three_lines.py``.

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
    _check_trajectory(trajectory, correction)
    forms = known_forms(DEFAULT if closed_loop is True else closed_loop or ())
    if forms and (correction is not None or not side_by_side):
        raise CalibrationError(
            "closed_loop= fits corrections of the plain quantized model with both denoisers in "
            "memory; it takes neither correction= nor side_by_side=False. Use fit_tac or fit_stepbaq."
        )
    us = processes()
    # Of several processes one holds the folder for all of them.
    held = nullcontext() if resume is None or not us.main else alone(resume)
    with us.telling(), held:
        parts = Parts.of(run, resume, us.count, trajectory, correction, histograms)
        pairs = SideBySide(run, trajectory, correction, histograms)
        batches = run.batches()
        frame = pilot.frame if pilot is not None else None
        mine = [0, *(i for i in range(1, len(batches)) if i % us.count == us.rank)]
        if not us.main:
            us.barrier()  # the first batch makes the frame that all histograms share
            mine = mine[1:]
        hidden = not (progress and us.main)
        for index in tqdm(mine, desc="calibrate", unit="batch", disable=hidden):
            us.check()
            if not parts.has(index):
                if frame is None and index != 0:
                    frame = parts.frame()
                part = pairs.record(batches[index], frame)
                if index == 0:
                    part = pairs.with_noise_floor(part, batches[index], noise_floor_limit)
                parts.put(index, part)
            if index == 0:
                us.barrier()
        us.barrier()
        record = parts.merged(len(batches))
        us.barrier()
        if us.main:
            parts.tidy()
    if forms:
        measured = ClosedLoop(fit_closed_loop(run, forms, progress=progress))
        record = replace(record, closed_loop=measured)
    return record


TRAJECTORIES = (FULL_PRECISION, "quantized", "corrected", NOISED)


def _check_trajectory(trajectory: str, correction: Correction | None) -> None:
    if trajectory not in TRAJECTORIES:
        raise CalibrationError(f"trajectory must be one of {TRAJECTORIES}, got {trajectory!r}.")
    if (trajectory == "corrected") != (correction is not None):
        raise CalibrationError(
            f"trajectory={trajectory!r} with correction={correction!r}: pass a correction for, and "
            f"only for, trajectory='corrected'."
        )
