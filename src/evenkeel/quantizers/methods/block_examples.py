"""Calls of a block as minibatches, rows of different calls mixed where that is possible."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import wide
from evenkeel.quantizers.rounding.adaround import random_batches
from evenkeel.quantizers.workspace.calibration_set import mapped, tensors_in
from evenkeel.quantizers.workspace.workspace import BlockCall

Module = TypeVar("Module", bound=nn.Module)


class Examples:
    """Calls of a block and the outputs it should give, for minibatches.

    Rows of different calls are mixed where every tensor has the batch as its first dimension, or is
    the same in all calls, and the block gives the same outputs for mixed rows (tried once);
    otherwise a minibatch is a whole call: one batch at one time step.

    Args:
        calls: what enters the block in the copy quantized so far, with what it puts out.
        targets: what the full-precision block puts out, one nest a call.
        block: the block that gave ``calls``, for the trial.

    Attributes:
        mixed: whether rows of different calls are mixed.
        count: examples: rows, or calls.

    Raises:
        QuantizationError: the block puts out no floating point tensor.

    """

    def __init__(
        self, calls: Sequence[BlockCall], targets: Sequence[Any], block: nn.Module
    ) -> None:
        given: list[Any] = [(call.arguments, call.keywords) for call in calls]
        wanted, outputs = (
            [floats_in(o) for o in side] for side in (targets, [c.output for c in calls])
        )
        if not wanted or not wanted[0]:
            raise QuantizationError(
                f"{type(block).__name__} puts out no floating point tensor to fit. Skip its layers."
            )
        self._batched = _batched(given, wanted) or []
        self.mixed = _batched(given, wanted) is not None
        self._given, self._wanted = given, wanted
        self.count = len(given)
        if self.mixed:
            self._given, self._wanted = [_stacked(given, self._batched)], [_columns(wanted)]
            self.count = len(self._wanted[0][0])
            if not self._rows_are_independent(block, _columns(outputs)):
                self.mixed, self._given, self._wanted = False, given, wanted
                self.count = len(given)

    def at(self, index: Tensor) -> tuple[Any, list[Tensor]]:
        """Arguments and keywords, and targets, of these rows (of this one call), in float32."""
        if self.mixed:
            batched = iter(self._batched)
            pick = lambda t: t[index.to(t.device)] if next(batched) else t  # noqa: E731
            given = mapped(self._given[0], pick)
            wanted = [t[index.to(t.device)] for t in self._wanted[0]]
        else:
            given, wanted = self._given[int(index)], self._wanted[int(index)]
        return mapped(given, _floats_wide), [wide(t) for t in wanted]

    def all(self, size: int) -> Iterator[Tensor]:
        """Indices of every example once, in order."""
        return iter(torch.split(torch.arange(self.count), size if self.mixed else 1))

    def some(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Endless minibatches of ``size`` rows, or of one call."""
        return random_batches(self.count, size if self.mixed else 1, generator)

    def _rows_are_independent(self, block: nn.Module, outputs: list[Tensor]) -> bool:
        index = torch.linspace(0, self.count - 1, min(self.count, 7)).long()
        (arguments, keywords), _ = self.at(index)
        try:
            with torch.no_grad():
                found = floats_in(widened(copy.deepcopy(block))(*arguments, **keywords))
        except (RuntimeError, ValueError, IndexError):  # shapes that only fit a whole call
            return False
        pairs = [(f, wide(o[index.to(o.device)])) for f, o in zip(found, outputs, strict=True)]
        return all(f.shape == o.shape and bool((f - o).norm() <= 0.01 * o.norm()) for f, o in pairs)


def _batched(given: Sequence[Any], outputs: Sequence[list[Tensor]]) -> list[bool] | None:
    """Which tensors of a call have its rows; None if calls cannot be stacked."""
    rows = [len(found[0]) if found[0].ndim else 0 for found in outputs]
    form: Any = lambda t: (t.dtype, t.shape[1:])  # noqa: E731
    forms = [mapped(nest, form) for nest in given]
    own = [
        [t.ndim > 0 and len(t) == r for t in found] for found, r in zip(outputs, rows, strict=True)
    ]
    if any(form != forms[0] for form in forms) or not all(map(all, own)):
        return None
    flags = []
    for column in zip(*map(tensors_in, given), strict=True):
        flags.append(all(t.ndim > 0 and len(t) == r for t, r in zip(column, rows, strict=True)))
        if not flags[-1] and not all(torch.equal(t, column[0]) for t in column):
            return None
    return flags


def _stacked(given: Sequence[Any], batched: Sequence[bool]) -> Any:
    columns = zip(batched, zip(*map(tensors_in, given), strict=True), strict=True)
    made = iter([torch.cat(c) if own else c[0] for own, c in columns])
    return mapped(given[0], lambda _: next(made))


def _columns(outputs: Sequence[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*outputs, strict=True)]


def floats_in(nest: Any) -> list[Tensor]:
    """The floating point tensors of a nest, in order."""
    return [t for t in tensors_in(nest) if t.is_floating_point()]


def _floats_wide(x: Tensor) -> Tensor:
    return wide(x) if x.is_floating_point() else x


def widened(module: Module) -> Module:
    """The same module in float32, where it held anything narrower."""
    tensors = [*module.parameters(), *module.buffers()]
    narrow = any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
    return module.float() if narrow else module
