"""One pipeline call of the quantized denoiser that pauses at the output head, and sees its own steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evenkeel.fitting.lockstep.call import Call
from evenkeel.hosts.pipeline.denoiser_calls import one_per_prompt, refuse_non_finite, shares_of
from evenkeel.hosts.run import Batch, Run
from evenkeel.statistics.moments import PairedMoments


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
        features, targets, expected_rows: of the denoiser call that is paused at its head.
        solution: what it goes on with; None: not yet known.

    """

    def __init__(self, run: Run, batch: Batch, denoiser: nn.Module) -> None:
        super().__init__(run, batch, denoiser, reads_law=not batch.first)
        self._run = run
        self.step = 0
        self.answers: list[Answer] = []
        self.shares: Tensor | None = None
        self.moments: list[PairedMoments] | None = []
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
        """Take the step's shares and moments."""
        super().before(scheduler, timestep, output, sample, kwargs)
        output = one_per_prompt(output, len(self.batch))
        sample = sample[: len(self.batch)]
        refuse_non_finite(output, "quantized", self.step)
        given = self.branches([a.given for a in self.answers], output)
        self.shares = shares_of(given, output) if given else None
        if self.shares is None:
            self.moments = None
        elif self.moments is not None:
            expected = self.branches([a.expected for a in self.answers], output)
            e = sum(s * b.double() for s, b in zip(self.shares.tolist(), expected, strict=True))
            channels = self._run.layout(sample).as_channels
            d = output.double() - e
            found = PairedMoments.of(channels(e).cpu(), channels(d).cpu(), channels(sample).cpu())
            self.moments.append(found.map(lambda t: t.unsqueeze(1)))
        self.answers = []

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """Count the step."""
        self.step += 1
        return result
