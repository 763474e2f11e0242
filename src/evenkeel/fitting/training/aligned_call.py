"""What one optimizer step learns from: a call of the student, and what its output should be."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evenkeel.quantizers.workspace.calibration_set import DenoiserCall


@dataclass(frozen=True)
class AlignedCall:
    """One denoiser call of the student, and the full-precision output that it is aligned with.

    Teacher and student may stand at different states and timesteps: whoever makes these calls decides.
    The tensors are on the device of the pipeline.

    Attributes:
        student: arguments of the call as the pipeline makes it, with the timestep that is told; guidance
            branches stacked as the pipeline stacks them.
        target: (branches x rows, ...) what the prediction should be: all branches, before guidance
            combines them, in the student's order. Channels of a learned variance are left out.
        shares: of the branches in what the scheduler is handed: (1 - g, g) for classifier-free guidance
            of scale g where the unconditional branch comes first, (g, 1 - g) where it comes last (DiT);
            (1,) for a single branch.

    >>> call = AlignedCall(DenoiserCall((), {}), torch.tensor([[2.0], [1.0]]), (1.5, -0.5))
    >>> call.combined(call.target)
    tensor([[2.5000]])

    """

    student: DenoiserCall
    target: Tensor
    shares: tuple[float, ...] = (1.0,)

    def combined(self, prediction: Tensor) -> Tensor:
        """(branches x rows, ...) -> (rows, ...): branches added up with their shares."""
        if self.shares == (1.0,):
            return prediction
        parts = prediction.chunk(len(self.shares))
        return torch.stack([s * p for s, p in zip(self.shares, parts, strict=True)]).sum(0)

    def prediction(self, output: Tensor) -> Tensor:
        """What of a denoiser's output is compared with ``target``: without a learned variance."""
        return output[:, : self.target.shape[1]] if output.dim() > 2 else output


class Trajectories(Protocol):
    """Where aligned calls come from: runs of a pipeline, one per epoch."""

    @property
    def calls(self) -> int:
        """Aligned calls of one epoch, which are as many optimizer steps."""

    @property
    def levels(self) -> tuple[float, ...]:
        """Every timestep that students are told, in the denoiser's own unit, each once; midpoints too.

        Each gets scales of inputs of its own.
        """

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides about the calls, in types that JSON knows: a killed run must agree on it."""

    def epoch(self, index: int) -> Generator[AlignedCall, Tensor | None, None]:
        """The calls of one epoch, in order; they follow from the seed and ``index`` alone.

        Whoever trains ``send``s the student's output (detached, all channels, before the optimizer's step)
        back for each call, so that a run can go on from the state that the student leads to; a plain
        ``for`` sends None, and runs that the full-precision denoiser advances do not look at it.
        """


def calls_of(trajectories: Trajectories, epoch: int) -> Iterator[tuple[AlignedCall, list[Tensor]]]:
    """The calls of an epoch; whoever trains puts the student's output into the list beside each."""
    run = trajectories.epoch(epoch)
    try:
        call = next(run, None)
        while call is not None:
            answer: list[Tensor] = []
            yield call, answer
            try:
                call = run.send(answer[0] if answer else None)
            except StopIteration:
                call = None
    finally:
        run.close()
