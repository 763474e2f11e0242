"""Full-precision runs of two orders from one noise, evaluation by evaluation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.fitting.mixed_order.solvers import Solver, SolverPair, solver_pair
from evenkeel.hosts.pipeline.denoiser_calls import Call, answer_of
from evenkeel.hosts.pipeline.pipelines import quiet, uncompiled
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import Interceptor, install
from evenkeel.quantizers.workspace.calibration_set import mapped
from evenkeel.statistics.exact import at_home


@dataclass(frozen=True)
class Evaluation:
    """What one step of a scheduler asked the denoiser, and what it was handed.

    Attributes:
        calls: with what came out; one, or one per guidance branch where a pipeline calls twice.
        timestep: of the scheduler.
        sample: the state that the step starts from.
        output: after guidance.

    """

    calls: tuple[Call, ...]
    timestep: float
    sample: Tensor
    output: Tensor


@dataclass(frozen=True)
class MixedOrderRuns:
    """Both runs of a batch, interval by interval.

    Attributes:
        first: of every interval the lower order's evaluation, at its start.
        start, middle: the higher order's at its start, and at its midpoint; the same one where the
            solver has no midpoint.

    """

    first: list[Evaluation]
    start: list[Evaluation]
    middle: list[Evaluation]

    @property
    def floor(self) -> Tensor:
        """(intervals,) float64, E |eps(x_s, s) - eps(x_t, t)|^2 of full precision per element.

        What an alignment of both points costs before anything is quantized, after guidance, in the units
        of the denoiser's output.
        """
        pairs = zip(self.middle, self.first, strict=True)
        return torch.stack(
            [
                (at_home(u.output).double() - at_home(x.output).double()).square().mean()
                for u, x in pairs
            ]
        )


def mixed_order_runs(run: Run, batch: Batch, intervals: int) -> MixedOrderRuns:
    """Let the pipeline's own loop run once per order, in full precision, from the same noise.

    To be called while the pipeline is undisturbed.

    Args:
        run: whose pipeline, guidance and further arguments are taken; not its number of steps.
        batch: prompts and seeds.
        intervals: of both runs.

    Raises:
        CalibrationError: the schedulers do not cut time into the same intervals.
        UnsupportedSampler: see :func:`evenkeel.fitting.mixed_order.solvers.solver_pair`.

    """
    pair = solver_pair(run.pipeline, intervals)
    first = evaluations(run, batch, pair.low)
    high = evaluations(run, batch, pair.high)
    start, middle = high[:: pair.stages], high[pair.stages - 1 :: pair.stages]
    _check_grids(pair, first, start)
    return MixedOrderRuns(first, start, middle)


def evaluations(run: Run, batch: Batch, solver: Solver) -> list[Evaluation]:
    """Every step of one run of this solver."""
    watcher = _Watcher()
    shell, denoiser = solver.pipeline, uncompiled(run.denoiser)
    install(shell.scheduler, watcher, *solver.interceptors)
    hook = denoiser.register_forward_hook(watcher.called, with_kwargs=True)
    given = copy.copy(run)
    given.num_inference_steps = solver.steps
    try:
        with quiet(shell):
            given.sample(batch, on=shell)
    finally:
        hook.remove()
    if not watcher.seen:
        raise CalibrationError(
            f"{type(run.pipeline).__name__} never called its scheduler's step; there is nothing to pair."
        )
    return watcher.seen


class _Watcher(Interceptor):
    """Collects what the denoiser is asked between two steps."""

    def __init__(self) -> None:
        self.seen: list[Evaluation] = []
        self._asked: list[Call] = []

    def called(self, _: Any, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        arguments, keywords = mapped((given, dict(named)), lambda x: x.detach().clone())
        self._asked.append(Call(arguments, keywords, answer_of(output).detach().clone()))

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        asked, self._asked = tuple(self._asked), []
        time, state = float(timestep), sample.detach().clone()
        self.seen.append(Evaluation(asked, time, state, output.detach().clone()))


def _check_grids(
    pair: SolverPair, first: Sequence[Evaluation], start: Sequence[Evaluation]
) -> None:
    low, high = ([e.timestep for e in side] for side in (first, start))
    if len(low) == len(high) and all(abs(a - b) < 1e-3 for a, b in zip(low, high, strict=True)):
        return
    raise CalibrationError(
        f"{pair.name}: both orders must cut time into the same intervals; of order less they start at "
        f"{low[:4]}..., of the other at {high[:4]}.... Spacings that are no function of time (Karras "
        "sigmas and the like) do this: switch them off in the pipeline's scheduler."
    )
