"""Denoiser calls as a pipeline makes them, and how it combines what comes out; to make them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import OVERFLOW, CalibrationError, UnsupportedPipeline

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # else 3e-2: guidance in half precision
_SAMPLE_NAMES = ("hidden_states", "sample")


@dataclass(frozen=True, slots=True)
class Call:
    """One denoiser call as the pipeline made it, with what came out."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor

    @property
    def sample(self) -> Tensor:
        """The argument that holds the latents.

        Raises:
            UnsupportedPipeline: it is not a tensor, or has none of the names that diffusers uses.

        """
        found = self.arguments[0] if self.arguments else self.keywords.get(self._name)
        if not isinstance(found, Tensor):
            raise UnsupportedPipeline(
                f"expected the latents as the denoiser's first argument or as one of {_SAMPLE_NAMES}; "
                f"it was called with {len(self.arguments)} positional arguments and "
                f"{sorted(self.keywords)}. It cannot be asked again."
            )
        return found

    @property
    def _name(self) -> str:
        return next((n for n in _SAMPLE_NAMES if n in self.keywords), "")

    def again(self, denoiser: nn.Module, sample: Tensor) -> Tensor:
        """The answer to the same call with other latents; no hook of the denoiser itself notices."""
        if self.arguments:
            return answer_of(denoiser.forward(sample, *self.arguments[1:], **self.keywords))
        return answer_of(denoiser.forward(**{**self.keywords, self._name: sample}))


def answer_of(output: Any) -> Tensor:
    """The predicted tensor of a denoiser's return value."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def branches_of(output: Tensor, like: Tensor, rows: int) -> list[Tensor]:
    """A denoiser output as one tensor of ``rows`` samples per guidance branch.

    Channels of a learned variance are left out. Empty where the shapes do not fit ``like``.
    """
    if output.dim() > 2 and output.shape[1] == 2 * like.shape[1]:
        output = output[:, : like.shape[1]]
    if len(output) % rows or output.shape[1:] != like.shape[1:]:
        return []
    return list(torch.split(output, rows))


def is_doubled(rows: Tensor) -> bool:
    """Whether every row is there twice, as class-conditional guidance (DiT) hands them to the scheduler."""
    half = len(rows) // 2
    return len(rows) == 2 * half and torch.equal(rows[:half], rows[half:])


def one_per_prompt(rows: Tensor, prompts: int) -> Tensor:
    """What a scheduler was handed for so many prompts, a row for each of them.

    Raises:
        CalibrationError: neither one row per prompt nor each of them twice.

    """
    if len(rows) == 2 * prompts and is_doubled(rows):
        return rows[:prompts]
    if len(rows) != prompts:
        raise CalibrationError(
            f"the scheduler was handed {len(rows)} samples for {prompts} prompts; each prompt can have "
            f"one: pass num_images_per_prompt=1."
        )
    return rows


def refuse_non_finite(output: Tensor, whose: str, step: int) -> None:
    """Refuse what a denoiser gave where it is NaN or infinite, before anything is made of it.

    Raises:
        CalibrationError: says whose output it is, and at which step.

    """
    if not bool(output.isfinite().all()):
        raise CalibrationError(
            f"the {whose} denoiser gave a non-finite output (NaN or infinity) at step {step}; {OVERFLOW}"
        )


def guidance_of(outputs: Sequence[Tensor], given: Tensor) -> tuple[int, Tensor]:
    """How a pipeline made ``given`` of the denoiser's outputs: rows per branch, and shares.

    Class-conditional guidance (DiT) hands over every row twice, so that a branch has half of them.

    Raises:
        UnsupportedPipeline: not by a linear combination.

    """
    for rows in (len(given), len(given) // 2) if is_doubled(given) else (len(given),):
        parts = [p for output in outputs for p in branches_of(output, given, rows)]
        shares = shares_of(parts, given[:rows]) if parts else None
        if shares is not None:
            return rows, shares
    raise UnsupportedPipeline(
        f"the scheduler was handed {tuple(given.shape)}, which is no linear combination of the denoiser's "
        f"outputs {[tuple(o.shape) for o in outputs]}: guidance_rescale, projected or thresholded "
        f"guidance do this. Without knowing the combination the denoiser cannot be asked again."
    )


def shares_of(parts: Sequence[Tensor], output: Tensor) -> Tensor | None:
    """(branches,) s with ``output = sum s_j parts_j``, or None if there are none.

    Classifier-free guidance of scale g has (1 - g, g); one branch has (1,). Rescaled, projected or
    thresholded guidance is not linear.
    """
    rows = torch.stack([p.cpu().double().flatten() for p in parts], 1)
    target = output.cpu().double().flatten()
    found: Tensor = torch.linalg.lstsq(rows, target).solution
    left = (rows @ found - target).norm()
    limit = TOLERANCE.get(output.dtype, 3e-2)
    return found if left <= limit * target.norm() else None


def as_input(given: Tensor, sample: Tensor, renoised: Tensor) -> Tensor:
    """``renoised`` scaled, repeated and cast as the pipeline did with ``sample``.

    The factor is read off the input (Euler divides by sqrt(sigma^2 + 1)): ``scale_model_input`` of some
    schedulers changes their state.

    Args:
        given: the denoiser's input.
        sample: the state that the scheduler steps from.
        renoised: what stands in its place, same shape.

    Raises:
        UnsupportedPipeline: the input is not a multiple of the state, or more than the state.

    """
    copies = len(given) // len(sample)
    if copies * len(sample) != len(given) or given.shape[1:] != sample.shape[1:]:
        raise UnsupportedPipeline(
            f"the denoiser was called with {tuple(given.shape)} for latents of {tuple(sample.shape)}: "
            f"something is joined to them (inpainting, a reference image). It cannot be asked again."
        )
    tiled = torch.cat([sample] * copies).cpu().double()
    wide = given.cpu().double()
    factor = float((wide * tiled).sum() / tiled.square().sum())
    if (wide - factor * tiled).norm() > TOLERANCE.get(given.dtype, 3e-2) * wide.norm():
        raise UnsupportedPipeline(
            "the denoiser's input is not a multiple of the state that the scheduler steps from; it "
            "cannot be asked again at another state."
        )
    return torch.cat([factor * renoised] * copies).to(given.dtype)
