"""Apply a correction to a pipeline, take it off again, and say what it does."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from evenkeel.corrections.base import Correction, refuse_foreign
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import EvenkeelError, Incompatible
from evenkeel.hosts.actuators.correcting import interceptors_of
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.scheduler.interception import APPLIED, install, installed, set_aside, uninstall
from evenkeel.statistics.provenance import Provenance
from evenkeel.storage import json_safe

ALLOWANCES = ("denoiser", "scheduler", "guidance", "range")
_GUARD = "_evenkeel_guard"


def apply(
    pipeline: Any,
    correction: Correction,
    *,
    allow: Collection[str] = (),
    guidance_scale: float | None = None,
    layout: LatentLayout | None = None,
    recognise: Callable[[nn.Module], str] = fingerprint,
) -> None:
    """Let ``correction`` change how this pipeline samples, until ``remove``.

    The scheduler instance is given a subclass of its own class; nothing else of the pipeline
    changes, and what ``save_pretrained`` writes is plain diffusers. A correction with heads of its own
    (``Readout``) also exchanges the weights of the denoiser's output head from step to step; between
    runs it has its own. Applying again replaces the correction before.

    Args:
        pipeline: with the *quantized* denoiser in place.
        correction: for example ``QDrift(record.evidence)``; of any subclass of ``Correction``.
        allow: mismatches with the record to accept, by name: ``denoiser``, ``scheduler``,
            ``guidance``, and ``range`` (leave steps outside the calibrated noise levels alone).
        guidance_scale: what you are going to sample with, if the pipeline does not tell (most tell
            while they run; PixArt does not).
        layout: where the latent's channels are; found by itself for known pipelines.
        recognise: gives the denoiser's fingerprint; of one that is known already, without looking again.

    Raises:
        Incompatible: the evidence was measured on another denoiser, scheduler or guidance scale; or
            this is no ``Correction``.
        EvenkeelError: an unknown name in ``allow``.

    Example: see ``examples/three_lines.py``.

    """
    unknown = sorted(set(allow) - set(ALLOWANCES))
    if unknown:
        raise EvenkeelError(f"allow= takes names out of {ALLOWANCES}; got {unknown}.")
    refuse_foreign(correction)
    provenance, guard = correction.made_for, _SwapGuard(pipeline)
    if {*correction.stages} <= {"head", "layers"}:
        allow = {*allow, "guidance"}  # both act before guidance
    if correction.stages == ("layers",):
        allow = {*allow, "scheduler"}
    if provenance is not None:
        if "scheduler" not in allow:
            _refuse_scheduler(pipeline.scheduler, provenance)
        if "guidance" not in allow:
            _check_guidance(provenance, guidance_scale)
        if "denoiser" not in allow:  # last: it takes longest
            with _heads_at_rest(pipeline):
                _refuse_denoiser(recognise(denoiser_of(pipeline)), provenance)
        layout = layout or LatentLayout(**provenance.layout)

    def check(running: Any) -> None:
        if provenance is not None and "guidance" not in allow:
            _check_guidance(provenance, getattr(running, "_guidance_scale", None))

    denoiser = denoiser_of(pipeline)
    interceptors = interceptors_of(
        correction,
        pipeline,
        denoiser,
        layout=layout,
        allow_range="range" in allow,
        check=check,
    )
    remove(pipeline)
    install(pipeline.scheduler, *interceptors)
    pipeline.__dict__[APPLIED] = interceptors
    for interceptor in interceptors:
        interceptor.attach()
    # The denoiser warns when the scheduler is replaced.
    pipeline.__dict__[_GUARD] = denoiser.register_forward_pre_hook(guard)


def remove(pipeline: Any) -> None:
    """Take the correction off; the pipeline samples as before, bit for bit. Harmless without one."""
    # Those of a pipeline that shares the scheduler, and those kept with this one: its scheduler or
    # denoiser may have been exchanged meanwhile.
    for interceptor in (*installed(pipeline.scheduler), *pipeline.__dict__.pop(APPLIED, ())):
        interceptor.detach()
    uninstall(pipeline.scheduler)
    handle = pipeline.__dict__.pop(_GUARD, None)
    if handle is not None:
        handle.remove()


@contextmanager
def _heads_at_rest(pipeline: Any) -> Iterator[None]:
    """Inside, the denoiser has its own head, so that it can be recognised."""
    interceptors = pipeline.__dict__.get(APPLIED, ())
    for interceptor in interceptors:
        interceptor.detach()
    try:
        yield
    finally:
        for interceptor in interceptors:
            interceptor.attach()


@contextmanager
def applied(pipeline: Any, correction: Correction, **options: Any) -> Iterator[Any]:
    """``with evenkeel.applied(pipe, correction): ...``; afterwards what was there before is back.

    Args:
        pipeline: as for ``apply``.
        correction: as for ``apply``.
        **options: ``allow``, ``guidance_scale``, ``layout``, ``recognise``, as for ``apply``.

    """
    guard = pipeline.__dict__.pop(_GUARD, None)
    try:
        with set_aside(pipeline):
            apply(pipeline, correction, **options)
            try:
                yield pipeline
            finally:
                remove(pipeline)
    finally:
        if guard is not None:
            pipeline.__dict__[_GUARD] = guard


@dataclass(frozen=True)
class Summary:
    """What is applied to a pipeline.

    Attributes:
        correction: its name, or None.
        references: papers and equations.
        scheduler: class name.
        plan: the numbers of the latest run; None before the first one.
        heads: how each step's output head was refitted, as text; "" where it is not changed.

    """

    correction: str | None
    references: tuple[str, ...]
    scheduler: str
    plan: SamplerPlan | None
    heads: str = ""

    def __str__(self) -> str:
        if self.correction is None:
            return f"no correction is applied to {self.scheduler}"
        lines = [f"{self.correction} on {self.scheduler} ({'; '.join(self.references)})"]
        if self.heads:
            lines.append(self.heads)
        if self.plan is None:
            lines.append("the factors are computed at the first step of the next run")
            return "\n".join(lines)
        for k, note in enumerate(self.plan.explanations):
            factors = " ".join(f"{f:.6f}" for f in self.plan.factor[k])
            lines.append(
                f"step {k:3d}  t={self.plan.law.timesteps[k]:8.2f}  {factors}{_changes(self.plan, k)}  "
                f"{note}"
            )
        return "\n".join(lines)


def _changes(plan: SamplerPlan, k: int) -> str:
    """What a step has beside its factor, as text."""
    parts = []
    if plan.edit is not None and bool(plan.edit.active[k]):
        parts.append("output x " + " ".join(f"{g:.4f}" for g in plan.edit.gain[k]))
    if bool((plan.noise[k] != 1).any()):
        parts.append("noise x " + " ".join(f"{n:.4f}" for n in plan.noise[k]))
    if plan.relabel is not None and bool(plan.relabel.active[k]):
        parts.append(f"told t={float(plan.relabel.timestep[k]):.2f}")
    if plan.shift is not None and bool(plan.shift[k].any()):
        parts.append(
            f"state shifted by {float(plan.shift[k].double().pow(2).mean().sqrt()):.4f} rms"
        )
    return "".join(f"  {part}" for part in parts)


def summary(pipeline: Any) -> Summary:
    """Which correction is applied, and its factors per step once it has run."""
    scheduler = type(pipeline.scheduler).__name__
    for interceptor in installed(pipeline.scheduler):
        found = interceptor.correction
        if found is not None:
            plan = interceptor.plan
            return Summary(found.name, found.references, scheduler, plan, found.report)
    return Summary(None, (), scheduler, None)


def _refuse_denoiser(found: str, made_for: Provenance) -> None:
    if found == made_for.reference:
        raise Incompatible(
            f"the pipeline's {made_for.denoiser} is the full-precision one; put the quantized one in "
            f"first: pipe.{made_for.denoiser} = quantized."
        )
    if found != made_for.quantized:
        raise Incompatible(
            f"the pipeline's {made_for.denoiser} ({found}) is not the one the record was made for "
            f"({made_for.quantized}, {made_for.quantizer}). Calibrate with this one, or pass "
            f"allow=('denoiser',)."
        )


def _refuse_scheduler(scheduler: Any, made_for: Provenance) -> None:
    found = type(scheduler).__name__
    config, now = made_for.scheduler_config, json_safe(dict(scheduler.config))
    changed = [k for k, v in config.items() if now.get(k) != v]
    if found != made_for.scheduler_class or changed:
        details = "; ".join(f"{k}: calibrated {config[k]!r}, now {now.get(k)!r}" for k in changed)
        raise Incompatible(
            f"the record was made for {made_for.scheduler_class}, the pipeline has {found}"
            f"{': ' + details if details else ''}. Calibrate with this scheduler, or pass "
            f"allow=('scheduler',)."
        )


def _check_guidance(made_for: Provenance, guidance_scale: Any) -> None:
    calibrated = made_for.guidance_scale
    if guidance_scale is None or calibrated is None or guidance_scale == calibrated:
        return
    raise Incompatible(
        f"the record was calibrated at guidance_scale={calibrated}, this run uses {guidance_scale}; the "
        f"error after guidance grows with it. Calibrate at this scale, or pass allow=('guidance',)."
    )


class _SwapGuard:
    """Warns, at the next denoiser call, when the scheduler was replaced and the correction lost."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._scheduler = weakref.ref(pipeline.scheduler)
        self._warned = False

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        pipeline = self._pipeline() if self._pipeline is not None else None
        if pipeline is None or self._warned:
            return
        replaced = pipeline.scheduler is not self._scheduler()
        applied_to = pipeline.__dict__.get(APPLIED, ())
        if replaced and not installed(pipeline.scheduler):
            if not any(interceptor.on_steps for interceptor in applied_to):
                return  # beside the layers: any scheduler will do
            self._warned = True
            for interceptor in applied_to:
                interceptor.detach()  # a run that was interrupted left a step's head in place
            warnings.warn(
                f"the scheduler of this {type(pipeline).__name__} was replaced after evenkeel.apply "
                f"(Scheduler.from_config makes a new object): the correction is gone and this run is "
                f"uncorrected. Call evenkeel.apply again, or evenkeel.remove first to silence this.",
                UserWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied or pickled; a copied denoiser is no longer guarded.
        return {"_pipeline": None, "_scheduler": None, "_warned": False}
