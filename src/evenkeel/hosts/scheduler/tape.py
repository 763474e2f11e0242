"""Teacher-forced replay: the second run is led through the states of the first.

Pass 1 records what enters and leaves every scheduler step. Pass 2 runs the same call with the other
denoiser; its steps return the recorded results, so the other denoiser sees exactly the same states,
and its outputs are caught where the recorded ones were: after guidance, in the scheduler's units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.exact import Pending, check


@dataclass
class Tape:
    """One run: per step the sample, the model output, the result; and the run's step law."""

    samples: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    law: StepLaw | None = None


class Recorder(Interceptor):
    """Writes a tape. Put it after a correction to record corrected outputs and states."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._last: tuple[Tensor, int] | None = None  # what the last step gave, and its version

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        if self.tape.law is None:
            self.tape.law = law_of_run(scheduler, timestep, kwargs)
        given = self._last is not None and sample is self._last[0]
        if given and self._last is not None and sample._version == self._last[1]:
            self.tape.samples.append(self.tape.results[-1])  # the same values: kept once
        else:
            self.tape.samples.append(sample.detach().clone())  # clone: CUDA graphs reuse buffers

    def edit(self, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        self.tape.outputs.append(output.detach().clone())
        return output

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        self.tape.results.append(result.detach().to(self.tape.samples[-1].dtype).clone())
        same = result.dtype == self.tape.results[-1].dtype and not result.is_inference()
        self._last = (result, result._version) if same else None
        return result


class Replayer(Interceptor):
    """Returns the results of a tape and shows this run's own outputs.

    Args:
        tape: of the run that led the way.
        see: called with a step, an output, and whether the step began where the tape's did (a check to be
            settled when the outputs are, so that no step has to wait for the device).

    Attributes:
        steps: taken so far.

    """

    def __init__(self, tape: Tape, see: Callable[[int, Tensor, Pending[None]], None]) -> None:
        self.tape, self._see = tape, see
        self.steps = 0

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        k = self.steps
        if k >= len(self.tape.samples):
            raise CalibrationError(
                f"the second run takes more steps than the first ({len(self.tape.samples)}); the "
                f"pipeline is not deterministic under replay."
            )
        recorded = self.tape.samples[k]
        if output.shape != self.tape.outputs[k].shape:
            raise CalibrationError(
                f"at step {k} the two denoisers give outputs of different shape: "
                f"{tuple(self.tape.outputs[k].shape)} and {tuple(output.shape)}. They are not twins."
            )
        elsewhere = CalibrationError(
            f"at step {k} the second run reached another sample than the first although it was "
            f"led there: the pipeline is not deterministic under replay. Common causes: dropout "
            f"(call .eval() on every component), a generator that was not passed, a cache "
            f"(DeepCache, FBCache) that is switched on."
        )
        if sample.shape != recorded.shape:
            raise elsewhere
        self.steps += 1
        self._see(k, output.detach(), check((sample == recorded).all(), lambda: elsewhere))

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        return self.tape.results[self.steps - 1]


def law_of_run(scheduler: Any, timestep: Any, kwargs: dict[str, Any]) -> StepLaw:
    """The step law of a run, from what its first step is called with."""
    begin = step_index(scheduler, timestep)
    return probe_scheduler(scheduler, step_kwargs=steering(kwargs), begin=begin)


def step_index(scheduler: Any, timestep: Any) -> int:
    """Position of a run's first step in ``scheduler.timesteps``."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    matches = (scheduler.timesteps.cpu() == torch.as_tensor(timestep).cpu()).nonzero()
    return int(matches[0]) if len(matches) else 0


def steering(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The extra step arguments that change the law (such as eta), without bulky or default ones."""
    return {
        k: v for k, v in kwargs.items() if isinstance(v, (int, float)) and k != "variance_noise"
    }
