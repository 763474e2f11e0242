"""What a plan changes inside the denoiser call: the noise level it is told, and one branch's output."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import OutputEdit, SamplerPlan
from evenkeel.errors import Incompatible, OutOfRange, UnsupportedPipeline, UnsupportedSampler
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.actuators.keyworded import keyworded
from evenkeel.hosts.actuators.planned import planned
from evenkeel.hosts.actuators.told_level import SAMPLE_NAMES, TIME_NAMES, LevelTeller, argument_of
from evenkeel.hosts.pipeline.layouts import LatentLayout, find_layout
from evenkeel.hosts.pipeline.pipelines import forget_graphs
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.hosts.scheduler.places import Places
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.hosts.scheduler.tape import steering


class DenoiserEdit(Interceptor):
    """Carries out ``relabel`` and a per-branch ``edit`` of a correction's plan.

    ``attach`` before the first run; ``detach`` takes the hooks off. The step is the one that the denoiser
    is told. A step that the plan leaves alone gets and gives its tensors as they are.

    A branch is a half of the denoiser's batch, where its latents are one half twice, and otherwise a
    call of its own: the first of a step is branch 0.

    Args:
        corrector: of the same correction; tells the pipeline, to find the latents' layout if none is
            given.
        denoiser: whose calls are changed; held weakly.

    """

    on_denoiser = True
    correction: Correction

    def __init__(self, corrector: Corrector, denoiser: nn.Module) -> None:
        self.correction = corrector.correction
        self.layout = corrector.layout
        self.allow_range = corrector.allow_range
        self.plan: SamplerPlan | None = None
        self._pipeline = corrector.pipeline
        self._denoiser: weakref.ref[nn.Module] | None = weakref.ref(denoiser)
        self._scheduler: weakref.ref[Any] | None = None
        self._handles: list[Any] = []
        self._places: Places | None = None
        self._plans: dict[tuple[Any, ...], tuple[SamplerPlan, OutOfRange | None]] = {}
        self._planned_with: dict[str, Any] = {}
        self._begin = 0
        self._refusal: OutOfRange | None = None
        self._index, self._checked = -1, False
        self._calls, self._halved = 0, False
        self._teller = LevelTeller()

    def __getstate__(self) -> dict[str, Any]:
        # A copied scheduler must not take the denoiser along, and a copied denoiser's hooks do nothing.
        lost = dict.fromkeys(("_pipeline", "_denoiser", "_scheduler", "_places"))
        return {**self.__dict__, **lost, "is_dead": True, "_handles": []}

    def attach(self) -> None:
        """Listen to the denoiser's calls; nothing changes before a run begins."""
        denoiser = self._denoiser() if self._denoiser is not None else None
        if denoiser is None or self._handles:
            return
        forget_graphs(denoiser)
        self._handles = [
            denoiser.register_forward_pre_hook(self._called, with_kwargs=True),
            denoiser.register_forward_hook(self._answered),
        ]

    def detach(self) -> None:
        """Listen no longer; the denoiser is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, scheduler: Any) -> None:
        """A new run; it is planned once the denoiser is told where it begins."""
        if not self._handles:
            return
        if self._places is None or not self._places.belong_to(scheduler):
            self._places = Places(scheduler)
        self._places.restart()
        self._scheduler = weakref.ref(scheduler)
        self._teller = LevelTeller()
        self._index, self._checked, self._refusal = -1, False, None
        self._calls, self._halved = 0, False
        self._planned_with, self.plan = {}, None

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Check that the denoiser was called as expected."""
        if not self._handles or self._index < 0:
            return
        steered = {k: v for k, v in steering(kwargs).items() if v}
        if not self._checked and steered != self._planned_with:
            # eta, which only the step knows, may make the levels match
            self.plan, self._refusal = self._planned(scheduler, self._begin, steered)
            self._planned_with = steered
        self._checked = True
        if self._refusal is not None and (self.plan is None or self._index >= self.plan.law.steps):
            raise self._refusal
        if self.plan is None:
            return
        self._teller.shape = tuple(sample.shape[1:])
        if self._branch_edit() is not None and self._calls != (1 if self._halved else 2):
            raise Incompatible(
                f"{self.correction.name} edits one of two guidance branches, but at step {self._index} "
                f"the denoiser was called {self._calls} times, "
                f"{'with' if self._halved else 'without'} the same latents in both halves of its batch. "
                f"Run it with plain classifier-free guidance, or remove the correction."
            )

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """The step's calls have been made."""
        self._calls, self._halved = 0, False
        if self.plan is not None and self._index + 1 >= self.plan.law.steps and self.turn is None:
            self._scheduler = None  # between runs the denoiser is itself
        self._index = -1
        return result

    def _planned(
        self, scheduler: Any, begin: int, step_kwargs: dict[str, Any]
    ) -> tuple[SamplerPlan | None, OutOfRange | None]:
        places = self._places
        assert places is not None  # a run has begun
        sigmas = getattr(scheduler, "sigmas", None)
        levels = tuple(sigmas.tolist()) if isinstance(sigmas, Tensor) else ()
        key = (*places.times, *levels, begin, *sorted(step_kwargs.items()))
        if key not in self._plans:
            law = probe_scheduler(scheduler, step_kwargs=step_kwargs, begin=begin)
            try:
                plan, refusal = planned(self.correction, law, allow_range=self.allow_range)
            except OutOfRange as error:
                return None, error
            _refuse_unusual(plan.edit)
            self._plans = {key: (plan, refusal)}
        return self._plans[key]

    def _place(self, denoiser: nn.Module, arguments: Any, keywords: Any) -> None:
        """Find the step that this call is for, and plan the run with the first."""
        self._index = -1
        scheduler = None if self._scheduler is None else self._scheduler()
        if scheduler is None or self._places is None or not self._handles:
            return
        told = argument_of(denoiser, arguments, keywords, TIME_NAMES)
        place = self._places.of_call(scheduler, told)
        if place is None:
            return
        if (self.plan is None and self._refusal is None) or place < self._begin:
            self._begin = place
            self.plan, self._refusal = self._planned(scheduler, place, {})
        self._index = place - self._begin
        plan = self.plan
        if plan is not None and self._index < plan.law.steps and self._calls == 0:
            self._teller.put_step(plan, self._index)

    def _branch_edit(self) -> OutputEdit | None:
        plan, k = self.plan, self._index
        edit = None if plan is None or not 0 <= k < plan.law.steps else plan.edit
        if edit is None or edit.branch is None or not bool(edit.active[k]):
            return None
        return edit

    # Counting calls inside a graph would compile it anew for every step.
    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    @keyworded
    def _called(self, denoiser: nn.Module, arguments: Any, keywords: Any) -> Any:
        if self.is_idle:  # of another thread, or another pipeline: nothing of ours may move
            return None
        self._place(denoiser, arguments, keywords)
        plan, k = self.plan, self._index
        if plan is None or not 0 <= k < plan.law.steps:
            return None
        if self._branch_edit() is not None:
            sample = argument_of(denoiser, arguments, keywords, SAMPLE_NAMES)
            self._halved = self._halved or _is_doubled(sample)
            if self.layout is None and self._pipeline is not None:
                self.layout = find_layout(self._pipeline(), sample)
        if plan.relabel is None or not bool(plan.relabel.active.any()):
            return None
        return self._teller(denoiser, arguments, keywords)

    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    def _answered(self, denoiser: nn.Module, arguments: Any, output: Any) -> Any:
        edit = None if self.is_idle else self._branch_edit()
        if edit is None or self.layout is None:
            return None
        call = self._calls
        self._calls += 1
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        if self._halved:
            half = len(found) // 2
            rows = slice(0, half) if edit.branch == 0 else slice(half, None)
        elif call == edit.branch:
            rows = slice(None)
        else:
            return None
        changed = _edited(found, rows, edit, self._index, self.layout)
        if isinstance(output, Tensor):
            return changed
        if isinstance(output, tuple):
            return (changed, *output[1:])
        output.sample = changed
        return output


def _is_doubled(sample: Any) -> bool:
    if not isinstance(sample, Tensor) or len(sample) % 2:
        return False
    half = len(sample) // 2
    return torch.equal(sample[:half], sample[half:])


def _edited(output: Tensor, rows: slice, edit: OutputEdit, k: int, layout: LatentLayout) -> Tensor:
    """``gain m + bias`` on some rows, in float32; channels of a learned variance stay."""
    features = layout.channels * layout.patch
    if output.dim() != layout.ndim or output.shape[layout.axis] not in (features, 2 * features):
        raise UnsupportedPipeline(
            f"the denoiser gives {tuple(output.shape)} for latents with {features} features on axis "
            f"{layout.axis}; one of its guidance branches cannot be edited."
        )
    gain, bias = (
        layout.broadcast(values[k]).to(output.device, torch.float32)
        for values in (edit.gain, edit.bias)
    )
    changed = output.clone()
    part = changed[rows].narrow(layout.axis, 0, features)
    part.copy_(part * gain + bias)
    return changed


def _refuse_unusual(edit: OutputEdit | None) -> None:
    if edit is not None and edit.branch is not None and bool(edit.sample.any() or edit.std.any()):
        raise UnsupportedSampler(
            "an edit of one guidance branch takes a gain and a bias; this one adds the sample or noise, "
            "which acts after guidance only (branch=None)."
        )
