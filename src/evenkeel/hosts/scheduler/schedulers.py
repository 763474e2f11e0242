"""Another scheduler for a pipeline, made from the configuration of the one it has."""

from __future__ import annotations

import copy
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
    except Exception as e:  # whatever the class makes of a configuration that is not its own
        said = (str(e).strip().splitlines() or ["no reason given"])[0]
        raise UnsupportedSampler(
            f"{name} cannot be made from the configuration of {type(present).__name__}: "
            f"{type(e).__name__}: {said[:200]}."
        ) from e
    if is_flow(scheduler) != is_flow(present):
        raise UnsupportedSampler(
            f"{name} and {type(present).__name__}, with which {type(pipeline).__name__} came, do not "
            f"follow the same path: one of both is for flow matching. Choose a scheduler of its kind."
        )
    asked = ("set_timesteps", "step", "init_noise_sigma", "scale_model_input")
    missing = [n for n in asked if hasattr(present, n) and not hasattr(scheduler, n)]
    if missing:
        raise UnsupportedSampler(
            f"{name} cannot sample in place of {type(present).__name__}: it has no {', '.join(missing)}."
        )
    pipeline.scheduler = scheduler


def check_usable(scheduler: Any, num_inference_steps: int) -> None:
    """Refuse a scheduler that no pipeline can sample with in so many steps; it is not changed.

    A copy makes its timesteps and one step of zeros.

    Raises:
        UnsupportedSampler: says what is missing, or what the scheduler itself complains about.

    """
    import torch

    name = type(scheduler).__name__
    missing = [n for n in ("set_timesteps", "step", "timesteps") if not hasattr(scheduler, n)]
    if missing:
        raise UnsupportedSampler(
            f"{name} cannot sample with a diffusers pipeline: it has no {', '.join(missing)}."
        )
    try:
        trial = copy.deepcopy(scheduler)
        shifted = {"mu": 1.0} if trial.config.get("use_dynamic_shifting") else {}
        trial.set_timesteps(num_inference_steps, **shifted)
        zeros = torch.zeros(1, 4, 8, 8)
        for timestep in trial.timesteps[:1]:
            if hasattr(trial, "scale_model_input"):
                zeros = trial.scale_model_input(zeros, timestep)
            trial.step(zeros, timestep, zeros, return_dict=False)
    except Exception as e:  # whatever the class makes of a configuration that is not its own
        said = (str(e).strip().splitlines() or ["no reason given"])[0]
        raise UnsupportedSampler(
            f"{name} cannot sample in {num_inference_steps} steps as this pipeline configures it: "
            f"{type(e).__name__}: {said[:200]}. Choose another scheduler, or another number of steps."
        ) from e


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
