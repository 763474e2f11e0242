"""A pipeline's sampler in two orders: how each is run, and where the midpoints are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evenkeel.errors import UnsupportedSampler
from evenkeel.hosts.scheduler.interception import Interceptor, plain_class
from evenkeel.hosts.scheduler.schedulers import change_scheduler, is_flow


@dataclass(frozen=True)
class Solver:
    """One way to run a pipeline.

    Attributes:
        pipeline: a shell of the pipeline with this solver's scheduler; networks are shared.
        steps: the pipeline call's ``num_inference_steps``.
        interceptors: what makes its scheduler the solver, where diffusers has no such scheduler.

    """

    pipeline: Any
    steps: int
    interceptors: tuple[Interceptor, ...] = ()


@dataclass(frozen=True)
class SolverPair:
    """Solvers of a lower and a higher order with the same intervals.

    Attributes:
        name: of both, for messages and files.
        low, high: to be run from the same noise.
        stages: evaluations of the higher order in an interval: at its start, and at its midpoint. A
            multistep solver has the first alone. Where a noise level of zero ends a run, diffusers takes the
            last interval in two steps of first order, and the second of them stands for the midpoint.

    """

    name: str
    low: Solver
    high: Solver
    stages: int = 2


def solver_pair(pipeline: Any, intervals: int) -> SolverPair:
    """The pipeline's sampler in two orders, over so many intervals.

    - ``PNDMScheduler`` (PLMS): linear multistep of order four, and of order three by forgetting the oldest
      of its outputs. Both evaluate at the same times.
    - ``FlowMatchEulerDiscreteScheduler``: Euler, and the explicit midpoint rule on the same scheduler with
      twice the steps, x' = x + (sigma' - sigma) v(u). diffusers' own second order for flow matching, Heun,
      has no midpoint and takes no sigmas from a pipeline.
    - every other: ``DPMSolverSinglestepScheduler`` of order 1 (DDIM) and of order 2, made from the
      configuration of the pipeline's. Its midpoints lie on its own grid: halfway in time, not in log-SNR.

    Args:
        pipeline: with the sampler that it came with; it is not changed.
        intervals: of both runs.

    Raises:
        UnsupportedSampler: PLMS that starts with Runge-Kutta steps; what ``change_scheduler`` refuses.

    """
    name = plain_class(pipeline.scheduler).__name__
    if name == "PNDMScheduler":
        if not pipeline.scheduler.config.skip_prk_steps:
            raise UnsupportedSampler(
                "PNDMScheduler starts with Runge-Kutta steps, which have no order less: set "
                "skip_prk_steps=True."
            )
        low = Solver(_shell(pipeline), intervals, (ShortMemory(3),))
        return SolverPair("plms-4/3", low, Solver(_shell(pipeline), intervals), stages=1)
    if name == "FlowMatchEulerDiscreteScheduler":
        high = Solver(_shell(pipeline), 2 * intervals, (MidpointRule(),))
        return SolverPair("midpoint/euler", Solver(_shell(pipeline), intervals), high)
    shells = [_shell(pipeline), _shell(pipeline)]
    for order, shell in enumerate(shells, start=1):
        changes: dict[str, Any] = {"solver_order": order}
        if name != "DPMSolverSinglestepScheduler":
            flow = is_flow(pipeline.scheduler)
            changes["algorithm_type"] = "dpmsolver++" if flow else "dpmsolver"
            changes["final_sigmas_type"] = "zero" if flow else "sigma_min"
            changes["lower_order_final"] = flow
        change_scheduler(shell, "DPMSolverSinglestepScheduler", **changes)
    low, high = Solver(shells[0], intervals), Solver(shells[1], 2 * intervals)
    return SolverPair("dpm-solver-2/1", low, high)


class ShortMemory(Interceptor):
    """Linear multistep of a lower order: ``PNDMScheduler`` remembers so many outputs, the present one too."""

    def __init__(self, order: int) -> None:
        self.order = order

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Forget what this order does not need."""
        scheduler.ets = scheduler.ets[-(self.order - 1) :]


class MidpointRule(Interceptor):
    """Every second Euler step starts again where the step before it did: x' = x + (sigma' - sigma) v(u)."""

    def __init__(self) -> None:
        self._step = 0
        self._start: Tensor | None = None

    def begin(self, scheduler: Any) -> None:
        """Forget the run before."""
        self._step, self._start = 0, None

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """The second of two steps advances the state before the first."""
        k, self._step = self._step, self._step + 1
        if k % 2 == 0 or self._start is None:
            self._start = sample
            return result
        width = float(scheduler.sigmas[k + 1] - scheduler.sigmas[k - 1])
        return (self._start.float() + width * output.float()).to(result.dtype)


def _shell(pipeline: Any) -> Any:
    shell, scheduler = copy.copy(pipeline), pipeline.scheduler
    shell.scheduler = plain_class(scheduler).from_config(scheduler.config)  # type: ignore[attr-defined]
    return shell
