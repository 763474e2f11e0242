"""What a correction asks of a sampler, step by step: data that a host carries out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenkeel.sampling.step_law import StepLaw

# In the order in which they act within a step: the level that the network is told, its layers, its head,
# its output before and after guidance, a second call of it, the step's length, the noise it injects, the
# state after it.
STAGES = ("level", "layers", "head", "branch", "output", "refresh", "increment", "noise", "state")


@dataclass(frozen=True)
class OutputEdit:
    """Replace the model output m of step k by ``gain m + sample x + bias + std z`` before the sampler.

    What the sampler remembers of earlier steps are edited outputs.

    Attributes:
        gain, sample, bias: (K, C) or (K, 1) float64; x is the state that enters the step.
        std: same shape, standard deviation of z in units of the output; 0 adds nothing.
        uniform: z is uniform instead of normal.
        seed: of z; drawn anew for every image from this seed and the image's own first state, so
            that it does not depend on the batch.
        branch: None edits what the sampler is handed, after guidance; 0 or 1 edits that half of the
            denoiser's own output, before guidance (``gain`` and ``bias`` only).

    """

    gain: Tensor
    sample: Tensor
    bias: Tensor
    std: Tensor
    uniform: bool = False
    seed: int = 0
    branch: int | None = None

    @classmethod
    def of(cls, gain: Tensor, bias: Tensor | None = None, **options: Any) -> OutputEdit:
        """``gain m + bias``, and whatever ``options`` name."""
        zero = torch.zeros_like(gain)
        given = {"sample": zero, "bias": zero if bias is None else bias, "std": zero}
        return cls(gain, **(given | options))

    @property
    def active(self) -> Tensor:
        """(K,) bool: where anything changes."""
        moved = (self.gain != 1) | (self.sample != 0) | (self.bias != 0) | (self.std != 0)
        return moved.any(-1)

    def then(self, later: OutputEdit) -> OutputEdit:
        """Both, this one first.

        Raises:
            ValueError: both draw noise, or they act at different places.

        """
        if bool(self.std.any()) and bool(later.std.any()):
            raise ValueError("two edits of the output both add noise")
        if self.branch != later.branch:
            raise ValueError("one edit acts before guidance, the other after it")
        noisy = self if bool(self.std.any()) else later
        return OutputEdit(
            gain=later.gain * self.gain,
            sample=later.gain * self.sample + later.sample,
            bias=later.gain * self.bias + later.bias,
            std=later.gain.abs() * self.std + later.std,
            uniform=noisy.uniform,
            seed=noisy.seed,
            branch=self.branch,
        )


@dataclass(frozen=True)
class Relabel:
    """Tell the network of step k another noise level than the scheduler's (StepbaQ).

    Attributes:
        timestep: (K,) what the denoiser is told.
        scale: (K,) factor on the denoiser's input, alpha at the told level over alpha at its own.
        active: (K,) bool.

    """

    timestep: Tensor
    scale: Tensor
    active: Tensor


@dataclass(frozen=True)
class Refresh:
    """Ask the network of step k a second time, and take off what its answer shows (QNCD).

    It is asked at ``keep x_next + spread n``, n ~ N(0, I), x_next the result of the step as it would be
    without this: back at the noise level that the step started from.

    Attributes:
        active: (K,) bool.
        keep, spread: (K,) float64.
        per_image: one number per image, or one for the batch.
        seed: of n; drawn anew for every image from this seed and the image's own first state.

    """

    active: Tensor
    keep: Tensor
    spread: Tensor
    per_image: bool = True
    seed: int = 0


@dataclass(frozen=True)
class SamplerPlan:
    """What happens to step k of one run, beside the sampler's own arithmetic.

    The output is edited (``edit``), the sampler steps to ``x_base``, and its result is replaced by

        base x_base + sum_l samples[k, l] x_{k-l} + sum_l outputs[k, l] m_{k-l} - shift[k]

    over lags l, with m the edited outputs. Steps that are not ``active`` keep the sampler's result
    untouched, and if their edit is not active either, nothing is touched at all.

    Attributes:
        law: the run this plan was made for.
        factor: (K, C) or (K, 1) float64: 1 + c, by how much the step is stretched; 1 where it is not.
        noise: same shape: factor on the noise that the step injects; 1 where it is unchanged.
        base: same shape.
        samples, outputs: (K, L, C) or (K, L, 1) float64.
        active: (K,) bool.
        explanations: one per step; why it is left alone, or what limits it, or "".
        shift: (K, *sample) float32 subtracted from the result of each active step, or None. The
            trailing shape is that of one sample, with 1 where values are shared.
        edit: or None.
        relabel: or None.
        refresh: or None.

    """

    law: StepLaw
    factor: Tensor
    noise: Tensor
    base: Tensor
    samples: Tensor
    outputs: Tensor
    active: Tensor
    explanations: tuple[str, ...]
    shift: Tensor | None = None
    edit: OutputEdit | None = None
    relabel: Relabel | None = None
    refresh: Refresh | None = None

    @property
    def is_identity(self) -> bool:
        """Whether no step is changed."""
        return not self.stages

    @property
    def stages(self) -> tuple[str, ...]:
        """Which of ``STAGES`` this plan changes."""
        found = set()
        if self.edit is not None and bool(self.edit.active.any()):
            found.add("output" if self.edit.branch is None else "branch")
        if self.refresh is not None and bool(self.refresh.active.any()):
            found.add("refresh")
        if self.relabel is not None and bool(self.relabel.active.any()):
            found.add("level")
        if bool(self.active.any()):
            if self.shift is not None and bool(self.shift.any()):
                found.add("state")
            absorbs = bool((self.noise != 1).any())
            if absorbs:
                found.add("noise")
            edited = bool((self.base != 1).any() or self.samples.any() or self.outputs.any())
            if bool((self.factor != 1).any()) or (edited and not absorbs):
                found.add("increment")
        return tuple(s for s in STAGES if s in found)


def plain_plan(
    law: StepLaw, explanations: Sequence[str] | None = None, **parts: Any
) -> SamplerPlan:
    """A plan that leaves the sampler's results alone; ``parts`` as of ``SamplerPlan``."""
    one = torch.ones(law.steps, 1, dtype=torch.float64)
    none = torch.zeros(law.steps, 1, 1, dtype=torch.float64)
    active = torch.zeros(law.steps, dtype=torch.bool)
    given: dict[str, Any] = {
        "active": active,
        "explanations": tuple(explanations or [""] * law.steps),
    }
    return SamplerPlan(law, one, one, one, none, none, **(given | parts))


def stretch_plan(
    law: StepLaw,
    c: Tensor,
    along_output: bool,
    explanations: Sequence[str],
    noise: Tensor | None = None,
) -> SamplerPlan:
    """Stretch every step by 1 + c: along the noise direction, or along the raw increment.

    With y = x / alpha, a stretched step is ``y_next = y + (1 + c) (y_base - y)`` (Q-Drift Eq. 39), so
    ``x_next = (1 + c) x_base - c r x`` with ``r = alpha_next / alpha``; along the raw increment r = 1.

    A step that injects noise z has ``x_base = x_det + z``, where x_det follows from the law. Only x_det
    is stretched, and z is multiplied by ``noise``:
    ``x_next = noise x_base + (1 + c - noise) x_det - c r x``.

    Args:
        law: of the run.
        c: (K, C) or (K, 1) float64.
        along_output: r = 1.
        explanations: one per step.
        noise: same shape as ``c``; None keeps the injected noise.

    """
    noise = torch.ones_like(c) if noise is None else noise
    moved = ((c != 0) | (noise != 1)).any(-1)
    lags = 1 + max((k - _oldest(law, k) for k in range(law.steps) if moved[k]), default=0)
    base = torch.ones_like(c)
    samples, outputs = (torch.zeros(law.steps, lags, c.shape[1], dtype=c.dtype) for _ in range(2))
    for k in range(law.steps):
        if not moved[k]:
            continue
        start = int(law.anchor[k])
        r = 1.0 if along_output or law.alpha[start] == 0 else law.alpha[k + 1] / law.alpha[start]
        if law.noise_weights[k] > 1e-9:
            base[k] = noise[k]
            for j in range(_oldest(law, k), k + 1):
                samples[k, k - j] = (1 + c[k] - noise[k]) * law.sample_weights[k, j]
                outputs[k, k - j] = (1 + c[k] - noise[k]) * law.output_weights[k, j]
        else:
            base[k] = 1 + c[k]
        samples[k, k - start] -= c[k] * r
    return SamplerPlan(
        law=law,
        factor=1 + c,
        noise=noise,
        base=base,
        samples=samples,
        outputs=outputs,
        active=moved,
        explanations=tuple(explanations),
    )


def _oldest(law: StepLaw, k: int) -> int:
    """Index of the oldest state or output that a stretched or denoised step k is written with."""
    if law.noise_weights[k] <= 1e-9:
        return int(law.anchor[k])
    used = abs(law.sample_weights[k]) + abs(law.output_weights[k]) > 1e-12
    return min(int(used.argmax()), int(law.anchor[k]))
