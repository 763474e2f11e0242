"""Another scheduler for a pipeline, made from the configuration of the one it has."""

from __future__ import annotations

import inspect
from typing import Any

from evenkeel.errors import UnsupportedSampler
from evenkeel.storage import json_safe


def scheduler_names() -> list[str]:
    """Class names of all schedulers that diffusers has."""
    import diffusers

    return [n for n in dir(diffusers) if n.endswith("Scheduler") and n[0].isupper()]


def change_scheduler(pipeline: Any, name: str, **changes: Any) -> None:
    """Give the pipeline the scheduler of that class, with its own one's configuration.

    Args:
        pipeline: changed in place.
        name: class name in diffusers.
        changes: what the configuration of the present scheduler must not decide.

    Raises:
        UnsupportedSampler: diffusers has no such scheduler; or it predicts along another kind of path
            (noise added to a signal, or a straight line between both) than the pipeline was trained for.

    """
    import diffusers

    known = scheduler_names()
    if name not in known:
        raise UnsupportedSampler(
            f"diffusers has no scheduler called {name!r}; expected one of {', '.join(known)}."
        )
    present = pipeline.scheduler
    try:
        scheduler = getattr(diffusers, name).from_config(present.config, **changes)
    except ImportError as e:
        raise UnsupportedSampler(f"{name} needs a package that is not installed: {e}") from e
    if is_flow(scheduler) != is_flow(present):
        raise UnsupportedSampler(
            f"{name} and {type(present).__name__}, with which {type(pipeline).__name__} came, do not "
            f"follow the same path: one of both is for flow matching. Choose a scheduler of its kind."
        )
    pipeline.scheduler = scheduler


def is_flow(scheduler: Any) -> bool:
    """Whether it follows straight lines between noise and data (flow matching)."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return True
    # Configurations keep entries that only the scheduler before knew what to do with.
    known = inspect.signature(type(scheduler).__init__).parameters
    return "use_flow_sigmas" in known and bool(scheduler.config.use_flow_sigmas)


def config_of(scheduler: Any) -> dict[str, Any]:
    """The scheduler's configuration as JSON, without private entries."""
    return json_safe({k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")})
