"""One batch of prompts in the lockstep: its own pipeline shell, its pauses, what it hands out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.hosts.pipeline.denoiser_calls import shares_of
from evenkeel.hosts.pipeline.layouts import LatentLayout, find_layout
from evenkeel.hosts.pipeline.pipelines import Prompt, denoiser_name
from evenkeel.hosts.pipeline.strand import Strand
from evenkeel.hosts.scheduler.interception import Interceptor, install, uninstall
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.hosts.scheduler.tape import steering, step_index
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.moments import PairedMoments


@dataclass
class Answer:
    """What one denoiser call of a step gave: full-precision and (corrected) quantized output."""

    expected: Tensor
    given: Tensor


class Watch(Interceptor):
    """Sees every scheduler step of one batch: its law, how guidance combined, what error is left.

    Attributes:
        law, layout, sample: of the run; None before the first step.
        shares: coefficients with which the step combined the branches; None if it did not do so
            linearly.
        moments: one per step, leading shape (prompts, 1, channels); None once a step was not linear.

    """

    def __init__(self, pipeline: Any, prompts: int, layout: LatentLayout | None) -> None:
        self._pipeline = pipeline
        self._prompts = prompts
        self.layout = layout
        self.law: StepLaw | None = None
        self.sample: Tensor | None = None
        self.step = 0
        self.answers: list[Answer] = []
        self.shares: Tensor | None = None
        self.moments: list[PairedMoments] | None = []

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        if self.law is None:
            begin = step_index(scheduler, timestep)
            self.law = probe_scheduler(scheduler, step_kwargs=steering(kwargs), begin=begin)
            self.layout = self.layout or find_layout(self._pipeline, sample)
            self.sample = sample
        n = self._prompts
        if len(output) == 2 * n and torch.equal(output[:n], output[n:]):
            output, sample = output[:n], sample[:n]  # class-conditional guidance doubles every row
        if len(output) != n:
            raise CalibrationError(
                f"the scheduler was handed {len(output)} samples for {n} prompts; fit with "
                f"num_images_per_prompt=1."
            )
        if not bool(output.isfinite().all()):
            raise CalibrationError(
                f"the quantized denoiser gives values that are not finite at step {self.step} (NaN or "
                f"infinity); float16 often overflows where bfloat16 does not."
            )
        self.shares = None
        branches = [self._branches(a.given, output) for a in self.answers]
        parts = [b for group in branches for b in group]
        if parts:
            self.shares = shares_of(parts, output)
        if self.shares is None:
            self.moments = None
        elif self.moments is not None and self.layout is not None:
            originals = [b for a in self.answers for b in self._branches(a.expected, output)]
            e = sum(s * b.double() for s, b in zip(self.shares.tolist(), originals, strict=True))
            channels = self.layout.as_channels
            d = output.double() - e
            found = PairedMoments.of(channels(e).cpu(), channels(d).cpu(), channels(sample).cpu())
            self.moments.append(found.map(lambda t: t.unsqueeze(1)))
        self.answers = []

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        self.step += 1
        return result

    def _branches(self, tensor: Tensor, like: Tensor) -> list[Tensor]:
        """A denoiser output as one tensor per guidance branch, without learned-variance channels."""
        if tensor.dim() > 2 and tensor.shape[1] == 2 * like.shape[1]:
            tensor = tensor[:, : like.shape[1]]
        if len(tensor) % self._prompts or tensor.shape[1:] != like.shape[1:]:
            return []
        return list(torch.split(tensor, self._prompts))


class Batch:
    """Prompts that share one pipeline call.

    Attributes:
        prompts, span: of this call, and their indices among all.
        shell: a copy of the pipeline with the quantized denoiser and a scheduler of its own.
        watch: sees its scheduler steps.
        strand: the call itself.

    """

    def __init__(
        self,
        pipeline: Any,
        quantized: Any,
        prompts: list[Prompt],
        span: range,
        layout: LatentLayout | None,
        body: Callable[[Any, Batch], Any],
    ) -> None:
        self.prompts, self.span = prompts, span
        # Every call needs a scheduler of its own; the networks are shared.
        self.shell = copy.copy(pipeline)
        self.shell.scheduler = copy.deepcopy(pipeline.scheduler)
        uninstall(self.shell.scheduler)
        setattr(self.shell, denoiser_name(pipeline), quantized)
        self.watch = Watch(pipeline, len(prompts), layout)
        install(self.shell.scheduler, self.watch)
        self.strand = Strand(lambda _: body(self.shell, self))
        self.clear()

    def clear(self) -> None:
        """Forget the current denoiser call."""
        self.features: Tensor | None = None
        self.targets: Tensor | None = None
        self.expected_rows: Tensor | None = None
        self.solution: Any = None
