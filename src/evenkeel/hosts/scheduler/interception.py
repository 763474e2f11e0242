"""Stand between a pipeline and its scheduler, without either of them noticing.

The scheduler instance gets a dynamic subclass of its own class with the same name and module, so that
``isinstance``, the signature inspection of pipelines, ``deepcopy``, ``pickle``, ``save_pretrained``
and offloading keep working: a saved pipeline is plain diffusers. Wrappers and closures fail several
of these.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from evenkeel.hosts.scheduler.groups import Group, Held
from evenkeel.hosts.scheduler.groups import Interceptor as Interceptor

_SUBCLASSES: dict[type, type] = {}
_STATE = "_evenkeel_interceptors"
APPLIED = "_evenkeel_applied"  # attribute of a pipeline: what was installed for it


def install(scheduler: Any, *interceptors: Interceptor) -> None:
    """Let ``interceptors``, and nothing else, see and change every step of this scheduler from now on."""
    install_groups(scheduler, [Group(interceptors)])


def install_groups(scheduler: Any, groups: Sequence[Group]) -> None:
    """Let these groups, and nothing else, act on this scheduler instance from now on."""
    uninstall(scheduler)
    scheduler.__class__ = _subclass(plain_class(scheduler))
    scheduler.__dict__[_STATE] = Held(groups)
    for name in ("step", "set_timesteps", "set_begin_index"):
        if name in scheduler.__dict__:  # wrapped on the instance, which would pass us by
            scheduler.__dict__[name] = _Rewrapped(scheduler, name, scheduler.__dict__[name])


def uninstall(scheduler: Any) -> None:
    """Give the instance its own class back; harmless on a plain scheduler."""
    scheduler.__dict__.pop(_STATE, None)
    for name, value in list(scheduler.__dict__.items()):
        if isinstance(value, _Rewrapped):
            scheduler.__dict__[name] = value.inner
    if hasattr(type(scheduler), "_evenkeel_base"):
        scheduler.__class__ = plain_class(scheduler)


def groups_of(scheduler: Any) -> list[Group]:
    """What is installed on this instance, if anything."""
    held = scheduler.__dict__.get(_STATE)
    return [] if held is None else list(held.groups)


def begin_run(scheduler: Any) -> None:
    """Say that a run begins where ``set_timesteps`` did not."""
    held = scheduler.__dict__.get(_STATE)
    if held is not None:
        held.begin(scheduler)


def installed(scheduler: Any) -> list[Interceptor]:
    """The interceptors of this instance, if any."""
    return [i for group in groups_of(scheduler) for i in group.interceptors]


@contextmanager
def watched(scheduler: Any, *interceptors: Interceptor) -> Iterator[None]:
    """Inside, these see every step after what is installed already."""
    before = groups_of(scheduler)
    install_groups(scheduler, [*before, Group(interceptors)])
    try:
        yield
    finally:
        uninstall(scheduler)
        if before:
            install_groups(scheduler, before)


@contextmanager
def set_aside(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's scheduler is its own, and so is a denoiser that was changed along with it.

    Afterwards what was installed is back, and nothing else, whatever happened inside. What was installed
    for this pipeline counts even where its scheduler has been exchanged since.
    """
    scheduler = pipeline.scheduler
    before, kept = groups_of(scheduler), pipeline.__dict__.pop(APPLIED, None)
    _let_go(scheduler, [*before, *([] if kept is None else [kept])])
    try:
        yield
    finally:
        now = pipeline.__dict__.pop(APPLIED, None)
        _let_go(scheduler, [*groups_of(scheduler), *([] if now is None else [now])])
        if before:
            install_groups(scheduler, before)
        if kept is not None:
            pipeline.__dict__[APPLIED] = kept
        for group in dict.fromkeys((*before, *([] if kept is None else [kept]))):
            group.attach()


def _let_go(scheduler: Any, groups: Iterable[Group]) -> None:
    for group in groups:
        group.detach()
    uninstall(scheduler)


def plain_class(scheduler: Any) -> type:
    """The diffusers class under the interception."""
    base: type = getattr(type(scheduler), "_evenkeel_base", type(scheduler))
    return base


def _rebuild(base: type, state: dict[str, Any], groups: Sequence[Group] = ()) -> Any:
    scheduler: Any = object.__new__(base)
    scheduler.__dict__.update(state)
    if groups:
        install_groups(scheduler, [group.copied() for group in groups])
    return scheduler


class _Rewrapped:
    """A method that was wrapped on the instance, with us around it."""

    def __init__(self, scheduler: Any, name: str, inner: Any) -> None:
        self._scheduler, self._name, self.inner = weakref.ref(scheduler), name, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = self._scheduler()
        calls = {"step": _step, "set_timesteps": _set_timesteps, "set_begin_index": _set_begin}
        # One that was wrapped again since leads to the class's own first, which is where we are then.
        return calls[self._name](scheduler, self.inner, args, kwargs)

    def __reduce__(self) -> Any:
        return _unwrapped, (self.inner,)


def _unwrapped(inner: Any) -> Any:
    return inner


def _step(scheduler: Any, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    held = scheduler.__dict__.get(_STATE)
    if held is None:
        return inner(*args, **kwargs)
    with held.alone() as first:
        if not first:
            return inner(*args, **kwargs)
        # Binding a signature takes as long as the arithmetic of a small step: name arguments by hand.
        names = _names(plain_class(scheduler))
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(arguments) < len(args) + len(kwargs) or not arguments.keys() >= _NEEDED:
            inspect.signature(inner).bind(*args, **kwargs)  # says what is wrong with this call
            return inner(*args, **kwargs)
        output, sample = arguments["model_output"], arguments["sample"]
        groups = held.stepping(scheduler)
        acting = [g for g in groups if g.acts(scheduler, arguments["timestep"], output, sample)]
        interceptors = [i for g in acting for i in g.interceptors]
        if not interceptors:
            return inner(*args, **kwargs)
        return _intercepted(scheduler, interceptors, inner, names[: len(args)], arguments)


def _set_timesteps(
    scheduler: Any, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    held = scheduler.__dict__.get(_STATE)
    if held is None:
        return inner(*args, **kwargs)
    with held.alone() as first:
        if first:
            held.refuse_two_runs(scheduler)
        result = inner(*args, **kwargs)
        if first:
            held.begin(scheduler)
    return result


def _set_begin(scheduler: Any, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inner(*args, **kwargs)
    held = scheduler.__dict__.get(_STATE)
    if held is not None:
        held.begin(scheduler)


def _subclass(base: type) -> type:
    if base in _SUBCLASSES:
        return _SUBCLASSES[base]

    def intercepting(name: str, handler: Any) -> Any:
        inner: Any = getattr(base, name)

        @functools.wraps(inner)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return handler(self, functools.partial(inner, self), args, kwargs)

        return method

    def reduce_ex(self: Any, protocol: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != _STATE}
        return _rebuild, (base, state, groups_of(self))

    handlers = {"step": _step, "set_timesteps": _set_timesteps, "set_begin_index": _set_begin}
    members = {
        **{n: intercepting(n, handler) for n, handler in handlers.items() if hasattr(base, n)},
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_evenkeel_base": base,
    }
    _SUBCLASSES[base] = type(base.__name__, (base,), members)
    return _SUBCLASSES[base]


_NEEDED = frozenset(("model_output", "timestep", "sample"))
_FIXED = _NEEDED | {"generator", "return_dict"}


@functools.cache
def _names(base: type) -> tuple[str, ...]:
    """Parameters of ``step``; of the class it derives from where it takes whatever there is."""
    for kind in base.__mro__:
        if "step" in vars(kind):
            names = tuple(inspect.signature(vars(kind)["step"]).parameters)[1:]
            if {*names} >= _NEEDED:
                return names
    return ("model_output", "timestep", "sample")


def _intercepted(
    scheduler: Any,
    interceptors: list[Interceptor],
    inner: Any,
    placed: Sequence[str],
    arguments: dict[str, Any],
) -> Any:
    output, sample = arguments["model_output"], arguments["sample"]
    output, variance = _apart(output, sample)
    dtype = sample.dtype
    extra = {k: v for k, v in arguments.items() if k not in _FIXED}
    wide = False
    for interceptor in interceptors:
        interceptor.before(scheduler, arguments["timestep"], output, sample, extra)
        wide = interceptor.wide() or wide
    if wide:
        # 1 + c of Q-Drift's size is lost in bfloat16's rounding: compute in float32, cast once.
        output, sample = _widened(output), _widened(sample)
    for interceptor in interceptors:
        output = interceptor.edit(scheduler, output, sample)
    whole = output if variance is None else torch.cat([output, variance.to(output)], 1)
    given = {**arguments, "model_output": whole, "sample": sample}
    # By position what came so: a wrapper may take no names.
    by_place = [given.pop(name) for name in placed]
    out = inner(*by_place, **given)
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


def _apart(output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
    """A prediction, and the learned variance that some networks give as further channels.

    The schedulers that know of it part them at this place; nobody corrects the variance.
    """
    channels = sample.shape[1] if sample.ndim > 1 else 0
    if output.shape != (*sample.shape[:1], 2 * channels, *sample.shape[2:]):
        return output, None
    return output[:, :channels], output[:, channels:]


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()
