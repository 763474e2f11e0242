"""What the tests of qncd share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from tiny_pipelines import TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel.corrections.qncd import QNCD
from evenkeel.hosts.actuators.requery import Requery
from evenkeel.hosts.scheduler.interception import installed
from evenkeel.hosts.scheduler.probing import probe_scheduler

OFFSETS = (0.3, -0.2, 0.7)
EVERY_OTHER = QNCD(interval=2)  # of four steps it refreshes the first and the third


def law_of(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return probe_scheduler(scheduler)


# ---- a linear network without a pipeline: everything can be computed by hand


class Linear(nn.Module):
    """q = J x + b, with b different in every guidance branch; remembers its inputs."""

    def __init__(self, slope: float = 0.4, offsets: tuple[float, ...] = OFFSETS[:1]) -> None:
        super().__init__()
        self.slope, self.offsets = slope, offsets
        self.inputs: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Any, branch: int = 0) -> tuple[Tensor]:
        self.inputs.append(sample.clone())
        return (self.slope * sample + self.offsets[branch],)


class Host:
    """As much of a pipeline as it takes: a scheduler, a denoiser, a loop with guidance."""

    def __init__(self, scheduler: Any, denoiser: Linear, guidance: float = 1.0) -> None:
        self.scheduler, self.unet, self.guidance = scheduler, denoiser, guidance

    def sample(self, x: Tensor, steps: int) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            given = self.scheduler.scale_model_input(x, t)
            parts = [self.unet(given, t, branch=b)[0] for b in range(len(self.unet.offsets))]
            output = parts[0] + self.guidance * (parts[-1] - parts[0])
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return x


def states(images: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 4, 8, 8, generator=generator, dtype=torch.float64)


def euler(**options: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(**options)


def requery_of(pipe: Any) -> Requery:
    return next(i for i in installed(pipe.scheduler) if isinstance(i, Requery))


def lent(tiny: TinyPipeline) -> Iterator[TinyPipeline]:
    yield tiny
    evenkeel.remove(tiny.pipe)
    generate(tiny, steps=1)  # a run that was interrupted leaves its hook until the next call
    assert not tiny.model._forward_hooks and not tiny.model._forward_pre_hooks
