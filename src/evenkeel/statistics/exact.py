"""Where float64 is: sums are taken where the values are, and become exact numbers on the CPU, here.

The CPU computes in float64. Other devices compute in float32: some have no float64, others are many
times slower in it. There every value is centred before it is multiplied, products are summed in blocks,
and blocks are added in pairs (high, low) that lose nothing. Results wait on the device as ``Pending``
and leave it together (``settled``): a transfer makes the host wait for everything that was asked of the
device before.

Bounds, with u = 2^-24: the sum of n products of centred values is off by at most
``(BLOCK + 2 d + 4) u sum |products|`` for products of d values, whatever n is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
BLOCK = 64  # products added without keeping what was rounded away
HAVE_FLOAT64 = frozenset({"cpu", "cuda"})  # kinds of devices that know it at all; Apple's does not
WIDE = frozenset({"cpu"})  # kinds of devices that compute in float64


def at_home(x: Tensor) -> Tensor:
    """``x`` where it is, if that device knows float64; on the CPU otherwise.

    >>> at_home(torch.ones(1)).device.type
    'cpu'

    """
    return x if x.device.type in HAVE_FLOAT64 else x.cpu()


def working_dtype(device: torch.device) -> torch.dtype:
    """In which statistics are computed there."""
    return torch.float64 if device.type in WIDE else torch.float32


def working(x: Tensor) -> Tensor:
    """The same values as statistics are computed with, without a graph."""
    return x.detach().to(working_dtype(x.device))


# ---- sums


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and what was rounded away, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def pair_sum(parts: Tensor) -> Tensor:
    """Sum over the first axis as (2, ...), high and low, added in pairs.

    >>> pair_sum(torch.tensor([1e8, 1.0, -1e8, 1.0])).sum()
    tensor(2.)

    """
    high, low = parts, torch.zeros_like(parts)
    while len(high) > 1:
        half = len(high) // 2
        total, lost = two_sum(high[:half], high[half : 2 * half])
        lost = lost + low[:half] + low[half : 2 * half]
        high = torch.cat([total, high[2 * half :]])
        low = torch.cat([lost, low[2 * half :]])
    return torch.cat([high, low])


def add_pairs(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two (2, ...) pairs."""
    total, lost = two_sum(a[0], b[0])
    return torch.stack([total, lost + a[1] + b[1]])


def sum_pair(x: Tensor) -> Tensor:
    """Sum over the last axis as a pair (2, ...)."""
    if x.dtype == torch.float64:
        total = x.sum(-1)
        return torch.stack([total, torch.zeros_like(total)])
    return pair_sum(_blocks(x).sum(-1))


def product_pair(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` over the last axis: (..., F, n) and (..., G, n) to a pair (2, ..., F, G)."""
    if a.dtype == torch.float64:
        total = a @ b.transpose(-1, -2)
        return torch.stack([total, torch.zeros_like(total)])
    with float32_products(a.device):
        return pair_sum(_blocks(a) @ _blocks(b).transpose(-1, -2))


def _blocks(x: Tensor) -> Tensor:
    """(..., n) to (blocks, ..., BLOCK), filled up with zeros."""
    filled = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
    return filled.reshape(*x.shape[:-1], -1, BLOCK).movedim(-2, 0)


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices are not rounded further (TF32, autocast)."""
    knows = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if knows else nullcontext():
        if device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


# ---- leaving the device


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A result that still lies on a device.

    Attributes:
        tensors: what it is made of.
        finish: what makes it: called with as many tensors on the CPU, in float64 or int64.

    """

    tensors: tuple[Tensor, ...]
    finish: Callable[..., T]

    def now(self) -> T:
        """The result, after a transfer of its own."""
        return self.finish(*fetched(self.tensors))


def settled(pending: Iterable[Pending[Any]]) -> list[Any]:
    """The results, after one transfer for all of them."""
    waiting = list(pending)
    arrived = iter(fetched([t for p in waiting for t in p.tensors]))
    return [p.finish(*[next(arrived) for _ in p.tensors]) for p in waiting]


def check(fine: Tensor, error: Callable[[], Exception]) -> Pending[None]:
    """A condition on a device, () bool; its error is raised when it is settled."""

    def finish(holds: Tensor) -> None:
        if not holds:
            raise error()

    return Pending((fine,), finish)


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """On the CPU, floating values in float64 and others in int64; one transfer from each device."""
    found = [t.detach() for t in tensors]
    places: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(found):
        if tensor.device.type not in WIDE:
            places.setdefault(tensor.device, []).append(index)
    for indices in places.values():
        parts = [_words(found[i]) for i in indices]
        words = torch.cat(parts).cpu()
        start = 0
        for i, part in zip(indices, parts, strict=True):
            own = words[start : start + len(part)].clone()  # its bytes begin where 8 of them may
            start += len(part)
            floating = found[i].is_floating_point()
            values = own.view(torch.float32 if floating else torch.int64)
            found[i] = values.reshape(found[i].shape)
    return [t.to(torch.float64 if t.is_floating_point() else torch.int64) for t in found]


def _words(x: Tensor) -> Tensor:
    """The bits of a tensor, as int32: tensors of every kind travel together."""
    flat = x.reshape(-1).to(torch.float32 if x.is_floating_point() else torch.int64)
    return flat.contiguous().view(torch.int32)


def placed(values: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 values of the CPU where ``like`` is, as high and low part in its working dtype."""
    dtype = working_dtype(like.device)
    high = values.to(dtype)
    low = (values - high.double()).to(dtype)
    return high.to(like.device), low.to(like.device)
