"""One pipeline call that can be paused, and how several of them advance together.

All calls run to their next pause, which must be of one kind; there whoever made them sees all batches
and says what each goes on with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.corrections.base import Correction
from evenkeel.errors import CalibrationError
from evenkeel.hosts.actuators.correcting import interceptors_of
from evenkeel.hosts.actuators.guidance import GuidanceMeter
from evenkeel.hosts.pipeline.denoiser_calls import branches_of
from evenkeel.hosts.pipeline.strand import Finished, Strand
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import Interceptor, install
from evenkeel.hosts.scheduler.tape import law_of_run
from evenkeel.sampling.step_law import StepLaw


class Call(Interceptor):
    """A call on a shell of the pipeline, with a denoiser and a scheduler of its own, in a strand.

    Subclasses pause it. To be made and advanced while the pipeline is undisturbed.

    Attributes:
        batch, denoiser: of this call.
        law: of the run, from its first step on; None where another call reads it.
        taken: steps, so far.
        first: the state that entered the first step.
        below: what carries out the correction below, if there is one.
        strand: the call itself.

    """

    def __init__(
        self,
        run: Run,
        batch: Batch,
        denoiser: nn.Module,
        *,
        correction: Correction | None = None,
        reads_law: bool = False,
    ) -> None:
        self.batch, self.denoiser = batch, denoiser
        self.law: StepLaw | None = None
        self.first: Tensor | None = None
        self._reads_law, self.taken = reads_law, 0
        # Every call needs a scheduler of its own; the networks are shared.
        shell = copy.copy(run.pipeline)
        shell.scheduler = copy.deepcopy(run.pipeline.scheduler)
        setattr(shell, run.name, denoiser)
        self.below: list[Interceptor] = []
        if correction is not None:
            self.below = interceptors_of(correction, shell, denoiser, layout=run.given_layout)
        # We see what the others made; what changes the denoiser for the next step does so after our
        # stop, when this call is about to use it.
        makers = [i for i in self.below if not i.on_denoiser]
        others = [i for i in self.below if i.on_denoiser]
        self._meter = [GuidanceMeter(run, denoiser)] if reads_law else []
        install(shell.scheduler, *makers, *self._meter, self, *others)
        for listening in self._meter:
            listening.attach()
        self.strand = Strand(lambda _: run.sample(batch, on=shell))

    def abandon(self) -> None:
        """The pipeline call goes on no longer, and nothing of it listens to the denoiser."""
        self.strand.abandon()
        for listening in self._meter:
            listening.detach()

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Read the law, once."""
        self.taken += 1
        if self.first is None:
            self.first = sample.detach()
            self.law = law_of_run(scheduler, timestep, kwargs) if self._reads_law else None

    def branches(self, answers: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """The denoiser's outputs of one step, one per guidance branch; empty where one does not fit.

        Args:
            answers: of the denoiser, in the order of its calls.
            like: what the scheduler was handed.

        """
        groups = [branches_of(answer, like, len(self.batch)) for answer in answers]
        return [branch for group in groups for branch in group] if all(groups) else []


def advance(calls: Sequence[Any], resume: Callable[[Any], Any]) -> Any:
    """Let every call run to its next pause, and say why they pause; ``Finished`` once they returned.

    Raises:
        CalibrationError: not all for the same reason.

    """
    found = map(resume, calls)
    shown = {Finished if isinstance(reason, Finished) else reason for reason in found}
    if len(shown) > 1:
        raise CalibrationError(
            "the pipeline calls fell out of step: they make different numbers of denoiser calls or "
            "scheduler steps. Pass prompts that are treated alike, or batch_size=len(prompts)."
        )
    return shown.pop()


@contextmanager
def together(calls: Sequence[Call], title: str, steps: int, progress: bool) -> Iterator[tqdm[Any]]:
    """Inside, the calls may be advanced; afterwards none of them waits, whatever happened."""
    try:
        with tqdm(
            total=steps, desc=title, unit="step", disable=not (progress and processes().main)
        ) as bar:
            yield bar
    finally:
        for call in calls:
            call.abandon()


def first_state(call: Call, run: Run) -> tuple[StepLaw, Tensor]:
    """Law and first state, (prompts, 1, ...), of the call that reads them.

    Raises:
        CalibrationError: the pipeline never called its scheduler's step.

    """
    if call.law is None or call.first is None:
        raise CalibrationError(
            f"{type(run.pipeline).__name__} never called its scheduler's step; there is nothing to fit."
        )
    return call.law, call.first[: len(call.batch), None]


def whole_run(call: Call, run: Run) -> tuple[StepLaw, Tensor]:
    """The same after its last step, which may come before that of the schedule."""
    law, first = first_state(call, run)
    return law.until(call.taken), first
