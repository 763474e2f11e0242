"""Which pipeline is at work: read off the stack, because a pipeline tells nobody that it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

# What lies between a pipeline and us; their frames hold activations, which looking would keep alive.
_BETWEEN = (
    "torch.",
    "evenkeel.",
    "accelerate.",
    "peft.",
    "diffusers.models.",
    "diffusers.hooks.",
    "diffusers.schedulers.",
)


def caller() -> Any:
    """The pipeline in whose call this thread is, the innermost one; None in none.

    A pipeline is whatever has a scheduler and a denoiser and makes the call as its ``self``.
    """
    return next(_pipelines(sys._getframe(1)), None)


def runs_in(thread: int, pipeline: Any) -> bool:
    """Whether that thread is in a call of this very pipeline now."""
    frame = sys._current_frames().get(thread)
    return any(found is pipeline for found in _pipelines(frame))


def is_inside(thread: int, module: nn.Module) -> bool:
    """Whether that thread is in a call of this very module now."""
    frame, code = sys._current_frames().get(thread), nn.Module._call_impl.__code__
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _pipelines(frame: FrameType | None) -> Iterator[Any]:
    while frame is not None:
        code = frame.f_code
        if "self" in code.co_varnames[:1] and not _is_between(frame):
            found = frame.f_locals.get("self")
            if _is_pipeline(found):
                yield found
        frame = frame.f_back


def _is_between(frame: FrameType) -> bool:
    return f"{frame.f_globals.get('__name__', '')}.".startswith(_BETWEEN)


def _is_pipeline(found: Any) -> bool:
    held = getattr(found, "__dict__", None)
    if not isinstance(held, dict) or "scheduler" not in held or isinstance(found, nn.Module):
        return False
    return isinstance(held.get("unet", held.get("transformer")), nn.Module)
