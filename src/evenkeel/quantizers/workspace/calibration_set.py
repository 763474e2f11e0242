"""Denoiser calls kept to be made again: what quantization methods calibrate on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError


@dataclass(frozen=True)
class DenoiserCall:
    """Arguments of one call of a denoiser, as a pipeline made it; its rows are one batch."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def make(self, denoiser: nn.Module) -> Any:
        """The denoiser's answer, on whatever device it is."""
        device = next(iter([*denoiser.parameters(), *denoiser.buffers()])).device
        move = lambda tensor: tensor.to(device)  # noqa: E731
        with torch.no_grad():
            return denoiser(*mapped(self.arguments, move), **mapped(dict(self.keywords), move))


@dataclass(frozen=True)
class CalibrationSet:
    """Denoiser calls in the order they were made.

    Attributes:
        calls: of the quantized denoiser; and of the full-precision one, where there are no ``teachers``.
        teachers: for each of the calls the one whose outputs it should reproduce (mixed-order alignment);
            empty where that is the call itself.

    Raises:
        QuantizationError: it is empty, holds NaN or infinity, or not every call has a teacher.

    """

    calls: tuple[DenoiserCall, ...]
    teachers: tuple[DenoiserCall, ...] = ()

    def __post_init__(self) -> None:
        if not self.calls:
            raise QuantizationError("a calibration set holds at least one denoiser call; got none.")
        if self.teachers and len(self.teachers) != len(self.calls):
            raise QuantizationError(
                f"{len(self.calls)} calls have {len(self.teachers)} teachers; each has one, or none has."
            )
        for index, call in enumerate(self.calls + self.teachers):
            for tensor in tensors_in((call.arguments, dict(call.keywords))):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise QuantizationError(
                        f"call {index % len(self.calls)} of {len(self.calls)} of the calibration set "
                        "holds NaN or infinity: the full-precision pipeline overflows. Run it in float32 or "
                        "bfloat16."
                    )

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def digest(self) -> str:
        """Of everything in it; two sets with the same digest calibrate the same."""
        found = hashlib.sha256()
        for call in self.calls + self.teachers:
            for tensor in tensors_in((call.arguments, dict(call.keywords))):
                found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                found.update(flat.numpy().tobytes())
        return found.hexdigest()[:32]


def kept(calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> CalibrationSet:
    """A calibration set of copies on the CPU; equal tensors of neighbouring calls are kept once.

    Text embeddings do not change from step to step, and would otherwise be most of the memory.
    """
    made: list[DenoiserCall] = []
    last: list[Tensor] = []
    for arguments, keywords in calls:
        seen: list[Tensor] = []
        before = last

        def copy(
            tensor: Tensor, seen: list[Tensor] = seen, before: list[Tensor] = before
        ) -> Tensor:
            here = tensor.detach().cpu()
            own = next((b for b in before if _same(b, here)), None)
            if own is None:
                own = here.clone() if here.data_ptr() == tensor.data_ptr() else here
            seen.append(own)
            return own

        made.append(DenoiserCall(mapped(tuple(arguments), copy), mapped(dict(keywords), copy)))
        last = seen
    return CalibrationSet(tuple(made))


def mapped(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and dictionaries with every tensor changed."""
    if isinstance(found, Tensor):
        return change(found)
    if isinstance(found, tuple):
        return tuple(mapped(f, change) for f in found)
    if isinstance(found, list):
        return [mapped(f, change) for f in found]
    if isinstance(found, dict):
        return {k: mapped(v, change) for k, v in found.items()}
    return found


def tensors_in(found: Any) -> list[Tensor]:
    """Every tensor of a nest, in order."""
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    mapped(found, take)
    return tensors


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
