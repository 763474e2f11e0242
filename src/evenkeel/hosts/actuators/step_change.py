"""One step of a plan as tensors on the sample's device, so that a step costs only arithmetic."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenkeel.corrections.plan import OutputEdit, SamplerPlan
from evenkeel.hosts.pipeline.layouts import LatentLayout


class ImageNoise:
    """Noise that belongs to an image and not to its batch: seeded by the image's own first state.

    Args:
        sample: (images, ...) states that enter the first edited step.
        seed: of the correction.

    """

    def __init__(self, sample: Tensor, seed: int) -> None:
        self._generators = []
        for image in sample.detach().float().cpu():
            digest = hashlib.sha256(image.contiguous().numpy().tobytes())
            digest.update(str(seed).encode())
            generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big"))
            self._generators.append(generator)

    def __len__(self) -> int:
        """Images."""
        return len(self._generators)

    def draw(self, like: Tensor, uniform: bool) -> Tensor:
        """Unit variance, zero mean, one draw per image; float32 on the device of ``like``."""
        shape = like.shape[1:]
        if uniform:
            half = math.sqrt(3.0)
            drawn = [(2 * torch.rand(shape, generator=g) - 1) * half for g in self._generators]
        else:
            drawn = [torch.randn(shape, generator=g) for g in self._generators]
        return torch.stack(drawn).to(like.device)


@dataclass(frozen=True, slots=True)
class StepChange:
    """What is done to one step's output and to its result."""

    edit: Edit | None
    stretch: Stretch | None

    @classmethod
    def of(cls, plan: SamplerPlan, k: int, layout: LatentLayout, device: Any) -> StepChange:
        """Step k of ``plan``."""
        edit = plan.edit
        edited = edit is not None and edit.branch is None and bool(edit.active[k])
        return cls(
            Edit.of(edit, k, layout, device) if edited and edit is not None else None,
            Stretch.of(plan, k, layout, device) if plan.active[k] else None,
        )


@dataclass(frozen=True, slots=True)
class Edit:
    """``gain m + sample x + bias + std z``."""

    gain: Tensor
    sample: Tensor | None
    bias: Tensor | None
    std: Tensor | None
    uniform: bool
    seed: int

    @classmethod
    def of(cls, edit: OutputEdit, k: int, layout: LatentLayout, device: Any) -> Edit:
        """Step k of ``edit``."""

        def shaped(values: Tensor) -> Tensor | None:
            if not bool(values.any()):
                return None
            return layout.broadcast(values).to(device, torch.float32)

        gain = layout.broadcast(edit.gain[k]).to(device, torch.float32)
        sample, bias, std = (shaped(values[k]) for values in (edit.sample, edit.bias, edit.std))
        return cls(gain, sample, bias, std, edit.uniform, edit.seed)

    def __call__(self, output: Tensor, sample: Tensor, noise: ImageNoise | None) -> Tensor:
        """The edited output."""
        edited = output * self.gain
        if self.sample is not None:
            edited.addcmul_(sample, self.sample)
        if self.bias is not None:
            edited.add_(self.bias)
        if self.std is not None and noise is not None:
            edited.addcmul_(noise.draw(output, self.uniform), self.std)
        return edited


@dataclass(frozen=True, slots=True)
class Stretch:
    """``base result + sum_l samples_l x_{k-l} + sum_l outputs_l m_{k-l} - shift``."""

    base: Tensor
    samples: tuple[tuple[int, Tensor], ...]
    outputs: tuple[tuple[int, Tensor], ...]
    shift: Tensor | None
    is_straight: bool
    is_plain: bool

    @classmethod
    def of(cls, plan: SamplerPlan, k: int, layout: LatentLayout, device: Any) -> Stretch:
        """Step k of ``plan``."""

        def shaped(values: Tensor) -> Tensor:
            return layout.broadcast(values).to(device, torch.float32)

        def used(table: Tensor) -> tuple[tuple[int, Tensor], ...]:
            return tuple((lag, shaped(v)) for lag, v in enumerate(table[k]) if bool(v.any()))

        base, samples, outputs = plan.base[k], used(plan.samples), used(plan.outputs)
        straight = not outputs and len(samples) == 1
        return cls(
            base=shaped(base),
            samples=samples,
            outputs=outputs,
            shift=None if plan.shift is None else plan.shift[k].to(device),
            is_straight=straight and torch.equal(base, 1 - plan.samples[k, samples[0][0]]),
            is_plain=not samples and not outputs and bool((base == 1).all()),
        )

    @property
    def reach(self) -> int:
        """So many steps before its own are the oldest state or output that it takes."""
        return max((lag for lag, _ in (*self.samples, *self.outputs)), default=0)

    def __call__(self, result: Tensor, samples: list[Tensor], outputs: list[Tensor]) -> Tensor:
        """The new result; ``samples`` and ``outputs`` latest first."""
        stretched = self._stretched(result, samples, outputs)
        return stretched if self.shift is None else stretched - self.shift

    def _stretched(self, result: Tensor, samples: list[Tensor], outputs: list[Tensor]) -> Tensor:
        if self.is_straight:  # one pass where base = 1 - anchor
            lag, weight = self.samples[0]
            start = samples[lag]
            if result.dtype == start.dtype == weight.dtype:
                return torch.lerp(result, start, weight)
        if self.is_plain:
            return result
        stretched = result * self.base
        for lag, weight in self.samples:
            stretched.addcmul_(samples[lag], weight)
        for lag, weight in self.outputs:
            stretched.addcmul_(outputs[lag], weight)
        return stretched
