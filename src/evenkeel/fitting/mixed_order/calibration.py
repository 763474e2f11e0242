"""Mixed-order pairs for block reconstruction: calls of the student, and of its teacher."""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

from evenkeel.fitting.mixed_order.evaluations import mixed_order_runs
from evenkeel.hosts.run import Run
from evenkeel.quantizers.workspace.alignment import MixedOrder
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, kept


def mixed_order_set(
    run: Run, alignment: MixedOrder, calibration_steps: int, *, progress: bool = True
) -> CalibrationSet:
    """Calls of the student and of the teacher from the same noise, intervals evenly spaced.

    Every batch of the run samples twice in full precision, once per order (SA-PTQ's Algorithm 1).

    Args:
        run: pipeline, prompts, guidance, and the number of steps as ``alignment`` counts them.
        alignment: who learns from whom.
        calibration_steps: intervals kept of every batch; all of them where there are fewer.
        progress: show a bar.

    Returns:
        With ``teachers``; without where both stand at the same state.

    Raises:
        QuantizationError: an odd number of evaluations, or a call that holds NaN.
        CalibrationError: the orders do not cut time into the same intervals.

    """
    intervals = alignment.intervals(run.num_inference_steps)
    students: list[Any] = []
    teachers: list[Any] = []
    with run.undisturbed():
        bar = tqdm(run.batches(), desc="calibration pairs", disable=not progress, leave=False)
        for turn, batch in enumerate(bar):
            runs = mixed_order_runs(run, batch, intervals)
            pairs = alignment.paired(runs.first, runs.middle, turn)
            count = min(calibration_steps, len(pairs))
            for place in torch.linspace(0, len(pairs) - 1, count).round().long().tolist():
                for side, evaluation in zip((students, teachers), pairs[place], strict=True):
                    side += [(c.arguments, c.keywords) for c in evaluation.calls]
    calls = kept(students).calls
    same = alignment.teacher == "same-state"
    return CalibrationSet(calls, () if same else kept(teachers).calls)
