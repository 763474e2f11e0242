"""One pipeline call of the quantized denoiser that pauses at the output head, and sees its own steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.fitting.lockstep.call import Call
from evenkeel.hosts.pipeline.denoiser_calls import finite, one_per_prompt, pending_shares
from evenkeel.hosts.run import Batch, Run
from evenkeel.statistics.exact import Pending, settled, working
from evenkeel.statistics.moments import PairedMoments

STEPPED = "stepped"


@dataclass
class Answer:
    """What one denoiser call of a step gave: full-precision and (corrected) quantized output."""

    expected: Tensor
    given: Tensor


class HeadCall(Call):
    """Knows how guidance combines its branches at every scheduler step, and what error is left.

    Attributes:
        step: scheduler steps taken.
        answers: of the denoiser calls since the last step.
        shares: coefficients with which the step combined the branches; None if it did not do so
            linearly.
        moments: one per step, leading shape (prompts, 1, channels); None once a step was not linear.
        waiting: what the steps so far left on the device, for ``bring``.
        features, targets, expected_rows: of the denoiser call that is paused at its head.
        solution: what it goes on with; None: not yet known.

    """

    def __init__(
        self, run: Run, batch: Batch, denoiser: nn.Module, *, one_step: bool = False
    ) -> None:
        super().__init__(run, batch, denoiser, reads_law=batch.first == run.share()[0].first)
        self._one_step = one_step  # pauses with STEPPED after it
        self._run = run
        self.step = 0
        self.answers: list[Answer] = []
        self.shares: Tensor | None = None
        self.moments: list[PairedMoments] | None = []
        self.waiting: list[Pending[None]] = []
        self.clear()

    def clear(self) -> None:
        """Forget the current denoiser call."""
        self.features: Tensor | None = None
        self.targets: Tensor | None = None
        self.expected_rows: Tensor | None = None
        self.solution: Any = None

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Take the step's shares and moments; they wait on the device until all calls have stopped."""
        super().before(scheduler, timestep, output, sample, kwargs)
        output = one_per_prompt(output, len(self.batch))
        sample = sample[: len(self.batch)]
        self.waiting.append(finite(output, "quantized", self.step))
        given = self.branches([a.given for a in self.answers], output)
        expected = self.branches([a.expected for a in self.answers], output)
        self.answers = []
        if not given:
            self.shares = self.moments = None
            return
        shares = pending_shares(given, output)

        def known(*sums: Tensor) -> None:
            self.shares = shares.finish(*sums)
            if self.shares is None:
                self.moments = None
            elif self.moments is not None:
                self.waiting.append(self._pending(self.shares, expected, output, sample))

        self.waiting.append(Pending(shares.tensors, known))

    def _pending(
        self, shares: Tensor, expected: list[Tensor], output: Tensor, sample: Tensor
    ) -> Pending[None]:
        """The step's moments."""
        parts = zip(shares.tolist(), (working(b.to(output.device)) for b in expected), strict=True)
        e = torch.stack([share * branch for share, branch in parts]).sum(0)
        channels = self._run.layout(sample).as_channels
        found = PairedMoments.pending(channels(e), channels(working(output) - e), channels(sample))

        def arrived(*sums: Tensor) -> None:
            if self.moments is not None:
                self.moments.append(found.finish(*sums).map(lambda t: t.unsqueeze(1)))

        return Pending(found.tensors, arrived)

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """Count the step."""
        self.step += 1
        if self._one_step:
            self.strand.pause(STEPPED)
        return result


def bring(calls: Sequence[HeadCall], *others: Pending[Any]) -> None:
    """Everything that waits, in one transfer. Shares that arrive leave their moments waiting."""
    waiting = [pending for call in calls for pending in call.waiting]
    for call in calls:
        call.waiting = []
    settled([*waiting, *others])
