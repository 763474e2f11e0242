"""The two factors of an adapter in a few bits, one rounded and the other refitted to it in turn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.errors import CalibrationError
from evenkeel.low_rank.metric import Components, OutputMetric
from evenkeel.storage.packing import pack, unpack

GROUP = 32  # values that share a scale
BITS = (3, 4, 8, 16)
CLIPPING = (1.0, 0.9, 0.8, 0.7)  # of the largest value in a group
ROUNDS = 3


@dataclass(frozen=True)
class Factor:
    """One factor of an adapter, a row per component; in memory as in its file.

    Attributes:
        bits: of a value; 16 keeps float16 values.
        width: features or outputs, n.
        codes: uint8, one after another without gaps (``storage.packing``), 2^(bits-1) - 1 added to each so
            that none is negative; for 16 bits (r, n) float16.
        scale: (r, ceil(n / GROUP)) float16, a code of 1 in every group; None for 16 bits.

    """

    bits: int
    width: int
    codes: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, bits: int, values: Tensor, scale: Tensor) -> Factor:
        """From signed codes (r, n), from -top to top."""
        return cls(
            bits, values.shape[1], pack((values + top_of(bits)).to(torch.uint8), bits), scale
        )

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.codes if self.scale is None else self.scale)

    @property
    def nbytes(self) -> int:
        """What it takes, in memory and in a file."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def to(self, device: torch.device) -> Factor:
        """The same on a device."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, codes=self.codes.to(device), scale=scale)

    def take(self, rows: Tensor | slice) -> Factor:
        """Some of the components."""
        if self.scale is None:
            return replace(self, codes=self.codes[rows])
        return Factor.of(self.bits, self._signed(torch.int16)[rows], self.scale[rows])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(r, n) in this dtype.

        >>> rounded(torch.tensor([[1.0, -0.5, 0.25]]), 4).dense()
        tensor([[ 0.9980, -0.5703,  0.2852]])
        """
        if self.scale is None:
            return self.codes.to(dtype)
        return _spread(self._signed(dtype), self.scale.to(dtype))

    def _signed(self, dtype: torch.dtype) -> Tensor:
        count = self.rank * self.width
        codes = unpack(self.codes, self.bits, count).view(self.rank, self.width)
        return codes.to(dtype) - top_of(self.bits)


def top_of(bits: int) -> int:
    """The largest code; the smallest is minus it."""
    return int(2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class LayerAdapter:
    """What stands beside one layer: ``x -> up^T (down x)``.

    Attributes:
        name: dotted path of the layer in the denoiser.
        down: (r, F); of a convolution F is in_channels x kernel, in the order of ``weight.flatten(1)``.
        up: (r, O).
        kernel: height and width of a convolution's kernel; empty for a linear layer.

    """

    name: str
    down: Factor
    up: Factor
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.down.rank

    def to(self, device: torch.device) -> LayerAdapter:
        """The same on a device."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))

    @property
    def unpacked(self) -> LayerAdapter:
        """The same values in 16 bits, exact: faster where it is used often and soon forgotten."""
        down, up = (Factor(16, f.width, f.dense(torch.float16), None) for f in (self.down, self.up))
        return replace(self, down=down, up=up)

    @property
    def change(self) -> Tensor:
        """(O, F) float32: what it adds to the layer's weight."""
        return self.up.dense().T @ self.down.dense()

    @property
    def stored_bytes(self) -> int:
        """Codes and scales; see ``bytes_of``."""
        return self.down.nbytes + self.up.nbytes


def bytes_of(rank: int, features: int, outputs: int, bits: int) -> int:
    """What an adapter of this rank takes, in a file and in memory.

    >>> bytes_of(2, 64, 32, 4), bytes_of(2, 64, 32, 16)
    (108, 384)

    """
    scales = 0 if bits == 16 else -(-features // GROUP) + -(-outputs // GROUP)
    return sum(-(-rank * n * bits // 8) for n in (features, outputs)) + 2 * rank * scales


def fit_factors(
    name: str, metric: OutputMetric, change: Tensor, components: Components, rank: int, bits: int
) -> LayerAdapter:
    """The adapter of a rank with factors of so many bits, rounded as part of the fit.

    One factor is rounded and the other refitted to it in the metric, in turn; of all rounds the one
    with the smallest error is kept, the first of which rounds both at the end.

    Args:
        name: of the layer.
        metric: of its errors.
        change: D (O, F), what the adapter should be.
        components: of ``change`` in this metric.
        rank: how many of them; at least 1.
        bits: one of ``BITS``.

    Raises:
        CalibrationError: a rank or bits out of range.

    """
    if not 1 <= rank <= len(components) or bits not in BITS:
        raise CalibrationError(
            f"{name}: expected a rank from 1 to {len(components)} and bits out of {BITS}; got rank "
            f"{rank} and {bits} bits."
        )
    change = metric.working(change)
    down, up = components.down[:rank], components.up[:rank]
    best, most = (down, up), -float("inf")
    coarse = on_grid(down, bits)
    for last in (bits == 16, *(i == ROUNDS - 1 for i in range(ROUNDS))):
        gained = metric.gained(change, coarse, on_grid(up, bits))
        if gained > most:
            best, most = (down, up), gained
        if last:
            break
        up = on_grid(metric.best_up(change, coarse), bits)
        down = metric.best_down(change, up)
        # Both are scaled alike again; else one of them leaves what its scales can hold.
        balance = (up.norm(dim=1) / down.norm(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
        down = down * balance[:, None]
        coarse = on_grid(down, bits)
        up = metric.best_up(change, coarse)
    return LayerAdapter(name, rounded(best[0], bits), rounded(best[1], bits))


def rounded(values: Tensor, bits: int) -> Factor:
    """Rows (r, n) to so many bits, the clipping of every group searched for the least squared error.

    Raises:
        CalibrationError: a value too large for float16 scales, or not finite.

    """
    if bits == 16:
        return Factor(bits, values.shape[1], _half(values), None)
    codes, scales = _codes(values, bits)
    return Factor.of(bits, codes, scales.half())


def on_grid(values: Tensor, bits: int) -> Tensor:
    """``rounded(values, bits).dense()`` in the dtype of the values."""
    if bits == 16:
        return _half(values).to(values)
    return _spread(*_codes(values, bits))


def _codes(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Signed codes (r, n) and scales (r, groups), both in the dtype of the values."""
    r, n = values.shape
    groups = F.pad(values, (0, -n % GROUP)).reshape(r, -1, GROUP)
    top = top_of(bits)
    largest = groups.abs().amax(-1, keepdim=True)
    shares = torch.tensor(CLIPPING).to(largest)[:, None, None, None]
    scales = _scale(shares * largest / top, bits).to(values)
    tried = (groups / scales.clamp_min(1e-30)).round().clamp(-top, top)
    best = (tried * scales - groups).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    codes = tried.gather(0, best.expand(-1, -1, -1, GROUP))[0]
    return codes.reshape(r, -1)[:, :n], scales.gather(0, best)[0, ..., 0]


def _spread(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (r, n) times the scales (r, groups) of their groups."""
    r, n = codes.shape
    if n % GROUP:
        return codes * scale.repeat_interleave(GROUP, 1)[:, :n]
    return (codes.view(r, -1, GROUP) * scale[..., None]).view(r, n)


def without_empty(adapter: LayerAdapter) -> LayerAdapter | None:
    """The adapter without components that rounding made zero; None if nothing is left."""
    alive = (adapter.down.dense() != 0).any(1) & (adapter.up.dense() != 0).any(1)
    if bool(alive.all()):
        return adapter
    if not bool(alive.any()):
        return None

    return replace(adapter, down=adapter.down.take(alive), up=adapter.up.take(alive))


def _scale(values: Tensor, bits: int) -> Tensor:
    """Float16 with so short a mantissa that a scale times a code is a float16, too."""
    mantissa, exponent = torch.frexp(values)
    short = 2.0 ** (12 - bits)
    return _half(torch.ldexp((mantissa * short).round() / short, exponent))


def _half(values: Tensor) -> Tensor:
    found = values.half()
    if not bool(found.isfinite().all()):
        raise CalibrationError(
            "a factor of an adapter is too large for float16, or not finite; the layer's inputs or "
            "gradients differ by more orders of magnitude than 16 bits hold. Use more prompts."
        )
    return found
