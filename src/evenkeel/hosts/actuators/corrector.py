"""Carry a correction's plan out, step by step, inside a scheduler."""

from __future__ import annotations

import logging
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import Incompatible, OutOfRange, UnsupportedSampler
from evenkeel.hosts.actuators.planned import planned
from evenkeel.hosts.actuators.step_change import ImageNoise, StepChange
from evenkeel.hosts.pipeline.layouts import LatentLayout, find_layout
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.hosts.scheduler.places import Places
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.hosts.scheduler.tape import steering

_PLAIN = StepChange(None, None)


class Corrector(Interceptor):
    """Carries out what a correction does to the sampler's own step.

    The plan is made at the first step of a run, when eta and the first index are known, and kept for
    later runs with the same schedule. Which of its steps is taken is read off the timestep: a loop may
    repeat steps, leave some out, or take them in another order.

    An identity plan leaves every tensor untouched: not even a cast.

    Attributes:
        index: of the step that is taken, in the plan; -1 where it is none of the plan's.

    """

    correction: Correction

    def __init__(
        self,
        correction: Correction,
        pipeline: Any,
        *,
        layout: LatentLayout | None = None,
        allow_range: bool = False,
    ) -> None:
        self.correction = correction
        self.layout = layout
        self.allow_range = allow_range
        self.plan: SamplerPlan | None = None
        self.pipeline: weakref.ref[Any] | None = None if pipeline is None else weakref.ref(pipeline)
        self.index = -1
        self._plans: dict[tuple[Any, ...], tuple[SamplerPlan, OutOfRange | None]] = {}
        self._prepared: dict[torch.device, list[StepChange]] = {}
        self._steps: list[StepChange] = []
        self._refusal: OutOfRange | None = None
        self._wide = False
        self._places: Places | None = None
        self._begin = 0
        self._steering: dict[str, Any] = {}
        self._begun = self._repeats = self._said = False
        self._change = _PLAIN
        self._lags = 0
        self._noise: ImageNoise | None = None
        self._sizes: set[tuple[int, ...]] = set()  # that were remarked on
        self._samples: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference can be neither copied nor pickled; a copied scheduler lives without it.
        return {**self.__dict__, "pipeline": None, "_places": None, "_begun": False}

    @property
    def is_sequential(self) -> bool:
        """Whether this run takes the plan's steps one after the other, each once, as far as it went."""
        return not self._repeats

    def begin(self, scheduler: Any) -> None:
        self._begun, self._repeats, self.index = False, False, -1
        self._forget()

    def wide(self) -> bool:
        return self._wide and self.index >= 0

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        steered = steering(kwargs)
        if self._places is None or not self._places.belong_to(scheduler):
            self._places, self._begun = Places(scheduler), False
        elif not self._begun:
            self._places.restart()
        place = self._places.of_step(scheduler, timestep)
        if place is None:
            self._leave(timestep)
            return
        if not self._begun or place < self._begin or steered != self._steering:
            self._start(scheduler, place, sample, steered)
        self._take(place - self._begin)

    def edit(self, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        change = self._change.edit
        if change is None:
            return output
        if output.shape != sample.shape:
            raise UnsupportedSampler(
                f"{type(scheduler).__name__} is handed outputs of shape {tuple(output.shape)} for "
                f"samples of {tuple(sample.shape)}; {self.correction.name} edits outputs of the sample's "
                f"shape, with or without as many channels of a learned variance."
            )
        if change.std is not None and (self._noise is None or len(self._noise) != len(sample)):
            self._noise = ImageNoise(sample, change.seed)
        return change(output, sample, self._noise)

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        if self._lags:
            self._samples = [sample, *self._samples[: self._lags]]
            self._outputs = [output, *self._outputs[: self._lags]]
        stretch = self._change.stretch
        if stretch is None:
            return result
        return stretch(result, self._samples or [sample], self._outputs or [output])

    def _forget(self) -> None:
        self._samples, self._outputs, self._noise = [], [], None

    def _take(self, index: int) -> None:
        """Of the plan's steps this one."""
        if index >= len(self._steps):
            self.index, self._change = -1, _PLAIN
            if self._refusal is not None:
                raise self._refusal
            return
        if index != self.index + 1:
            self._repeats = self._repeats or index == self.index
            noise = None if index < self.index else self._noise
            self._forget()
            self._noise = noise
        self.index, self._change = index, self._steps[index]
        stretch = self._change.stretch
        needed = 0 if stretch is None else stretch.reach
        if needed and (self._repeats or needed > len(self._samples)):
            self._say(
                f"step {index} of this run is corrected with what was {needed} steps before it, but the "
                f"steps are not taken one after the other: it is left alone."
            )
            self._change = _PLAIN

    def _leave(self, timestep: Any) -> None:
        self.index, self._change = -1, _PLAIN
        self._say(
            f"the scheduler is asked for a step at timestep {float(timestep):.6g}, which is none of its "
            f"schedule: it is left alone."
        )

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            warnings.warn(f"{self.correction.name}: {what}", UserWarning, stacklevel=2)

    def _start(
        self, scheduler: Any, begin: int, sample: Tensor, step_kwargs: dict[str, Any]
    ) -> None:
        pipeline = self.pipeline() if self.pipeline is not None else None
        if self.layout is None:
            self.layout = find_layout(pipeline, sample)
        sigmas = getattr(scheduler, "sigmas", None)
        key = (
            tuple(scheduler.timesteps.tolist()),
            tuple(sigmas.tolist()) if isinstance(sigmas, Tensor) else None,
            begin,
            tuple(sorted(step_kwargs.items())),
        )
        if key not in self._plans:
            law = probe_scheduler(scheduler, step_kwargs=step_kwargs, begin=begin)
            self._plans = {key: planned(self.correction, law, allow_range=self.allow_range)}
            self._prepared = {}
        plan, self._refusal = self._plans[key]
        self._compare_size(sample, plan)
        if sample.device not in self._prepared:
            self._prepared[sample.device] = [
                StepChange.of(plan, k, self.layout, sample.device) for k in range(plan.law.steps)
            ]
        self.plan, self._steps = plan, self._prepared[sample.device]
        self._begun, self._begin, self._steering = True, begin, step_kwargs
        self._wide = not plan.is_identity
        self._lags = plan.samples.shape[1] - 1
        self.index = -1
        self._forget()

    def _compare_size(self, sample: Tensor, plan: SamplerPlan) -> None:
        """Say once that what is sampled has another size than what was measured; refuse what cannot be.

        Raises:
            Incompatible: the plan shifts every element of the state, and has others.

        """
        made_for, found = self.correction.made_for, tuple(sample.shape[1:])
        if plan.shift is not None and plan.shift[0].numel() > 1:
            expected = tuple(plan.shift.shape[1:])[-len(found) :]
            pairs = zip(expected[::-1], found[::-1], strict=False)
            if any(e not in (1, f) for e, f in pairs):
                raise Incompatible(
                    f"{self.correction.name} shifts every element of latents of shape {expected}; this run "
                    f"samples {found}. Calibrate at this resolution, or use a correction per channel."
                )
        if made_for is None or found == tuple(made_for.latent_shape) or found in self._sizes:
            return
        self._sizes.add(found)
        # No warning: whoever turns these into errors may well want to sample at another size.
        logging.getLogger("evenkeel").warning(
            "%s was measured on latents of shape %s, and this run samples %s: its numbers are used as they "
            "are, and nobody has measured them at this resolution. Calibrate at it to be sure.",
            self.correction.name,
            tuple(made_for.latent_shape),
            found,
        )
