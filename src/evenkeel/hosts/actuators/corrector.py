"""Carry a correction's plan out, step by step, inside a scheduler."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import Incompatible, UnsupportedSampler
from evenkeel.hosts.actuators.step_change import ImageNoise, StepChange
from evenkeel.hosts.pipeline.layouts import LatentLayout, find_layout
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.hosts.scheduler.tape import steering, step_index

Check = Callable[[Any], None]


class Corrector(Interceptor):
    """Carries out what a correction does to the sampler's own step.

    The plan is made at the first step of a run, when eta and the first index are known, and kept for
    later runs with the same schedule.

    An identity plan leaves every tensor untouched: not even a cast.
    """

    correction: Correction

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
        self.pipeline: weakref.ref[Any] | None = weakref.ref(pipeline)
        self._check = check
        self._plans: dict[tuple[Any, ...], SamplerPlan] = {}
        self._prepared: dict[torch.device, list[StepChange]] = {}
        self._steps: list[StepChange] = []
        self._wide = False
        self._lags = 0
        self._noise: ImageNoise | None = None
        self._index = -1
        self._sizes: set[tuple[int, ...]] = set()  # that were remarked on
        self._samples: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference can be neither copied nor pickled; a copied scheduler lives without it.
        return {**self.__dict__, "pipeline": None, "_check": None}

    def begin(self, scheduler: Any) -> None:
        self._index = -1
        self._forget()

    def wide(self) -> bool:
        return self._wide

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        if self._index < 0 or self._index + 1 >= len(self._steps):
            self._start(scheduler, timestep, sample, steering(kwargs))
        self._index += 1

    def edit(self, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        change = self._steps[self._index].edit
        if change is None:
            return output
        if output.shape != sample.shape:
            raise UnsupportedSampler(
                f"{type(scheduler).__name__} is handed outputs of shape {tuple(output.shape)} for "
                f"samples of {tuple(sample.shape)} (a learned variance beside the noise); "
                f"{self.correction.name} edits plain outputs only."
            )
        if change.std is not None and self._noise is None:
            self._noise = ImageNoise(sample, change.seed)
        return change(output, sample, self._noise)

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        if self._lags:
            self._samples = [sample, *self._samples[: self._lags]]
            self._outputs = [output, *self._outputs[: self._lags]]
        stretch = self._steps[self._index].stretch
        if stretch is None:
            return result
        return stretch(result, self._samples or [sample], self._outputs or [output])

    def _forget(self) -> None:
        self._samples, self._outputs, self._noise = [], [], None

    def _start(
        self, scheduler: Any, timestep: Any, sample: Tensor, step_kwargs: dict[str, Any]
    ) -> None:
        pipeline = self.pipeline() if self.pipeline is not None else None
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
            plan = self.correction.plan(law, allow_range=self.allow_range)
            _refuse_undeclared(self.correction, plan)
            self._plans = {key: plan}
            self._prepared = {}
        plan = self._plans[key]
        self._compare_size(sample, plan)
        if sample.device not in self._prepared:
            self._prepared[sample.device] = [
                StepChange.of(plan, k, self.layout, sample.device) for k in range(plan.law.steps)
            ]
        self.plan, self._steps = plan, self._prepared[sample.device]
        self._wide = not plan.is_identity
        self._lags = plan.samples.shape[1] - 1
        self._index = -1
        self._forget()

    def _compare_size(self, sample: Tensor, plan: SamplerPlan) -> None:
        """Say once that what is sampled has another size than what was measured; refuse what cannot be.

        Raises:
            Incompatible: the plan shifts every element of the state, and has others.

        """
        made_for, found = self.correction.made_for, tuple(sample.shape[1:])
        if plan.shift is not None and plan.shift[0].numel() > 1:
            expected = tuple(plan.shift.shape[1:])[-len(found) :]
            if expected != found:
                raise Incompatible(
                    f"{self.correction.name} shifts every element of latents of shape {expected}; this run "
                    f"samples {found}. Calibrate at this resolution, or use a correction per channel."
                )
        if made_for is None or found == tuple(made_for.latent_shape) or found in self._sizes:
            return
        self._sizes.add(found)
        warnings.warn(
            f"evenkeel: {self.correction.name} was measured on latents of shape "
            f"{tuple(made_for.latent_shape)}, and this run samples {found}: its numbers are used as they "
            f"are, and nobody has measured them at this resolution. Calibrate at it to be sure.",
            UserWarning,
            stacklevel=2,
        )


def _refuse_undeclared(correction: Correction, plan: SamplerPlan) -> None:
    undeclared = [s for s in plan.stages if s not in correction.stages]
    if undeclared:
        raise Incompatible(
            f"{correction.name} declares the stages {correction.stages}, but its plan also changes "
            f"{', '.join(undeclared)}, which nobody would carry out. Declare it in stages."
        )
