"""A fixed number of a layer's rows, chosen by what they are and not by when they came."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def row_keys(pairs: Tensor, step: int, branch: Tensor, tokens: int) -> Tensor:
    """(rows, tokens) int64: a hash of (pair, step, branch, token), evenly spread.

    The lowest bit is the pair's: whether its number is odd (``folds_of``).

    Args:
        pairs: (rows,) int64, which (prompt, seed) a row belongs to.
        step: of the sampler.
        branch: (rows,) int64, of guidance.
        tokens: positions per row.

    >>> row_keys(torch.tensor([0, 1]), 3, torch.tensor([0, 0]), 2).unique().numel()
    4

    """
    key = _mixed(_mixed(_mixed(pairs) + step) + branch)
    keys = _mixed(key[:, None] + torch.arange(tokens, device=pairs.device))
    return (keys & ~1) | (pairs & 1)[:, None]


def folds_of(keys: Tensor) -> Tensor:
    """(n,) bool: two folds of rows that share no (prompt, seed) pair; of one pair every second row.

    >>> folds_of(row_keys(torch.tensor([4, 7]), 0, torch.tensor([0, 0]), 2).flatten()).tolist()
    [False, False, True, True]

    """
    odd = (keys & 1).bool()
    alternating = torch.arange(len(keys), device=keys.device) % 2 == 1
    return torch.where(odd.any() & ~odd.all(), odd, alternating)


def _mixed(x: Tensor) -> Tensor:
    """Splitmix64 (Steele, Lea & Flood 2014), without its sign bit."""
    x = x + _signed(_MIX[0])
    x = (x ^ _shifted(x, 30)) * _signed(_MIX[1])
    x = (x ^ _shifted(x, 27)) * _signed(_MIX[2])
    return (x ^ _shifted(x, 31)) & 0x7FFFFFFFFFFFFFFF


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # torch shifts the sign in


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


@dataclass
class RowSample:
    """The rows with the smallest keys among all that were offered, at most so many.

    Any split of the rows over calls, batches or processes gives the same sample.

    Attributes:
        size: at most so many rows are kept.

    """

    size: int
    _parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _held: int = 0
    _bound: int | None = None  # rows with larger keys are never kept

    @property
    def nbytes(self) -> int:
        """Of what it holds."""
        return sum(keys.nbytes + rows.nbytes for keys, rows in self._parts)

    def offer(self, keys: Tensor, rows: Tensor) -> None:
        """Take in rows (n, F) with their keys (n,); the device is not waited for."""
        if keys.device.type == "cpu":  # where counting them waits for nothing
            few = slice(None) if self._bound is None else (keys <= self._bound).nonzero()[:, 0]
            keys, rows = keys[few], rows[few]
        keys, rows = _smallest(keys, rows.detach(), self.size)
        self._parts.append((keys, rows.float()))
        self._held += len(self._parts[-1][0])
        if self._held > 2 * self.size:
            self.sorted()

    def fresh(self) -> RowSample:
        """An empty one of the same size."""
        return RowSample(self.size)

    def merge(self, other: RowSample) -> None:
        """Take in what another sample of the same size kept."""
        keys, rows = other.sorted()
        if len(keys):
            self.offer(keys, rows)

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Keys (n,) and rows (n, F) float32 in the order of the keys; no more than ``size``."""
        if not self._parts:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, 1)
        keys, rows = (torch.cat(column) for column in zip(*self._parts, strict=True))
        keys, rows = _smallest(keys, rows, self.size)
        self._parts, self._held = [(keys, rows)], len(keys)
        if len(keys) == self.size and keys.device.type == "cpu":
            self._bound = int(keys[-1])
        return keys, rows


class RowFile(RowSample):
    """The same sample with its rows in a file, for layers whose rows together are too many for memory.

    Args:
        size: at most so many rows are kept.
        path: of the file, which is made when the first rows come.

    """

    def __init__(self, size: int, path: Path) -> None:
        super().__init__(size)
        self.path = path
        self._keys = torch.empty(0, dtype=torch.int64)  # of the rows in the file, in their order
        self._rows: Tensor | None = None

    def offer(self, keys: Tensor, rows: Tensor) -> None:
        """Take in rows (n, F); those that stay are written over those that go."""
        if self._rows is None:
            count = self.size * rows.shape[1]
            self._rows = torch.from_file(str(self.path), shared=True, size=count).view(
                self.size, -1
            )
        keys, rows = _smallest(keys, rows.detach(), self.size)
        keys, held = keys.cpu(), len(self._keys)
        stay = (
            torch.cat([self._keys, keys])
            .topk(min(self.size, held + len(keys)), largest=False)
            .indices
        )
        come = stay[stay >= held] - held
        free = torch.ones(self.size, dtype=torch.bool)
        free[stay[stay < held]] = False
        places = free.nonzero()[: len(come), 0]
        self._keys = torch.cat([self._keys, keys.new_empty(len(stay) - held)])
        self._keys[places] = keys[come]
        self._rows[places] = rows[come.to(rows.device)].float().cpu()

    def fresh(self) -> RowFile:
        """An empty one of the same size; one at a time."""
        return RowFile(self.size, self.path.with_name(f"{self.path.name}.fresh"))

    @property
    def nbytes(self) -> int:
        """Of the rows in the file."""
        return 0 if self._rows is None else self._rows.nbytes

    def sorted(self) -> tuple[Tensor, Tensor]:
        """See ``RowSample``; read into memory."""
        if self._rows is None:
            return super().sorted()
        order = self._keys.argsort()
        return self._keys[order], self._rows[order]


def _smallest(keys: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    found, order = keys.topk(min(size, len(keys)), largest=False, sorted=True)
    return found, rows[order]
