"""Methods of block reconstruction whose targets may come from another order's trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.methods.base import Method
from evenkeel.quantizers.workspace.alignment import Counted, MixedOrder, PairAt, Teacher


@dataclass(frozen=True)
class Aligned(Method):
    """Block reconstruction with or without mixed-order alignment (SA-PTQ, arXiv:2505.02242, Eq. 15).

    With it a block of the quantized denoiser, at one order's evaluation, learns what the same block puts out
    in full precision at the other order's: min over the rounding of E_j |f(x_t, t) - f_hat(x_s, s)|^2.

    Attributes:
        alignment: ``none``, or ``mixed-order``.
        teacher, pair_at, counted: see :class:`evenkeel.quantizers.workspace.alignment.MixedOrder`.

    """

    alignment: Literal["none", "mixed-order"] = field(default="none", kw_only=True)
    teacher: Teacher = field(default="printed", kw_only=True)
    pair_at: PairAt = field(default="start", kw_only=True)
    counted: Counted = field(default="intervals", kw_only=True)

    @property
    def pairs(self) -> MixedOrder | None:
        """How calls and teachers are paired."""
        return self._pairs if self.alignment == "mixed-order" else None

    @property
    def _pairs(self) -> MixedOrder:
        return MixedOrder(self.teacher, self.pair_at, self.counted)

    def __post_init__(self) -> None:
        if self.alignment not in ("none", "mixed-order"):
            raise QuantizationError(
                f"alignment must be none or mixed-order, got {self.alignment!r}."
            )
        if self._pairs != MixedOrder() and self.alignment == "none":
            raise QuantizationError(
                "teacher, pair_at and counted say how orders are aligned: set alignment='mixed-order'."
            )
