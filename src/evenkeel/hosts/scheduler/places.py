"""Which step of a schedule a scheduler is asked for, and which one a denoiser is told.

A loop may take a schedule's steps in any order, some of them more than once, and others not at all. So a
place is never counted where it can be read: off the timestep itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EXACT, _ROUNDED = 1e-5, 5e-3  # relative; bfloat16 rounds a time by up to 0.4 %


class Places:
    """The places of one schedule, as ``set_timesteps`` made it.

    A timestep that occurs twice (two-stage solvers) is told apart by where the scheduler says it is.

    Args:
        scheduler: with its timesteps set; its ``timesteps`` are kept, the scheduler is not.

    Attributes:
        times: the timesteps, as numbers.

    """

    def __init__(self, scheduler: Any) -> None:
        self._tensor: Tensor = torch.as_tensor(scheduler.timesteps)
        self._given = scheduler.timesteps
        self.times: list[float] = [float(t) for t in self._tensor.tolist()]
        self._training = float(scheduler.config.get("num_train_timesteps") or 1000)
        self._unit: Callable[[float], float] | None = None
        self._start: int | None = None
        self._last = -1

    def belong_to(self, scheduler: Any) -> bool:
        """Whether the scheduler still has this schedule."""
        return scheduler.timesteps is self._given

    def restart(self) -> None:
        """A new run of the same schedule."""
        self._start, self._last, self._unit = None, -1, None

    def of_step(self, scheduler: Any, timestep: Any) -> int | None:
        """Index of the step that a scheduler is about to take; None: not one of its schedule."""
        found = self._by_address(timestep)
        if found is None:
            found = self._nearest(_number(timestep), self._expected(scheduler), lambda t: t)
        return self._seen(found)

    def of_call(self, scheduler: Any, told: Any) -> int | None:
        """Index of the step that a denoiser is called for with this time; None: not one of them.

        Pipelines tell the time in a unit of their own: the timestep itself, its share of the training
        timesteps, what is left of them, or another multiple. It is read off a run's first call.
        """
        found, expected = self._by_address(told), self._expected(scheduler)
        if told is None:  # this denoiser takes no time
            found = expected if expected < len(self.times) else None
        if found is not None or told is None:
            return self._seen(found)
        value = _number(told)
        if self._unit is None:
            self._unit = self._unit_of(value, expected)
        return self._seen(self._nearest(value, expected, self._unit))

    def _by_address(self, timestep: Any) -> int | None:
        """A timestep that is an element of the schedule tells its place without being read."""
        if (
            not isinstance(timestep, Tensor)
            or timestep.dim()
            or timestep.dtype != self._tensor.dtype
        ):
            return None
        if timestep.device != self._tensor.device:
            return None
        apart = timestep.data_ptr() - self._tensor.data_ptr()
        place = apart // (self._tensor.element_size() * max(1, self._tensor.stride(0)))
        inside = 0 <= place < len(self.times)
        same = inside and self._tensor[place].data_ptr() == timestep.data_ptr()
        return int(place) if same else None

    def _expected(self, scheduler: Any) -> int:
        """Where the scheduler says that it is; else the place after the last one."""
        said = getattr(scheduler, "step_index", None)
        if said is None:
            counted = getattr(scheduler, "counter", None)  # PNDM
            if counted is not None and self._start is not None:
                return self._start + int(counted)
            begin = getattr(scheduler, "begin_index", None)
            said = begin if self._last < 0 and begin is not None else self._last + 1
        return int(said)

    def _seen(self, found: int | None) -> int | None:
        if found is not None:
            self._last = found
            self._start = found if self._start is None else self._start
        return found

    def _nearest(self, value: float, expected: int, unit: Callable[[float], float]) -> int | None:
        told = [unit(t) for t in self.times]
        size = max(map(abs, told), default=1.0)
        for tolerance in (_EXACT, _ROUNDED):
            limit = tolerance * max(abs(value), 1e-3 * size)
            close = [k for k, t in enumerate(told) if abs(t - value) <= limit]
            if close:
                return (
                    expected
                    if expected in close
                    else min(
                        close,
                        key=lambda k: (abs(told[k] - value), k < self._last, abs(k - expected)),
                    )
                )
        return None

    def _unit_of(self, value: float, expected: int) -> Callable[[float], float]:
        whole = self._training
        units: list[Callable[[float], float]] = [
            lambda t: t,
            lambda t: t / whole,
            lambda t: 1 - t / whole,
        ]
        own = self.times[expected] if 0 <= expected < len(self.times) else self.times[0]
        if own and value:
            ratio = value / own
            units.append(lambda t: t * ratio)
        for unit in units[:3]:
            if abs(unit(own) - value) <= _ROUNDED * max(abs(value), 1e-3):
                return unit
        return next((u for u in units if self._nearest(value, expected, u) is not None), units[0])


def _number(timestep: Any) -> float:
    """The largest where there are several: given first frames of a video are told 0."""
    if isinstance(timestep, Tensor):
        return float(timestep.detach().max())
    return float(timestep)
