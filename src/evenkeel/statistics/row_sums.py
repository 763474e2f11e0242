"""Sums of a regression's rows that stay on the rows' device until they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from evenkeel.statistics.exact import add_pairs, float32_products, two_sum

ROWS = 512  # rows of one product


@dataclass
class RowSums:
    """Sums over rows (h, t) about a pilot, in float32 with what was rounded away beside them.

    The pilot is the mean of the first rows, zero where no constant is fitted: sums about a place near
    the mean lose nothing to it. With u = 2^-24, ``n`` rows give sums of products that are off by at
    most ``(ROWS + 8) u sum |h_i - pilot_i| |h_j - pilot_j|``, however large n is.

    Attributes:
        features, targets: F and O.
        centred: whether there is a pilot.
        count: rows seen.
        pilot: (F + O,), with the rows.
        rows: (2, F + O) sum of rows about the pilot, high and low part as all that follow.
        hh: (2, F, F), of features with features.
        ht: (2, F, O), of features with targets.
        tt: (2, O), of each target with itself.
        finite: () bool, whether all rows were.

    """

    features: int
    targets: int
    centred: bool
    count: int = 0
    pilot: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    hh: Tensor = field(init=False)
    ht: Tensor = field(init=False)
    tt: Tensor = field(init=False)
    finite: Tensor = field(init=False)

    def add(self, h: Tensor, t: Tensor) -> None:
        """Take in rows h (n, F) and t (n, O) on one device."""
        if not len(h):
            return
        h, t = h.detach(), t.detach().to(h.device)
        if not self.count:
            self._open(h, t)
        self.count += len(h)
        f = self.features
        with float32_products(h.device):
            for start in range(0, len(h), ROWS):
                both = torch.cat(
                    [h[start : start + ROWS].float(), t[start : start + ROWS].float()], 1
                )
                both = both - self.pilot
                x, y = both[:, :f], both[:, f:]
                self.finite = self.finite & both.isfinite().all()
                self.rows = add_pairs(self.rows, _alone(both.sum(0)))
                self.tt = add_pairs(self.tt, _alone((y * y).sum(0)))
                self.ht = add_pairs(self.ht, _alone(x.T @ y))
                _add_in_place(self.hh, x.T @ x)

    def _open(self, h: Tensor, t: Tensor) -> None:
        f, o = self.features, self.targets
        zeros = torch.zeros
        first = torch.cat([h[:ROWS].float().mean(0), t[:ROWS].float().mean(0)])
        self.pilot = first if self.centred else torch.zeros_like(first)
        self.rows = zeros(2, f + o, device=h.device)
        self.hh = zeros(2, f, f, device=h.device)
        self.ht = zeros(2, f, o, device=h.device)
        self.tt = zeros(2, o, device=h.device)
        self.finite = torch.ones((), dtype=torch.bool, device=h.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is to be settled."""
        return (self.pilot, self.rows, self.hh, self.ht, self.tt, self.finite)


def _alone(high: Tensor) -> Tensor:
    return torch.stack([high, torch.zeros_like(high)])


def _add_in_place(pair: Tensor, high: Tensor) -> None:
    """The largest of the sums, without a third copy of it."""
    total, lost = two_sum(pair[0], high)
    pair[0].copy_(total)
    pair[1].add_(lost)
