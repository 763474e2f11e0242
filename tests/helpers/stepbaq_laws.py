"""What the tests of stepbaq share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
from torch import Tensor

from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw

STEPS = 5
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: d.DDIMScheduler(clip_sample=False),
    "ddim v": lambda: d.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "ddim sample": lambda: d.DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "euler": lambda: d.EulerDiscreteScheduler(),
    "euler v": lambda: d.EulerDiscreteScheduler(prediction_type="v_prediction"),
    "euler a": lambda: d.EulerAncestralDiscreteScheduler(),
    "euler a v": lambda: d.EulerAncestralDiscreteScheduler(prediction_type="v_prediction"),
    "flow": lambda: d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "2m": lambda: d.DPMSolverMultistepScheduler(solver_order=2),
    "heun": lambda: d.HeunDiscreteScheduler(),
    "unipc": lambda: d.UniPCMultistepScheduler(final_sigmas_type="sigma_min"),
}


def law_of(name: str, steps: int = STEPS) -> tuple[StepLaw, Any]:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(steps)
    return probe_scheduler(scheduler), scheduler


def noise(shape: tuple[int, ...]) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
