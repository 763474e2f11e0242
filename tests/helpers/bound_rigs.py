"""A tiny pipeline with corrections whose every step can be told from every other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.corrections import QDrift, Readout
from evenkeel.corrections.head_table import HeadTable
from evenkeel.corrections.readout import HeadFit
from evenkeel.fitting import calibrate
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.actuators.heads import find_head, layer_of
from evenkeel.hosts.scheduler.interception import installed
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.record import Record

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@dataclass
class Rig:
    """A pipeline with its quantized denoiser in place, and its record."""

    tiny: TinyPipeline
    reference: nn.Module
    quantized: nn.Module
    record: Record
    steps: int

    @property
    def pipe(self) -> Any:
        return self.tiny.pipe

    @property
    def drift(self) -> QDrift:
        """Strong enough to be seen in every sample."""
        return QDrift(self.record.evidence, strength=100.0, min_explained=0.0, cap=False)

    @property
    def readout(self) -> Readout:
        """Large heads, another one at every level."""
        return readout_for(self.pipe, self.quantized, self.record)

    def sample(self, pipe: Any = None, **options: Any) -> Tensor:
        tiny = self.tiny if pipe is None else replace(self.tiny, pipe=pipe)
        return generate(tiny, steps=self.steps, **options)

    def sharing(self, **parts: Any) -> Any:
        """Another pipeline of the same components; tokenizers cannot be shared by threads."""
        own = {n: copy.deepcopy(getattr(self.pipe, n)) for n in ("tokenizer", "tokenizer_2")}
        made = type(self.pipe)(**{**self.pipe.components, **own, **parts})
        made.set_progress_bar_config(disable=True)
        return made

    def own_scheduler(self) -> Any:
        return type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)


def rigged(name: str = "sdxl", steps: int = 4, scheduler: Any = None) -> Rig:
    tiny = ALL[name]()
    if scheduler is not None:
        tiny.pipe.scheduler = scheduler
    reference = tiny.model
    quantized = quantize_module(reference, QuantizerSpec.parse("w3a4-g8"))[0].eval()
    record = calibrate(
        tiny.pipe,
        quantized=quantized,
        prompts=list(tiny.prompts),
        num_inference_steps=steps,
        guidance_scale=tiny.guidance_scale,
        call={k: v for k, v in tiny.call.items() if k != "output_type"},
        progress=False,
    )
    setattr(tiny.pipe, tiny.denoiser, quantized)
    return Rig(tiny, reference, quantized, record, steps)


def readout_for(pipe: Any, denoiser: nn.Module, record: Record) -> Readout:
    head = find_head(denoiser)
    made_for = record.provenance
    generator = torch.Generator().manual_seed(7)
    sizes = (len(made_for.timesteps), 1, head.features, head.targets)
    weight = torch.randn(sizes, generator=generator) * 0.3
    constant = torch.randn(sizes[0], 1, head.targets, generator=generator) * 0.3
    active = torch.ones(sizes[:2], dtype=torch.bool)
    table = HeadTable.of(*made_for.levels, weight, constant, active)
    fits = tuple(HeadFit(k, 0, 1.0, 0.5, 0.6, "") for k in range(sizes[0]))
    return Readout(made_for, head.name, "per-step", table, fits, None)


@contextmanager
def heads_seen(denoiser: nn.Module, readout: Readout) -> Iterator[list[tuple[float, int | None]]]:
    """At every denoiser call: the time it is told, and which entry of the table acts (None: none)."""
    layer: Any = layer_of(denoiser, find_head(denoiser, readout.head))
    seen: list[tuple[float, int | None]] = []
    told: list[float] = []

    def called(module: Any, args: Any, kwargs: Any) -> None:
        t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        told.append(float(torch.as_tensor(t).max()))

    def headed(module: Any, args: Any, output: Tensor) -> None:
        change = output - layer.forward(args[0])
        seen.append((told[-1], _entry_of(change, args[0])))

    def _entry_of(change: Tensor, x: Tensor) -> int | None:
        if not change.any():
            return None
        for k in range(readout.table.steps):
            weight, constant = readout.table.entry(k)
            own = weight[0].T.reshape(layer.weight.shape)
            padding = {"padding": layer.padding} if isinstance(layer, nn.Conv2d) else {}
            given = (F.conv2d if padding else F.linear)(x, own, constant[0], **padding)
            if torch.allclose(given, change, atol=1e-3):
                return k
        return -1

    handles = [
        denoiser.register_forward_pre_hook(called, with_kwargs=True),
        layer.register_forward_hook(headed),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def steps_seen(scheduler: Any) -> Iterator[list[tuple[float, float | None]]]:
    """At every step: the timestep it is taken at, and that of the factors it is given (None: none)."""
    (corrector,) = [i for i in installed(scheduler) if isinstance(i, Corrector)]
    seen: list[tuple[float, float | None]] = []
    before = corrector.before

    def watch(scheduler: Any, timestep: Any, *rest: Any) -> None:
        before(scheduler, timestep, *rest)
        plan, k = corrector.plan, corrector.index
        assert plan is not None
        seen.append((float(timestep), None if k < 0 else float(plan.law.timesteps[k])))

    corrector.before = watch  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del corrector.before  # type: ignore[method-assign]


def schedule_of(scheduler: Any, steps: int) -> list[float]:
    """Timesteps of a whole run, by a plain scheduler of the same kind."""
    plain = type(scheduler).from_config(scheduler.config)
    plain.set_timesteps(steps)
    return [float(t) for t in probe_scheduler(plain).timesteps]


def image_pipe(pipe: Any) -> Any:
    made = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


def edited(pipe: Any, strength: float, steps: int, **options: Any) -> Tensor:
    """An image-to-image run."""
    given = {
        "image": IMAGE,
        "strength": strength,
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe("a cat", **(given | options))[0]


def hooks_of(module: nn.Module) -> int:
    """How many hooks there are anywhere in it."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def state(module: nn.Module) -> Callable[[], bool]:
    """Says whether the module's state dict is bit-equal to what it is now."""
    before = {n: t.clone() for n, t in module.state_dict().items()}

    def same() -> bool:
        now = module.state_dict()
        return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)

    return same
