"""Apply a correction to a pipeline, take it off again, and say what it does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from evenkeel.corrections.base import Correction, refuse_foreign
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import EvenkeelError, Incompatible
from evenkeel.hosts.actuators.binding import PLAIN, Binding, sweep
from evenkeel.hosts.actuators.guidance import refuse_guidance
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.scheduler.interception import (
    APPLIED,
    groups_of,
    install_groups,
    installed,
    set_aside,
    uninstall,
)
from evenkeel.statistics.provenance import Provenance
from evenkeel.storage import json_safe

ALLOWANCES = ("denoiser", "scheduler", "guidance", "range")


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
    (``Readout``) adds their changes beside the denoiser's head: no weight is written. Applying again
    replaces the correction before.

    It acts in runs of this pipeline, and of those that share its scheduler and have no correction of
    their own; on steps for which this denoiser was called; as long as its weights and adapters are what
    they were, and guidance combines its outputs as it was calibrated. Other runs and steps are left alone,
    with one warning, or refused. Copies of the pipeline or of its scheduler keep the correction.
    Pipelines that sample at the same time need a scheduler each.

    Args:
        pipeline: with the *quantized* denoiser in place.
        correction: for example ``QDrift(record.evidence)``; of any subclass of ``Correction``.
        allow: mismatches with the record to accept, by name: ``denoiser``, ``scheduler``,
            ``guidance``, and ``range`` (leave steps outside the calibrated noise levels alone).
        guidance_scale: what you are going to sample with, to be refused now and not in the first step.
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
    denoiser, scheduler = denoiser_of(pipeline), _scheduler_of(pipeline)
    provenance = correction.made_for
    if {*correction.stages} <= {"head", "layers"}:
        allow = {*allow, "guidance"}  # both act before guidance
    if correction.stages == ("layers",):
        allow = {*allow, "scheduler"}
    if provenance is not None:
        if "scheduler" not in allow:
            _refuse_scheduler(scheduler, provenance)
        if "guidance" not in allow:
            refuse_guidance(provenance, guidance_scale)
        if "denoiser" not in allow:  # last: it takes longest
            _refuse_denoiser(recognise(denoiser), provenance)
        layout = layout or LatentLayout(**provenance.layout)
    binding = Binding(correction, layout=layout, allow=allow)
    binding.bind(pipeline, scheduler, denoiser)
    own = pipeline.__dict__.pop(APPLIED, None)
    if isinstance(own, Binding) and own.pipeline is pipeline:
        own.release()
    others = [g for g in _bindings(scheduler) if _is_in_use(g, pipeline)]
    for replaced in set(_bindings(scheduler)) - set(others):
        replaced.detach()
    install_groups(scheduler, [*others, binding])
    pipeline.__dict__[APPLIED] = binding


def remove(pipeline: Any) -> None:
    """Take the correction off; the pipeline samples as before, bit for bit. Harmless without one.

    A pipeline without a correction of its own, whose scheduler it shares with one that has some, takes
    those off. One with its own takes off its own, and samples without any while the others keep theirs.
    """
    own, scheduler = pipeline.__dict__.pop(APPLIED, None), pipeline.scheduler
    groups = groups_of(scheduler)
    if isinstance(own, Binding):
        if own.pipeline is pipeline:
            own.release()
        sweep(denoiser_of(pipeline))
    others = [g for g in groups if isinstance(own, Binding) and _is_in_use(g, pipeline)]
    others = [g for g in others if getattr(g, "token", "") != own.token]
    for group in groups:
        if group not in others:
            group.detach()
    uninstall(scheduler)
    if others:
        install_groups(scheduler, others)
        pipeline.__dict__[APPLIED] = PLAIN


def _bindings(scheduler: Any) -> list[Binding]:
    return [g for g in groups_of(scheduler) if isinstance(g, Binding)]


def _is_in_use(group: Any, pipeline: Any) -> bool:
    """Whether it belongs to another pipeline, which still uses its scheduler."""
    other = group.pipeline if isinstance(group, Binding) else None
    return other is not None and other is not pipeline


def _scheduler_of(pipeline: Any) -> Any:
    scheduler = pipeline.scheduler
    if all(callable(getattr(type(scheduler), name, None)) for name in ("step", "set_timesteps")):
        return scheduler
    raise Incompatible(
        f"expected a scheduler with step and set_timesteps of its own; this {type(scheduler).__name__} only "
        f"hands them on. Put the scheduler inside of it into the pipeline, and apply the correction then."
    )


@contextmanager
def applied(pipeline: Any, correction: Correction, **options: Any) -> Iterator[Any]:
    """``with evenkeel.applied(pipe, correction): ...``; afterwards what was there before is back.

    Args:
        pipeline: as for ``apply``.
        correction: as for ``apply``.
        **options: ``allow``, ``guidance_scale``, ``layout``, ``recognise``, as for ``apply``.

    """
    with set_aside(pipeline):
        apply(pipeline, correction, **options)
        try:
            yield pipeline
        finally:
            remove(pipeline)


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
    own = pipeline.__dict__.get(APPLIED)
    if own == PLAIN:
        return Summary(None, (), scheduler, None)
    found = [own] if isinstance(own, Binding) else _bindings(pipeline.scheduler)
    for binding in found[:1]:
        given = binding.correction
        return Summary(given.name, given.references, scheduler, binding.plan, given.report)
    for interceptor in installed(pipeline.scheduler):
        if interceptor.correction is not None:
            given = interceptor.correction
            return Summary(given.name, given.references, scheduler, interceptor.plan, given.report)
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
