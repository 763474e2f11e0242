"""Who sees a scheduler's steps, and on which runs of which pipelines it acts."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evenkeel.errors import Incompatible
from evenkeel.hosts.pipeline.callers import caller, runs_in

if TYPE_CHECKING:  # a scheduler can be watched without any correction
    from evenkeel.corrections.base import Correction
    from evenkeel.corrections.plan import SamplerPlan


class Turn:
    """Whether the denoiser call that this thread is in belongs to a run that a correction acts on.

    Attributes:
        traced: the same for a compiled graph, which knows no threads.

    """

    def __init__(self) -> None:
        self._local: Any = threading.local()
        self.traced = False

    def __reduce__(self) -> Any:
        return Turn, ()  # a copy is nobody's

    @property
    def mine(self) -> bool:
        """Of the latest call in this thread."""
        return bool(getattr(self._local, "mine", False))

    @mine.setter
    def mine(self, value: bool) -> None:
        self._local.mine = self.traced = value

    def here(self) -> bool:
        """Inside of the denoiser, compiled or not."""
        return self.traced if torch.compiler.is_compiling() else self.mine


class Interceptor:
    """Sees every scheduler step; subclasses override what they need.

    ``install`` puts one or several on a scheduler; they run in order. One that changes the denoiser,
    too, does so between ``attach`` and ``detach``.

    Attributes:
        on_denoiser: after a step it makes the denoiser ready for the next one.
        on_steps: what it does depends on the scheduler; False for what acts whatever scheduler there is.
        turn: tells whether the call that the denoiser is in belongs to a run that this acts on.
        is_dead: a copy, which came along with a scheduler or denoiser and acts on nothing.
        correction, plan: what it carries out, and the numbers of the latest run; None if it does not.

    """

    on_denoiser: bool = False
    on_steps: bool = True
    correction: Correction | None = None
    plan: SamplerPlan | None = None
    turn: Turn | None = None
    is_dead: bool = False

    @property
    def counts_calls(self) -> bool:
        """Whether it tells guidance branches apart by the order of the denoiser's calls."""
        return False

    @property
    def is_idle(self) -> bool:
        """Whether the denoiser call that this thread is in is none of ours."""
        return self.turn is not None and not self.turn.mine

    def attach(self) -> None:
        """Take hold of the denoiser; nothing changes before a run begins."""

    def detach(self) -> None:
        """Let go of it; it is what it was."""

    def begin(self, scheduler: Any) -> None:
        """A new run starts (``set_timesteps`` was called, or its first step was set)."""

    def wide(self) -> bool:
        """Whether this run must be computed in float32 whatever the sample's dtype."""
        return False

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Just before the scheduler's own step, with the tensors as the pipeline gave them."""

    def edit(self, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        """Replace the model output before the scheduler sees it (in float32 where ``wide``)."""
        return output

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """Replace the step's result (in float32 where ``wide``); same shape."""
        return result


class Group:
    """Interceptors of one scheduler that act together, in order; these act on every step.

    A subclass says for which runs and at which steps they do.

    Attributes:
        interceptors: of this group.
        is_exclusive: a run that is claimed by one such group is claimed by no other.

    """

    is_exclusive = False

    def __init__(self, interceptors: Sequence[Interceptor] = ()) -> None:
        self.interceptors = list(interceptors)

    def claims(self, scheduler: Any, pipeline: Any, rivals: int) -> bool:
        """Whether a run that begins now is ours, where there are so many other exclusive groups."""
        del scheduler, pipeline, rivals
        return True

    def acts(self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor) -> bool:
        """Whether the step that is taken now is ours."""
        del scheduler, timestep, output, sample
        return True

    def attach(self) -> None:
        """Take hold of the denoiser."""
        for interceptor in self.interceptors:
            interceptor.attach()

    def detach(self) -> None:
        """Let go of it."""
        for interceptor in self.interceptors:
            interceptor.detach()

    def copied(self) -> Group:
        """For a copy of the scheduler."""
        return Group(copy.deepcopy(self.interceptors))


class Held:
    """What is installed on a scheduler, and the run that it is in.

    Some pipelines copy a scheduler's ``__dict__`` back and forth (one per view of a panorama): all of these
    are the same scheduler, with one of this.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.thread = 0
        self.pipeline: weakref.ref[Any] | None = None
        self.acting: list[Group] = []
        self._lock = threading.RLock()
        self._inside = threading.local()

    def __deepcopy__(self, memo: Any) -> Held:
        return self

    def __copy__(self) -> Held:
        return self

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether this is no call from inside of ours: a step that is wrapped may lead here twice."""
        first = not getattr(self._inside, "on", False)
        self._inside.on = True
        try:
            yield first
        finally:
            if first:
                self._inside.on = False

    def refuse_two_runs(self, scheduler: Any) -> None:
        """Before a run begins: another one of this scheduler must not be under way.

        Raises:
            Incompatible: it is; both would take the other's steps.

        """
        other = None if self.pipeline is None else self.pipeline()
        here = threading.get_ident()
        if other is None or other.scheduler is not scheduler:
            return
        nested = self.thread == here and caller() is not other
        if (nested or self.thread != here) and runs_in(self.thread, other):
            raise Incompatible(
                f"a {type(other).__name__} is sampling with this very {type(scheduler).__name__} "
                f"{'around this call' if nested else 'in another thread'}; a scheduler keeps the state of "
                f"one run. Give every pipeline that samples at the same time its own: "
                f"pipe.scheduler = copy.deepcopy(pipe.scheduler), which keeps the correction."
            )

    def begin(self, scheduler: Any) -> None:
        """A run begins, and it is decided who acts on it."""
        with self._lock:
            pipeline, groups = caller(), list(self.groups)
            self.thread = threading.get_ident()
            self.pipeline = None if pipeline is None else weakref.ref(pipeline)
            rivals = sum(g.is_exclusive for g in groups) - 1
            self.acting = [g for g in groups if g.claims(scheduler, pipeline, rivals)]
        for group in self.acting:
            for interceptor in group.interceptors:
                interceptor.begin(scheduler)

    def stepping(self, scheduler: Any) -> list[Group]:
        """The groups of the run that this step belongs to."""
        if self.thread != threading.get_ident():  # begun elsewhere, or before we were installed
            self.begin(scheduler)
        return self.acting
