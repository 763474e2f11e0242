"""Ask the denoiser a second time within a step, and take off what the answer shows."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.corrections.plan import Refresh, SamplerPlan
from evenkeel.errors import (
    OVERFLOW,
    CalibrationError,
    Incompatible,
    UnsupportedPipeline,
    UnsupportedSampler,
)
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.actuators.keyworded import keyworded
from evenkeel.hosts.actuators.step_change import ImageNoise
from evenkeel.hosts.pipeline.denoiser_calls import (
    Call,
    answer_of,
    as_input,
    branches_of,
    guidance_of,
)
from evenkeel.hosts.scheduler.interception import Interceptor, installed
from evenkeel.sampling.prediction import EpsilonForm, epsilon_form


class Requery(Interceptor):
    """Carries out the refresh steps of a plan.

    A hook remembers the denoiser calls of a step that refreshes, arguments and outputs. How the
    pipeline combined the outputs of the guidance branches is read off what it hands to the scheduler.
    Both are used for a second round of calls at the re-noised state; see ``Refresh``.

    The hook is there only during a run that refreshes: it comes with ``set_timesteps`` and goes with
    the last refresh. One that an interrupted run left behind takes itself off once the correction is
    removed. Calls from other threads belong to other runs and are not looked at.

    Args:
        corrector: makes the plan of each run; comes before this one on the scheduler.
        denoiser: who is asked; held weakly.

    Attributes:
        mu: what the latest refresh of the latest run measured, (images or 1, 1, ...), in units of the
            noise; None before one.

    """

    mu: Tensor | None = None
    _index: int
    _refreshing: list[bool]
    _lags: int
    _calls: list[Call]
    _samples: list[Tensor]
    _outputs: list[Tensor]
    _given: Tensor | None
    _noise: ImageNoise | None

    def __init__(self, corrector: Corrector, denoiser: nn.Module) -> None:
        self._corrector = corrector
        self._denoiser = weakref.ref(denoiser)
        self._scheduler: Any = None
        self._handle: Any = None
        self._thread = 0
        self._start_over()

    def __getstate__(self) -> dict[str, Any]:
        # A copied scheduler must not take the denoiser along; it says so when it would need it.
        lost = dict.fromkeys(("_denoiser", "_scheduler", "_handle", "_noise", "_given"))
        return {**self.__dict__, **lost, "_calls": [], "is_dead": True}

    def listen(self) -> None:
        """Listen to the denoiser's calls; harmless if it does already.

        Raises:
            Incompatible: a second call would go unnoticed or spoil the next one.

        """
        denoiser = self._denoiser() if self._denoiser is not None else None
        if denoiser is None or self._handle is not None:
            return
        if getattr(denoiser, "_compiled_call_impl", None) is not None:
            raise Incompatible(
                f"this {type(denoiser).__name__} was compiled in place (module.compile()), and its graph "
                f"does not notice a new hook. Put torch.compile(module) into the pipeline instead, or "
                f"compile its blocks only."
            )
        if getattr(denoiser, "is_cache_enabled", False):
            raise Incompatible(
                f"a cache is enabled on this {type(denoiser).__name__}; asking it again would mix the "
                f"re-noised state into what it remembers. Call disable_cache() first."
            )
        self._handle = denoiser.register_forward_hook(self._remember, with_kwargs=True)

    def stop(self) -> None:
        """Listen no longer; the denoiser is what it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def begin(self, scheduler: Any) -> None:
        """A new run: which of its steps refresh is known after its first denoiser call."""
        self._start_over()
        self._scheduler = weakref.ref(scheduler)
        self._thread = threading.get_ident()
        self.listen()

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Keep what guidance made of the step's calls."""
        if self._index < 0:
            self._read_plan(scheduler)
        index = self._corrector.index
        if index != self._index + 1:
            self._samples, self._outputs = [], []
        if index < 0 or not self._corrector.is_sequential:
            self._calls, self._given, self._refreshing = [], None, []
            return
        self._index = index
        if self._refreshes():
            self._given = output.detach().clone()

    def edit(self, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        """Take the mean of the latest refresh off the output."""
        if not any(self._refreshing):
            return output
        if output.shape != sample.shape:
            raise UnsupportedSampler(
                f"{type(scheduler).__name__} is handed outputs of shape {tuple(output.shape)} for "
                f"samples of {tuple(sample.shape)}; a correction that asks again edits outputs of the "
                f"sample's shape, with or without as many channels of a learned variance."
            )
        if self._index == 0:
            # The first state is the same whatever the batch; later ones only up to rounding.
            self._noise = ImageNoise(sample, self._rule.seed)
        if self._refreshes():
            self.mu = self._measured(output, sample)
        if self.mu is None:
            return output
        corrected: Tensor = output - self.mu.to(output.dtype) / self._form(self._index).to_eps
        return corrected

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """Remember what the sampler remembers."""
        self._calls, self._given = [], None
        if self._lags:
            self._samples = [sample, *self._samples][: self._lags]
            self._outputs = [output, *self._outputs][: self._lags]
        if not any(self._refreshing[self._index + 1 :]):
            self.stop()
        if self._index + 1 == len(self._refreshing):
            self._start_over()
        return result

    def _start_over(self) -> None:
        self._index, self._refreshing, self._lags = -1, [], 0
        self._calls, self._samples, self._outputs = [], [], []
        self._given, self._noise = None, None

    @property
    def _plan(self) -> SamplerPlan:
        plan = self._corrector.plan
        assert plan is not None  # made in the same step, before us
        return plan

    @property
    def _rule(self) -> Refresh:
        assert self._plan.refresh is not None  # asked at steps that refresh only
        return self._plan.refresh

    def _refreshes(self, ahead: int = 0) -> bool:
        return any(self._refreshing[self._index + ahead : self._index + ahead + 1])

    def _read_plan(self, scheduler: Any) -> None:
        plan, self.mu = self._plan, None
        law, refresh = plan.law, plan.refresh
        self._refreshing = [False] * law.steps if refresh is None else refresh.active.tolist()
        asked = [k for k, refreshes in enumerate(self._refreshing) if refreshes]
        used = abs(law.sample_weights) + abs(law.output_weights) > 1e-12
        self._lags = max((k - int(used[k].argmax()) for k in asked), default=0)
        if not asked:
            return
        if any(i.counts_calls for i in installed(scheduler)):
            raise Incompatible(
                "this readout has a head per guidance branch and tells them apart by the order of the "
                "denoiser's calls; another correction calls it once more per branch. Use one of the two."
            )
        if plan.relabel is not None and bool(plan.relabel.active.any()):
            raise Incompatible(
                "one correction tells the denoiser another noise level than the scheduler's; another "
                "re-noises to the scheduler's and asks again. Use one of the two."
            )

    # Kept out of compiled graphs: it would compile them anew for every step.
    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    @keyworded
    def _remember(self, denoiser: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        scheduler = self._scheduler() if self._scheduler is not None else None
        ours = [] if scheduler is None else installed(scheduler)
        if all(i is not self for i in ours):
            self.stop()  # left behind by a run that was interrupted
        elif (
            not self.is_idle
            and threading.get_ident() == self._thread
            and (self._index < 0 or self._refreshes(1))
        ):
            # clone: CUDA graphs reuse buffers, and some pipelines guide in place.
            kept = answer_of(output).detach().clone()
            self._calls.append(Call(tuple(arguments), dict(keywords), kept))

    def _form(self, k: int) -> EpsilonForm:
        law = self._plan.law
        return epsilon_form(law.prediction, float(law.alpha[k]), float(law.sigma[k]))

    @torch.no_grad()
    def _measured(self, output: Tensor, sample: Tensor) -> Tensor:
        """Mean of (noise that the network predicts at the re-noised state - noise put in)."""
        denoiser = self._denoiser() if self._denoiser is not None else None
        if denoiser is None or self._given is None or self._noise is None:
            raise Incompatible(
                "there is no denoiser to ask again: this scheduler is a copy of the one that the correction "
                "was applied to. Apply it to the pipeline that uses this one."
            )
        if not self._calls:
            raise UnsupportedPipeline(
                f"no call of this {type(denoiser).__name__} was seen before step {self._index}: the "
                f"pipeline uses another denoiser, or calls it in a way that runs no hooks."
            )
        rows, shares = guidance_of([c.output for c in self._calls], self._given)
        noise = self._noise.draw(sample, uniform=False).to(sample.dtype)
        keep, spread = (float(v[self._index]) for v in (self._rule.keep, self._rule.spread))
        renoised = keep * self._provisional(output, sample) + spread * noise
        parts = []
        for call in self._calls:
            answer = call.again(denoiser, as_input(call.sample, sample, renoised))
            parts += [p.to(sample.dtype) for p in branches_of(answer, sample, rows)]
        predicted = torch.stack([s * p for s, p in zip(shares.tolist(), parts, strict=True)]).sum(0)
        predicted = torch.cat([predicted] * (len(sample) // rows))
        form = self._form(self._index)
        left = form.to_eps * predicted + form.from_sample * renoised - noise
        mu: Tensor = left.mean(tuple(range(1, left.dim())), keepdim=True)
        mu = mu if self._rule.per_image else mu.mean(0, keepdim=True)
        if not bool(mu.isfinite().all()):
            raise CalibrationError(
                f"the denoiser, asked again at step {self._index}, gives values that are not finite (NaN "
                f"or infinity); {OVERFLOW}"
            )
        return mu

    def _provisional(self, output: Tensor, sample: Tensor) -> Tensor:
        """The step with this output and earlier, corrected ones, without the noise that it injects."""
        law, k = self._plan.law, self._index
        found = torch.zeros_like(sample)
        history = zip([sample, *self._samples], [output, *self._outputs], strict=True)
        for lag, (x, m) in enumerate(history):
            found = found + float(law.sample_weights[k, k - lag]) * x
            found = found + float(law.output_weights[k, k - lag]) * m
        return found
