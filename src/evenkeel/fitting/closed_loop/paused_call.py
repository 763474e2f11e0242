"""One pipeline call in a closed loop: it stops at its scheduler, once before and once after a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.corrections.base import Correction
from evenkeel.fitting.lockstep.call import Call
from evenkeel.hosts.actuators.correcting import heads_attached
from evenkeel.hosts.pipeline.denoiser_calls import answer_of, finite, one_per_prompt
from evenkeel.hosts.run import Batch, Run
from evenkeel.statistics.exact import Pending

AT_OUTPUT, AT_RESULT = "output", "result"


class PausedCall(Call):
    """Stops with the model's output, and with the step's result.

    Attributes:
        sample, output, result: of the current step, one row per prompt.
        answer: what it goes on with in place of what it stopped with; None: with that.
        is_quantized: its steps are computed in float32 at least, as with a correction at sampling time.

    """

    def __init__(
        self,
        run: Run,
        batch: Batch,
        denoiser: nn.Module,
        *,
        is_quantized: bool = False,
        correction: Correction | None = None,
        reads_law: bool = False,
    ) -> None:
        super().__init__(run, batch, denoiser, correction=correction, reads_law=reads_law)
        self.sample = self.output = self.result = torch.empty(0)
        self.is_quantized = is_quantized
        self.answer: Tensor | None = None
        self._outputs: list[Tensor] = []
        self._turn = 0

    def resume(self) -> Any:
        """Run to the next stop, with the denoiser as the correction below wants it."""
        _seed_global_noise(self.batch.seed, self._turn)
        self._turn += 1
        answer, self.answer = self.answer, None
        with heads_attached(self.below), self._listening():
            try:
                return self.strand.resume(answer)
            except BaseException:
                # An interrupted call still computes: it must end before the denoiser is restored.
                self.strand.abandon()
                raise

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Inside, the denoiser's outputs are kept until the end of the step."""
        handle = self.denoiser.register_forward_hook(
            lambda _module, _inputs, output: self._outputs.append(answer_of(output).detach())
        )
        try:
            yield
        finally:
            handle.remove()

    def wide(self) -> bool:
        """As a correction at sampling time is, so that it can be fitted here."""
        return self.is_quantized

    def edit(self, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        """Stop with the output; go on with what the answer says."""
        self.output = one_per_prompt(output.detach(), len(self.batch))
        self.sample = sample.detach()[: len(self.batch)]
        changed = self.strand.pause(AT_OUTPUT)
        self._outputs = []
        return _given(changed, output)

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """Stop with the result; go on from what the answer says."""
        self.result = result.detach()[: len(self.batch)]
        changed = self.strand.pause(AT_RESULT)
        return _given(changed, result)

    def step_branches(self) -> tuple[Tensor, ...]:
        """The denoiser's outputs of this step, one per guidance branch."""
        return tuple(self.branches(self._outputs, self.output))

    def finite(self, step: int) -> Pending[None]:
        """To be settled: refuses an output of this step that is not finite."""
        return finite(self.output, "quantized" if self.is_quantized else "full-precision", step)


def _given(changed: Tensor | None, like: Tensor) -> Tensor:
    """In place of ``like``, which may hold every row twice."""
    if changed is None:
        return like
    return torch.cat([changed] * (len(like) // len(changed))).to(like)


def _seed_global_noise(seed: int, turn: int) -> None:
    """Pipelines that draw from the global generator draw the same in both runs of a batch."""
    # torch.manual_seed takes a tenth of a small denoiser's time where there is no device.
    torch.default_generator.manual_seed(seed + 1_000_003 * turn)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed + 1_000_003 * turn)
