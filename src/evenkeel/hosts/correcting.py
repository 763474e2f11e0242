"""Carry a correction's plan out, step by step, inside a scheduler."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.corrections.drift import LONGEST_LAG
from evenkeel.corrections.plan import Correction, SamplerPlan
from evenkeel.hosts.head_switch import HeadSwitch
from evenkeel.hosts.interception import Interceptor
from evenkeel.hosts.layouts import LatentLayout, find_layout
from evenkeel.hosts.probing import probe_scheduler
from evenkeel.hosts.tape import steering, step_index
from evenkeel.record.readout import Readout

Check = Callable[[Any], None]


@contextmanager
def heads_attached(interceptors: Sequence[Interceptor]) -> Iterator[None]:
    """Inside, those of ``interceptors`` that change the output head do so."""
    switches = [i for i in interceptors if isinstance(i, HeadSwitch)]
    for switch in switches:
        switch.attach()
    try:
        yield
    finally:
        for switch in switches:
            switch.detach()


def interceptors_of(
    correction: Correction, pipeline: Any, denoiser: nn.Module, **options: Any
) -> list[Interceptor]:
    """Everything that carries ``correction`` out: its sampler part and, if it has one, its head."""
    found: list[Interceptor] = [Corrector(correction, pipeline, **options)]
    if isinstance(correction, Readout):
        found.append(
            HeadSwitch(
                correction.table,
                denoiser,
                correction.head,
                allow_range=options.get("allow_range", False),
            )
        )
    return found


class Corrector(Interceptor):
    """Applies one correction.

    The plan is made at the first step of a run, when eta and the first index are known, and kept for
    later runs with the same schedule.

    An identity plan leaves every tensor untouched: not even a cast.
    """

    def __init__(
        self,
        correction: Correction,
        pipeline: Any,
        *,
        layout: LatentLayout | None = None,
        allow_range: bool = False,
        check: Check | None = None,
    ) -> None:
        self.correction = correction
        self.layout = layout
        self.allow_range = allow_range
        self.plan: SamplerPlan | None = None
        self._pipeline = weakref.ref(pipeline)
        self._check = check
        self._plans: dict[tuple[Any, ...], SamplerPlan] = {}
        self._prepared: dict[torch.device, list[_Stretch | None]] = {}
        self._steps: list[_Stretch | None] = []
        self._wide = self._remembers = False
        self._index = -1
        self._past: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference can be neither copied nor pickled; a copied scheduler lives without it.
        return {**self.__dict__, "_pipeline": None, "_check": None}

    def begin(self, scheduler: Any) -> None:
        self._index = -1
        self._past = []

    def wide(self) -> bool:
        return self._wide

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        if self._index < 0 or self._index + 1 >= len(self._steps):
            self._start(scheduler, timestep, sample, steering(kwargs))
        self._index += 1

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        past, stretch = self._past, self._steps[self._index]
        if self._remembers:
            self._past = [*past[-LONGEST_LAG:], sample]
        if stretch is None:
            return result
        return stretch(result, past[-stretch.lag] if stretch.lag else sample, output)

    def _start(
        self, scheduler: Any, timestep: Any, sample: Tensor, step_kwargs: dict[str, Any]
    ) -> None:
        pipeline = self._pipeline() if self._pipeline is not None else None
        if self._check is not None and pipeline is not None:
            self._check(pipeline)
        if self.layout is None:
            self.layout = find_layout(pipeline, sample)
        begin = step_index(scheduler, timestep)
        sigmas = getattr(scheduler, "sigmas", None)
        key = (
            tuple(scheduler.timesteps.tolist()),
            tuple(sigmas.tolist()) if isinstance(sigmas, Tensor) else None,
            begin,
            tuple(sorted(step_kwargs.items())),
        )
        if key not in self._plans:
            law = probe_scheduler(scheduler, step_kwargs=step_kwargs, begin=begin)
            self._plans = {key: self.correction.plan(law, allow_range=self.allow_range)}
            self._prepared = {}
        plan = self._plans[key]
        if sample.device not in self._prepared:
            self._prepared[sample.device] = [
                _Stretch.of(plan, k, self.layout, sample.device) if plan.active[k] else None
                for k in range(plan.law.steps)
            ]
        self.plan, self._steps = plan, self._prepared[sample.device]
        self._wide = not plan.is_identity
        self._remembers = bool(plan.law.intermediate.any())
        self._index = -1
        self._past = []


@dataclass(frozen=True, slots=True)
class _Stretch:
    """One step of a plan as tensors on the sample's device, so that a step costs only arithmetic."""

    lag: int
    base: Tensor
    anchor: Tensor
    output: Tensor | None
    shift: Tensor | None
    is_straight: bool

    @classmethod
    def of(cls, plan: SamplerPlan, k: int, layout: LatentLayout, device: torch.device) -> _Stretch:
        def shaped(values: Tensor) -> Tensor:
            return layout.broadcast(values).to(device, torch.float32)

        base, anchor, output = plan.base[k], plan.anchor[k], plan.output[k]
        uses_output = bool(output.any())
        return cls(
            lag=k - int(plan.law.anchor[k]),
            base=shaped(base),
            anchor=shaped(anchor),
            output=shaped(output) if uses_output else None,
            shift=None if plan.shift is None else plan.shift[k].to(device),
            is_straight=not uses_output and torch.equal(base, 1 - anchor),
        )

    def __call__(self, result: Tensor, start: Tensor, output: Tensor) -> Tensor:
        """``base * result + anchor * start + output * m - shift``; one pass where base = 1 - anchor."""
        stretched = self._stretched(result, start, output)
        return stretched if self.shift is None else stretched - self.shift

    def _stretched(self, result: Tensor, start: Tensor, output: Tensor) -> Tensor:
        if self.is_straight and result.dtype == start.dtype == self.anchor.dtype:
            return torch.lerp(result, start, self.anchor)
        stretched = result * self.base
        stretched.addcmul_(start, self.anchor)
        if self.output is not None:
            stretched.addcmul_(output, self.output)
        return stretched
