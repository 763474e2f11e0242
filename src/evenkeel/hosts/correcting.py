"""Carry a correction's plan out, step by step, inside a scheduler."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evenkeel.corrections.plan import Correction, SamplerPlan
from evenkeel.hosts.interception import Interceptor
from evenkeel.hosts.layouts import LatentLayout, find_layout
from evenkeel.hosts.probing import probe_scheduler
from evenkeel.hosts.tape import steering, step_index

Check = Callable[[Any], None]


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
        self._weights: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}
        self._index = -1
        self._past: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference can be neither copied nor pickled; a copied scheduler lives without it.
        return {**self.__dict__, "_pipeline": None, "_check": None}

    def begin(self, scheduler: Any) -> None:
        self._index = -1
        self._past = []

    def wide(self) -> bool:
        return self.plan is not None and not self.plan.is_identity

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        if self._index < 0 or (self.plan and self._index + 1 >= self.plan.law.steps):
            self._start(scheduler, timestep, sample, steering(kwargs))
        self._index += 1

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        plan, k = self.plan, self._index
        assert plan is not None and self.layout is not None
        lag = k - int(plan.law.anchor[k])
        start = self._past[-lag] if lag else sample
        if plan.law.intermediate.any():
            self._past = [*self._past[-3:], sample]
        if not plan.active[k]:
            return result
        base, anchor, by_output = self._tensors(k, result)
        stretched = result * base
        stretched.addcmul_(start, anchor)
        if plan.output[k].any():
            stretched.addcmul_(output, by_output)
        return stretched

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
            self._weights = {}
        self.plan = self._plans[key]
        self._index = -1
        self._past = []

    def _tensors(self, k: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = (k, str(like.device))
        if key not in self._weights:
            plan, layout = self.plan, self.layout
            assert plan is not None and layout is not None

            def shaped(values: Tensor) -> Tensor:
                return layout.broadcast(values).to(like.device, torch.float32)

            self._weights[key] = (
                shaped(plan.base[k]),
                shaped(plan.anchor[k]),
                shaped(plan.output[k]),
            )
        return self._weights[key]
