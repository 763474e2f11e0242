"""Mixed-order pairs for training: every epoch new noise, every pair one call of the student."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evenkeel.fitting.mixed_order.evaluations import (
    Evaluation,
    MixedOrderRuns,
    mixed_order_runs,
)
from evenkeel.fitting.training.aligned_call import AlignedCall
from evenkeel.fitting.training.same_state import drawn_batch, told_time
from evenkeel.hosts.pipeline.denoiser_calls import guidance_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers.workspace.alignment import MixedOrder
from evenkeel.quantizers.workspace.calibration_set import DenoiserCall


@dataclass(frozen=True)
class MixedOrderTrajectories:
    """``Trajectories`` of SA-QLoRA: both orders run in full precision, and nothing else advances them.

    Every epoch is one batch from noise of its own; its pairs come in the order of sampling.

    Args:
        run: pipeline, prompts to draw from, guidance; the number of steps as ``alignment`` counts them.
        alignment: who learns from whom.

    Raises:
        QuantizationError: an odd number of evaluations.

    """

    run: Run
    alignment: MixedOrder = field(default_factory=MixedOrder)

    def __post_init__(self) -> None:
        _ = self._intervals

    @property
    def _intervals(self) -> int:
        return self.alignment.intervals(self.run.num_inference_steps)

    @property
    def calls(self) -> int:
        """Aligned calls of one epoch."""
        return sum(len(e.calls) for e in self._probe.middle)

    @property
    def levels(self) -> tuple[float, ...]:
        """Every timestep that students are told, in the order of sampling; midpoints too."""
        runs = self._probe
        turns = [self.alignment.paired(runs.first, runs.middle, turn) for turn in range(2)]
        calls = [c for pairs in turns for student, _ in pairs for c in student.calls]
        found = dict.fromkeys(
            told_time(self.run.denoiser, call.arguments, call.keywords) for call in calls
        )
        return tuple(sorted(found, reverse=True))

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides about the calls."""
        run = self.run
        return {
            **run.identity,
            "trajectories": "mixed-order",
            **self.alignment.as_dict(),
            "seed": run.seed,
            "batch_size": run.batch_size,
            "prompts": run.prompts.texts,
            "denoiser": run.fingerprint(run.denoiser),
        }

    def epoch(self, index: int) -> Generator[AlignedCall, Tensor | None, None]:
        """The calls of one batch; what is sent back is not looked at."""
        runs = self._runs(index)
        for student, teacher in self.alignment.paired(runs.first, runs.middle, index):
            shares = self._shares if len(student.calls) == 1 else (1.0,)
            for mine, theirs in zip(student.calls, teacher.calls, strict=True):
                call = DenoiserCall(mine.arguments, mine.keywords)
                yield AlignedCall(call, _plain(theirs.output, theirs.sample), shares)

    def _runs(self, index: int | None) -> MixedOrderRuns:
        run = self.run
        batch = run.batches()[0].alone if index is None else drawn_batch(run, index)
        with run.undisturbed():
            return mixed_order_runs(run, batch, self._intervals)

    @cached_property
    def _probe(self) -> MixedOrderRuns:
        """One prompt: what is the same in all epochs can be read off it."""
        return self._runs(None)

    @cached_property
    def _shares(self) -> tuple[float, ...]:
        """Of the guidance branches; pure noise tells little about them, so the median does."""
        found = torch.stack([_guidance(e) for e in self._probe.middle]).median(0).values
        return tuple(round(s, 6) for s in found.tolist())


def trajectories(
    run: Run, alignment: MixedOrder, steps: Sequence[int]
) -> list[MixedOrderTrajectories]:
    """One for each number of steps, from which a training is led through them one after another."""
    made = []
    for count in steps:
        shown = copy.copy(run)
        shown.num_inference_steps = count
        made.append(MixedOrderTrajectories(shown, alignment))
    return made


def _guidance(evaluation: Evaluation) -> Tensor:
    return guidance_of([evaluation.calls[0].output], evaluation.output)[1]


def _plain(output: Tensor, sample: Tensor) -> Tensor:
    """The prediction without a learned variance."""
    learned = output.dim() > 2 and output.shape[1] == 2 * sample.shape[1]
    return output[:, : sample.shape[1]] if learned else output
