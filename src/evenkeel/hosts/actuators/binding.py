"""Bind a correction to the runs of one pipeline, its scheduler and its denoiser."""

from __future__ import annotations

import threading
import uuid
import warnings
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.hosts.actuators.correcting import interceptors_of
from evenkeel.hosts.actuators.guidance import refuse_combination, refuse_guidance
from evenkeel.hosts.actuators.stamp import Stamp
from evenkeel.hosts.pipeline.callers import caller
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.identity import Identity
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import denoiser_of, uncompiled
from evenkeel.hosts.scheduler.groups import Group, Turn
from evenkeel.hosts.scheduler.interception import (
    APPLIED,
    begin_run,
    groups_of,
    install_groups,
    uninstall,
)

PLAIN = "plain"  # in place of a binding: this pipeline samples without, whatever its scheduler has


class Binding(Group):
    """A correction that acts in the runs it was made for, and in no others.

    A run is ours if our pipeline makes it, or one that shares our scheduler and has no correction of its own.
    A step is ours if our denoiser was called for it, which a hook on the denoiser notes. Before a run
    the denoiser's cheap identity is compared, and its fingerprint only where that has moved. What is not
    ours is left alone, and the first time it is said.

    Copies of the pipeline or of its scheduler carry the correction along and take hold of their own
    denoiser when they run first.

    Args:
        correction: to carry out.
        layout: of the latents, if it is known.
        allow: see ``apply``.

    """

    is_exclusive = True

    def __init__(
        self,
        correction: Correction,
        *,
        layout: LatentLayout | None = None,
        allow: Collection[str] = (),
        token: str = "",
    ) -> None:
        super().__init__()
        self.correction, self.layout, self.allow = correction, layout, tuple(sorted(allow))
        self.token = token or uuid.uuid4().hex
        self.turn = Turn()
        self._guided: Any = None  # what was known of this run's guidance when it was checked last
        self._pipeline: weakref.ref[Any] | None = None
        self._scheduler: weakref.ref[Any] | None = None
        self._denoiser: weakref.ref[nn.Module] | None = None
        self._stamp: Stamp | None = None
        self._identity: Identity | None = None
        self._begun: Any = None  # the timesteps of the run that began last
        self._loop = 0  # the thread of a run that no pipeline makes
        self._origin: weakref.ref[nn.Module] | None = None  # the denoiser of what this is a copy of
        self._moved_from: Binding | None = None  # on the scheduler that our pipeline had before
        self._refused = ""
        self._said: set[str] = set()
        self._handles: list[Any] = []
        finalizer = weakref.finalize(self, _let_go, self.interceptors, self._handles)
        finalizer.atexit = False

    def __deepcopy__(self, memo: Any) -> Binding:
        return self  # what it is bound to is not copied with it; the copied scheduler has its own

    def __reduce__(self) -> Any:
        return _again, (self.correction, self.layout, self.allow, self.token)

    def copied(self) -> Binding:
        """For a copy of the scheduler: bound by its first run."""
        twin = Binding(self.correction, layout=self.layout, allow=self.allow, token=self.token)
        twin._origin = self._origin if self._denoiser is None else self._denoiser
        return twin

    @property
    def pipeline(self) -> Any:
        """That it was applied to; None where that is gone, or not known yet."""
        return None if self._pipeline is None else self._pipeline()

    @property
    def plan(self) -> SamplerPlan | None:
        """The numbers of the latest run."""
        return next((i.plan for i in self.interceptors if i.plan is not None), None)

    @property
    def only_layers(self) -> bool:
        """Whether it acts beside layers only, whatever scheduler there is."""
        return self.correction.stages == ("layers",)

    # ---- taking hold

    def bind(self, pipeline: Any, scheduler: Any, denoiser: nn.Module) -> None:
        """Act on these from now on.

        Raises:
            Incompatible: the correction does not fit this denoiser.

        """
        found = interceptors_of(
            self.correction,
            pipeline,
            denoiser,
            layout=self.layout,
            allow_range="range" in self.allow,
        )
        self.detach()
        self.interceptors[:] = found
        for interceptor in found:
            interceptor.turn = self.turn
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._scheduler = weakref.ref(scheduler)
        self._denoiser = weakref.ref(denoiser)
        self._identity, self._refused, self._begun = Identity.of(denoiser), "", None
        self.attach()

    def attach(self) -> None:
        """Take hold of the denoiser."""
        denoiser = self._denoiser() if self._denoiser is not None else None
        if denoiser is None or self._handles:
            return
        sweep(denoiser)
        traced = any(i.on_denoiser for i in self.interceptors)
        self._stamp = Stamp(self, self.turn, light=not traced)
        before = denoiser.register_forward_pre_hook(self._stamp.called, with_kwargs=True)
        super().attach()
        after = denoiser.register_forward_hook(self._stamp.answered, always_call=True)
        self._handles[:] = [before, after]

    def detach(self) -> None:
        """Let go of it."""
        _let_go(self.interceptors, self._handles)

    def release(self) -> None:
        """Let go of the denoiser, and of the scheduler that it was installed on.

        The pipeline may have another scheduler since, and other pipelines the old one.
        """
        self.detach()
        before, self._moved_from = self._moved_from, None
        if before is not None:
            before.release()
        scheduler = None if self._scheduler is None else self._scheduler()
        if scheduler is None or self not in (held := groups_of(scheduler)):
            return
        uninstall(scheduler)
        if others := [g for g in held if g is not self]:
            install_groups(scheduler, others)

    def _retake(self, pipeline: Any, scheduler: Any) -> None:
        """Hold what the pipeline calls now: its denoiser may be compiled since, or copied."""
        denoiser = denoiser_of(pipeline)
        held = self._denoiser() if self._denoiser is not None else None
        if held is denoiser and self._handles:
            return
        if held is not None and uncompiled(held) is not uncompiled(denoiser):
            return  # another one: its steps bear no stamp of ours
        known = held is not None or _is_copy(denoiser, self.token)
        if not known and self._unknown(denoiser):
            return
        identity = self._identity
        self.bind(pipeline, scheduler, denoiser)
        self._identity = identity if held is not None else self._identity
        before = pipeline.__dict__.get(APPLIED)
        if isinstance(before, Binding) and before is not self and before.pipeline is pipeline:
            self._moved_from = before
        pipeline.__dict__[APPLIED] = self

    def _unknown(self, denoiser: nn.Module) -> str:
        """Why this denoiser is not the one that the correction is for, or ""."""
        made_for = self.correction.made_for
        if made_for is None:
            return "it is another denoiser than the one that the correction was applied to"
        if "denoiser" in self.allow or fingerprint(denoiser) == made_for.quantized:
            return ""
        return (
            f"its denoiser is not the one that the correction was made for ({made_for.quantizer})"
        )

    # ---- whose run, whose step

    def claims(self, scheduler: Any, pipeline: Any, rivals: int) -> bool:
        """Whether the run that begins now is ours."""
        own = None if pipeline is None else pipeline.__dict__.get(APPLIED)
        ours = own is not None and getattr(own, "token", "") == self.token
        if own is not None and not ours:
            return False
        if not ours and rivals:
            if pipeline is None:
                self._say(
                    None,
                    "several pipelines share this scheduler, each with a correction of its own",
                )
            return False
        origin = None if self._origin is None else self._origin()
        if pipeline is not None:
            self._retake(pipeline, scheduler)
        elif self._denoiser is None and origin is not None:
            self.bind(None, scheduler, origin)
        self._loop = threading.get_ident() if pipeline is None else 0
        self._begun, self._refused, self._guided = scheduler.timesteps, "", None
        self._scheduler = weakref.ref(scheduler)
        if self._stamp is not None:
            self._stamp.clear()
        self._check_denoiser(pipeline)
        return True

    def owns_call(self) -> bool:
        """Whether the call that the denoiser receives now is made by a run of ours."""
        pipeline = caller()
        scheduler = None if self._scheduler is None else self._scheduler()
        if pipeline is None:
            return self.only_layers or self._loop == threading.get_ident()
        own = pipeline.__dict__.get(APPLIED)
        ours = own is not None and getattr(own, "token", "") == self.token
        if own is not None and not ours:
            return False
        shares = pipeline.scheduler is scheduler
        if ours and not shares:
            if any(getattr(g, "token", "") == self.token for g in groups_of(pipeline.scheduler)):
                return False  # a copy, with a binding of its own
            if self.only_layers:
                return not self._refused
            self._say(
                pipeline,
                f"the scheduler of this {type(pipeline).__name__} was replaced after evenkeel.apply "
                f"(Scheduler.from_config makes a new object): the correction is gone and this run is "
                f"uncorrected. Call evenkeel.apply again, or evenkeel.remove first to silence this.",
            )
            return False
        if not shares:
            return False
        groups = groups_of(scheduler)
        if self in groups and self._begun is not getattr(scheduler, "timesteps", None):
            begin_run(scheduler)  # set_timesteps went past us
        others = [g for g in groups if isinstance(g, Binding) and g is not self]
        return not self._refused and (ours or not others)

    def acts(self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor) -> bool:
        """Whether our denoiser was called for this step."""
        if self.only_layers or self._refused:
            return False
        if self._stamp is None or not self._stamp.taken(timestep):
            pipeline = caller()
            whose = "this loop" if pipeline is None else f"this {type(pipeline).__name__}"
            self._say(
                pipeline,
                f"{whose} hands its scheduler what another denoiser gave than the one that "
                f"{self.correction.name} was applied to: such steps are left alone. Apply the correction to "
                f"the pipeline as it samples, or call evenkeel.remove.",
            )
            return False
        self._check_guidance(caller(), output)
        return True

    def _check_guidance(self, pipeline: Any, output: Tensor) -> None:
        """At a run's first step, and wherever something says that guidance has changed."""
        made_for, answers = self.correction.made_for, self._answers()
        if made_for is None or "guidance" in self.allow:
            return
        scale = getattr(pipeline, "_guidance_scale", None)
        state = (scale, [len(a) for a in answers], len(output))
        if state != self._guided:
            refuse_guidance(made_for, scale)
            refuse_combination(made_for, answers, output)
            self._guided = state

    def _answers(self) -> list[Tensor]:
        return [] if self._stamp is None else self._stamp.answers

    def _check_denoiser(self, pipeline: Any) -> None:
        """Refuse a run of a denoiser that was changed since it was recognised."""
        denoiser = self._denoiser() if self._denoiser is not None else None
        made_for = self.correction.made_for
        if denoiser is None or made_for is None or "denoiser" in self.allow:
            return
        now, before = Identity.of(denoiser), self._identity
        if before is None or now == before:
            self._identity = now
            return
        if now.adapters != before.adapters:
            self._refused = "adapters were loaded, switched or scaled since"
        elif fingerprint(denoiser) != made_for.quantized:
            self._refused = "its weights were changed since"
        else:
            self._identity = now
        if self._refused:
            self._say(
                pipeline,
                f"{self.correction.name} was made for this {type(uncompiled(denoiser)).__name__} as it was; "
                f"{self._refused}. Its runs are left alone: calibrate anew, or apply with "
                f"allow=('denoiser',).",
            )

    def _say(self, pipeline: Any, what: str) -> None:
        """A warning, once for every pipeline and matter."""
        key = f"{id(pipeline)} {what[:60]}"
        if key not in self._said:
            self._said.add(key)
            warnings.warn(what, UserWarning, stacklevel=2)


def _again(
    correction: Correction, layout: LatentLayout | None, allow: tuple[str, ...], token: str
) -> Binding:
    return Binding(correction, layout=layout, allow=allow, token=token)


def _let_go(interceptors: list[Any], handles: list[Any]) -> None:
    for interceptor in interceptors:
        interceptor.detach()
    for handle in handles:
        handle.remove()
    handles.clear()


def _is_copy(denoiser: nn.Module, token: str) -> bool:
    """Whether a copy of our stamp came along with this denoiser."""
    hooks = uncompiled(denoiser)._forward_pre_hooks.values()
    return any(getattr(getattr(h, "__self__", h), "token", "") == token for h in hooks)


def sweep(denoiser: nn.Module) -> None:
    """Take off what copies of hooks a copied denoiser brought along."""
    for part in uncompiled(denoiser).modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [k for k, h in hooks.items() if _is_dead(h)]:
                del hooks[key]


def _is_dead(hook: Any) -> bool:
    return bool(getattr(getattr(hook, "__self__", hook), "is_dead", False))
