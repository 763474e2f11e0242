"""Moments of full-precision outputs and their quantization errors, centred and mergeable.

Notation: ``e`` the full-precision output, ``D = q - e`` the error of the quantized one at the same
input, ``x`` that input. One row of moments describes one prompt, one step, one channel. The basis is
(e, D) and not (e, q): D is small, and (e, q) moments would lose its digits by cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from evenkeel.errors import OVERFLOW, CalibrationError
from evenkeel.statistics.exact import Pending, product_pair, sum_pair, working
from evenkeel.storage.checks import Tensors

# Joint central moments S_ij = sum (e - mean e)^i (D - mean D)^j, orders 2 to 4.
ORDERS: tuple[tuple[int, int], ...] = tuple((n - j, j) for n in (2, 3, 4) for j in range(n + 1))
_POSITION = {order: i for i, order in enumerate(ORDERS)}
# Which products of (e', D', e'^2, e'D', D'^2) are summed for them.
_PRODUCTS = {
    (2, 0): (0, 0), (1, 1): (0, 1), (0, 2): (1, 1),
    (3, 0): (0, 2), (2, 1): (1, 2), (1, 2): (0, 4), (0, 3): (1, 4),
    (4, 0): (2, 2), (3, 1): (2, 3), (2, 2): (2, 4), (1, 3): (3, 4), (0, 4): (4, 4),
}  # fmt: skip
_BINOMIAL = ((1,), (1, 1), (1, 2, 1), (1, 3, 3, 1), (1, 4, 6, 4, 1))


@dataclass(frozen=True)
class PairedMoments:
    """Moments over a set of elements, for any leading shape (prompts, steps, channels).

    Sums of products of deviations from the means, not divided by anything, so that disjoint sets
    merge (Chan, Golub & LeVeque 1979; Pebay 2008 for orders above 2). Raw power sums are never
    formed: at mean 1e4 and unit variance they lose every digit.

    Attributes:
        count: (...) int64, elements seen.
        mean_e, mean_d, mean_x: (...) float64.
        central: (..., 12) float64, ``sum (e')^i (D')^j`` in the order of ``ORDERS``.
        s_xx, s_xe, s_xd: (...) float64, second order with the sample x.

    """

    count: Tensor
    mean_e: Tensor
    mean_d: Tensor
    mean_x: Tensor
    central: Tensor
    s_xx: Tensor
    s_xe: Tensor
    s_xd: Tensor

    @classmethod
    def of(cls, e: Tensor, d: Tensor, x: Tensor) -> PairedMoments:
        """Moments over the last axis of equally shaped tensors, on any device.

        Raises:
            CalibrationError: shapes differ, nothing to average, or a non-finite value.

        >>> m = PairedMoments.of(torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8))
        >>> m.central.shape
        torch.Size([2, 12])

        """
        return cls.pending(e, d, x).now()

    @classmethod
    def pending(cls, e: Tensor, d: Tensor, x: Tensor) -> Pending[PairedMoments]:
        """The same, still where the tensors are.

        Off the CPU a value is centred before products are formed, about a rounded mean and then about
        what is left of the mean. Bounds with u = 2^-24: means are off by at most
        ``70 u mean |value - mean|``, sums of products by ``76 u sum |e'|^i |D'|^j``.
        """
        if not (e.shape == d.shape == x.shape) or e.shape[-1] == 0:
            raise CalibrationError(
                f"moments need equal, non-empty shapes; got e {tuple(e.shape)}, D {tuple(d.shape)}, "
                f"x {tuple(x.shape)}."
            )
        n = e.shape[-1]
        values = torch.stack([working(t) for t in (e, d, x)], -2)
        mean = values.mean(-1)
        left = torch.zeros_like(mean)
        values = values - mean[..., None]
        if values.dtype != torch.float64:
            left = sum_pair(values).sum(0) / n
            values = values - left[..., None]
        e, d, x = values.unbind(-2)
        # A product of two centred second-order terms reaches every order up to 4: sums of products.
        basis = torch.stack([e, d, e * e, e * d, d * d, x], -2)
        gram = product_pair(basis, basis)

        def finish(mean: Tensor, left: Tensor, gram: Tensor) -> PairedMoments:
            mean_e, mean_d, mean_x = (mean + left).unbind(-1)
            if not torch.isfinite(mean_e + mean_d + mean_x).all():
                raise CalibrationError(
                    "a model output or sample is not finite (NaN or infinity): check the denoisers; "
                    f"{OVERFLOW}"
                )
            sums = gram.sum(0)
            return cls(
                count=torch.full(mean_e.shape, n, dtype=torch.int64),
                mean_e=mean_e,
                mean_d=mean_d,
                mean_x=mean_x,
                central=torch.stack([sums[(..., *_PRODUCTS[o])] for o in ORDERS], -1),
                s_xx=sums[..., 5, 5],
                s_xe=sums[..., 5, 0],
                s_xd=sums[..., 5, 1],
            )

        return Pending((mean, left, gram), finish)

    def s(self, i: int, j: int) -> Tensor:
        """``sum (e')^i (D')^j``."""
        return self.central[..., _POSITION[(i, j)]]

    def map(self, change: Callable[[Tensor], Tensor]) -> PairedMoments:
        """Apply ``change``, which keeps trailing axes, to every field."""
        return PairedMoments(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[PairedMoments], dim: int = 0) -> PairedMoments:
        """Sets side by side along one of the leading dimensions."""
        names = [f.name for f in fields(cls)]
        return cls(**{n: torch.cat([getattr(p, n) for p in parts], dim) for n in names})

    def pooled(self, *dims: int) -> PairedMoments:
        """Merge along leading dimensions: the moments of the union of the sets.

        With the pooled means M and each set's deviation delta = mean - M,
        ``S_ij = sum_sets sum_{a<=i, b<=j} C(i,a) C(j,b) delta_e^(i-a) delta_D^(j-b) S_ab``,
        where S_00 = n and S_10 = S_01 = 0.
        """
        axes = tuple(d % self.count.dim() for d in dims)
        n = self.count.double()
        total = n.sum(axes, keepdim=True)
        grand = [
            (n * m).sum(axes, keepdim=True) / total for m in (self.mean_e, self.mean_d, self.mean_x)
        ]
        de, dd, dx = self.mean_e - grand[0], self.mean_d - grand[1], self.mean_x - grand[2]

        def local(a: int, b: int) -> Tensor | None:
            if (a, b) == (0, 0):
                return n
            return None if a + b == 1 else self.s(a, b)

        central = []
        for i, j in ORDERS:
            terms = torch.zeros_like(n)
            for a in range(i + 1):
                for b in range(j + 1):
                    s_ab = local(a, b)
                    if s_ab is not None:
                        weight = _BINOMIAL[i][a] * _BINOMIAL[j][b]
                        terms = terms + weight * de ** (i - a) * dd ** (j - b) * s_ab
            central.append(terms.sum(axes))
        return PairedMoments(
            count=self.count.sum(axes),
            mean_e=grand[0].squeeze(axes),
            mean_d=grand[1].squeeze(axes),
            mean_x=grand[2].squeeze(axes),
            central=torch.stack(central, -1),
            s_xx=(self.s_xx + n * dx * dx).sum(axes),
            s_xe=(self.s_xe + n * dx * de).sum(axes),
            s_xd=(self.s_xd + n * dx * dd).sum(axes),
        )

    def __add__(self, other: PairedMoments) -> PairedMoments:
        """The moments of the union of two disjoint sets of elements."""
        return PairedMoments.joined([self.map(_leading), other.map(_leading)]).pooled(0)


# What a file holds; the count follows from the latents' size.
MOMENTS = tuple(f.name for f in fields(PairedMoments) if f.name != "count")


def moments_schema(prefix: str = "moments.", *, optional: bool = False) -> dict[str, Tensors]:
    """How a file holds the moments of P prompts, T steps and C channels."""
    wanted = {n: Tensors(torch.float64, ("P", "T", "C"), optional=optional) for n in MOMENTS}
    wanted["central"] = replace(wanted["central"], shape=("P", "T", "C", len(ORDERS)))
    return {prefix + n: w for n, w in wanted.items()}


def _leading(t: Tensor) -> Tensor:
    return t[None]
