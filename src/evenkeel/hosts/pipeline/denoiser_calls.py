"""Denoiser calls as a pipeline makes them, and how it combines what comes out; to make them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import OVERFLOW, CalibrationError, UnsupportedPipeline
from evenkeel.statistics.exact import Pending, check, fetched, product_pair, sum_pair, working

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
        if isinstance(found, (list, tuple)):
            found = rows_of(found)
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
        given: Any = self.arguments[0] if self.arguments else None
        if isinstance(given, (list, tuple)):
            images = sample.reshape(-1, *given[0].shape).unbind()
            return answer_of(denoiser.forward([*images], *self.arguments[1:], **self.keywords))
        if self.arguments:
            return answer_of(denoiser.forward(sample, *self.arguments[1:], **self.keywords))
        return answer_of(denoiser.forward(**{**self.keywords, self._name: sample}))


def answer_of(output: Any) -> Tensor:
    """The predicted tensor of a denoiser's return value."""
    found = output if isinstance(output, Tensor) else output[0]
    if isinstance(found, (list, tuple)):
        return rows_of(found)
    answer: Tensor = found
    return answer


def rows_of(images: Sequence[Tensor]) -> Tensor:
    """Images one by one, as Z-Image takes and gives them, as one batch without their axis of one frame.

    >>> rows_of([torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)]).shape
    torch.Size([2, 4, 8, 8])

    """
    batch = torch.stack([*images])
    return batch.squeeze(2) if batch.ndim == 5 and batch.shape[2] == 1 else batch


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
    if len(rows) != 2 * half:
        return False
    first, second = rows[:half], rows[half:]
    # NaN beside NaN is there twice, too: what is not finite is refused by its own name.
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


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


def finite(output: Tensor, whose: str, step: int) -> Pending[None]:
    """To be settled: refuses what a denoiser gave where it is NaN or infinite.

    Its error, a CalibrationError, says whose output it is, and at which step.
    """
    error = CalibrationError(
        f"the {whose} denoiser gave a non-finite output (NaN or infinity) at step {step}; {OVERFLOW}"
    )
    return check(output.isfinite().all(), lambda: error)


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
    return pending_shares(parts, output).now()


def pending_shares(parts: Sequence[Tensor], output: Tensor) -> Pending[Tensor | None]:
    """The same, still where the outputs are.

    Least squares from sums of products with ``parts_0`` and with differences from it: branches are
    much alike, and what tells them apart is small.
    """
    first, *others = (working(p).flatten() for p in parts)
    target = working(output).flatten()
    rows = torch.stack([first, *(other - first for other in others), target - first])
    limit = TOLERANCE.get(output.dtype, 3e-2)

    def finish(sums: Tensor, norm: Tensor) -> Tensor | None:
        gram = sums.sum(0)
        if not bool(gram.isfinite().all()):
            return None
        size = gram.diagonal().sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        scaled = gram / size[:, None] / size
        rest = torch.linalg.pinv(scaled[:-1, :-1], rtol=1e-12, hermitian=True) @ scaled[:-1, -1]
        left = scaled[-1, -1] - 2 * rest @ scaled[:-1, -1] + rest @ scaled[:-1, :-1] @ rest
        found = rest * size[-1] / size[:-1]
        if left.clamp_min(0).sqrt() * size[-1] > limit * norm.sum().sqrt():
            return None
        return torch.cat([1 + found[:1] - found[1:].sum(), found[1:]])

    return Pending((product_pair(rows, rows), sum_pair(target * target)), finish)


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
    both = torch.stack([working(torch.cat([sample] * copies)).flatten(), working(given).flatten()])
    state, shared, size = (
        fetched([product_pair(both, both)])[0].sum(0)[[0, 0, 1], [0, 1, 1]].tolist()
    )
    factor = shared / state
    left = max(size - shared * factor, 0.0) ** 0.5
    if left > TOLERANCE.get(given.dtype, 3e-2) * size**0.5:
        raise UnsupportedPipeline(
            "the denoiser's input is not a multiple of the state that the scheduler steps from; it "
            "cannot be asked again at another state."
        )
    return torch.cat([factor * renoised] * copies).to(given.dtype)
