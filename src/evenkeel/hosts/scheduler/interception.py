"""Stand between a pipeline and its scheduler, without either of them noticing.

The scheduler instance gets a dynamic subclass of its own class with the same name and module, so that
``isinstance``, the signature inspection of pipelines, ``deepcopy``, ``pickle``, ``save_pretrained``
and offloading keep working: a saved pipeline is plain diffusers. Wrappers and closures fail several
of these.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:  # a scheduler can be watched without any correction
    from evenkeel.corrections.base import Correction
    from evenkeel.corrections.plan import SamplerPlan


class Interceptor:
    """Sees every scheduler step; subclasses override what they need.

    ``install`` puts one or several on a scheduler; they run in order. One that changes the denoiser,
    too, does so between ``attach`` and ``detach``.

    Attributes:
        on_denoiser: after a step it makes the denoiser ready for the next one.
        on_steps: what it does depends on the scheduler; False for what acts whatever scheduler there is.
        correction, plan: what it carries out, and the numbers of the latest run; None if it does not.

    """

    on_denoiser: bool = False
    on_steps: bool = True
    correction: Correction | None = None
    plan: SamplerPlan | None = None

    @property
    def counts_calls(self) -> bool:
        """Whether it tells guidance branches apart by the order of the denoiser's calls."""
        return False

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


_SUBCLASSES: dict[type, type] = {}
_STATE = "_evenkeel_interceptors"
APPLIED = "_evenkeel_applied"  # attribute of a pipeline: what was installed for it


def install(scheduler: Any, *interceptors: Interceptor) -> None:
    """Let ``interceptors`` see and change every step of this scheduler instance from now on."""
    scheduler.__class__ = _subclass(plain_class(scheduler))
    scheduler.__dict__[_STATE] = list(interceptors)


def uninstall(scheduler: Any) -> None:
    """Give the instance its own class back; harmless on a plain scheduler."""
    scheduler.__dict__.pop(_STATE, None)
    scheduler.__class__ = plain_class(scheduler)


def installed(scheduler: Any) -> list[Interceptor]:
    """The interceptors of this instance, if any."""
    return list(scheduler.__dict__.get(_STATE, ()))


@contextmanager
def set_aside(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's scheduler is its own, and so is a denoiser that was changed along with it.

    Afterwards what was installed is back, and nothing else, whatever happened inside. What was installed
    for this pipeline counts even where its scheduler has been exchanged since.
    """
    scheduler = pipeline.scheduler
    before, kept = installed(scheduler), pipeline.__dict__.pop(APPLIED, None)
    _let_go(scheduler, kept or ())
    try:
        yield
    finally:
        _let_go(scheduler, pipeline.__dict__.pop(APPLIED, ()))
        if before:
            install(scheduler, *before)
        if kept is not None:
            pipeline.__dict__[APPLIED] = kept
        for interceptor in dict.fromkeys((*before, *(kept or ()))):
            interceptor.attach()


def _let_go(scheduler: Any, kept: Iterable[Interceptor]) -> None:
    for interceptor in (*installed(scheduler), *kept):
        interceptor.detach()
    uninstall(scheduler)


def plain_class(scheduler: Any) -> type:
    """The diffusers class under the interception."""
    base: type = getattr(type(scheduler), "_evenkeel_base", type(scheduler))
    return base


def _rebuild(base: type, state: dict[str, Any]) -> Any:
    scheduler: Any = object.__new__(_subclass(base))
    scheduler.__dict__.update(state)
    return scheduler


def _subclass(base: type) -> type:
    if base in _SUBCLASSES:
        return _SUBCLASSES[base]
    signature = inspect.signature(base.step)  # type: ignore[attr-defined]
    names = tuple(signature.parameters)[1:]
    inner_step: Any = base.step  # type: ignore[attr-defined]
    inner_set: Any = base.set_timesteps  # type: ignore[attr-defined]

    @functools.wraps(inner_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        interceptors = self.__dict__.get(_STATE)
        if not interceptors:
            return inner_step(self, *args, **kwargs)
        # Binding a signature takes as long as the arithmetic of a small step: name arguments by hand.
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(arguments) < len(args) + len(kwargs) or not arguments.keys() >= _NEEDED:
            signature.bind(self, *args, **kwargs)  # says what is wrong with this call
        return _intercepted(self, interceptors, inner_step, arguments)

    @functools.wraps(inner_set)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = inner_set(self, *args, **kwargs)
        for interceptor in self.__dict__.get(_STATE, ()):
            interceptor.begin(self)
        return result

    def set_begin_index(self: Any, begin_index: int = 0) -> None:
        base.set_begin_index(self, begin_index)  # type: ignore[attr-defined]
        for interceptor in self.__dict__.get(_STATE, ()):
            interceptor.begin(self)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _rebuild, (base, self.__dict__.copy())

    members = {
        "step": step,
        "set_timesteps": set_timesteps,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_evenkeel_base": base,
    }
    if hasattr(base, "set_begin_index"):
        members["set_begin_index"] = functools.wraps(base.set_begin_index)(set_begin_index)
    _SUBCLASSES[base] = type(base.__name__, (base,), members)
    return _SUBCLASSES[base]


_NEEDED = frozenset(("model_output", "timestep", "sample"))
_FIXED = _NEEDED | {"generator", "return_dict"}


def _intercepted(
    scheduler: Any, interceptors: list[Interceptor], inner_step: Any, arguments: dict[str, Any]
) -> Any:
    output, sample = arguments["model_output"], arguments["sample"]
    dtype = sample.dtype
    extra = {k: v for k, v in arguments.items() if k not in _FIXED}
    wide = False
    for interceptor in interceptors:
        interceptor.before(scheduler, arguments["timestep"], output, sample, extra)
        wide = interceptor.wide() or wide
    if wide:
        # 1 + c of Q-Drift's size is lost in bfloat16's rounding: compute in float32, cast once.
        output, sample = _widened(output), _widened(sample)
        arguments["model_output"], arguments["sample"] = output, sample
    for interceptor in interceptors:
        output = interceptor.edit(scheduler, output, sample)
    arguments["model_output"] = output
    out = inner_step(scheduler, **arguments)
    is_tuple = isinstance(out, tuple)
    result = out[0] if is_tuple else out.prev_sample
    for interceptor in interceptors:
        result = interceptor.after(scheduler, output, sample, result)
    if wide:
        result = result.to(dtype)
    if is_tuple:
        return (result, *out[1:])
    out.prev_sample = result
    return out


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()
