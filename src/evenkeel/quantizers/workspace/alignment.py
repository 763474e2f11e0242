"""Mixed-order alignment: which call of the quantized denoiser learns from which full-precision call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from evenkeel.errors import QuantizationError

Teacher = Literal["printed", "midpoint", "same-state"]
PairAt = Literal["start", "end"]
Counted = Literal["intervals", "evaluations"]

Call = TypeVar("Call")


@dataclass(frozen=True)
class MixedOrder:
    """Pairs of Sampling-Aware Quantization (arXiv:2505.02242, section 4.1), reconstructed.

    From one x_T the full-precision denoiser runs with a solver of first order, which evaluates it at
    (x_t, t), and with one of second order, which besides evaluates it at midpoints (u_s, s). In every
    interval the student is the quantized denoiser at one of both, the teacher full precision at the other.

    Attributes:
        teacher: ``printed`` (Eqs. 12, 15, 18): quantized at the midpoint, taught by (x_t, t);
            ``midpoint`` (the paper's words): quantized at (x_t, t), taught by the midpoint;
            ``same-state``: both at (x_t, t) in one interval and at the midpoint in the next, which is
            ordinary reconstruction on calls of both runs, as many of them.
        pair_at: whether (x_t, t) is the start or the end of the midpoint's interval. No solver evaluates
            the end of the last interval: there it is the start.
        counted: what a number of steps counts: intervals, or evaluations of the second-order solver,
            which are twice as many.

    Raises:
        QuantizationError: none of these values.

    >>> MixedOrder().paired(["x0", "x1", "x2"], ["u0", "u1", "u2"])
    [('u0', 'x0'), ('u1', 'x1'), ('u2', 'x2')]
    >>> MixedOrder("midpoint", "end").paired(["x0", "x1", "x2"], ["u0", "u1", "u2"])
    [('x1', 'u0'), ('x2', 'u1'), ('x2', 'u2')]
    >>> MixedOrder("same-state").paired(["x0", "x1", "x2"], ["u0", "u1", "u2"], turn=1)
    [('u0', 'u0'), ('x1', 'x1'), ('u2', 'u2')]

    """

    teacher: Teacher = "printed"
    pair_at: PairAt = "start"
    counted: Counted = "intervals"

    def __post_init__(self) -> None:
        for name, kind in (("teacher", Teacher), ("pair_at", PairAt), ("counted", Counted)):
            if getattr(self, name) not in get_args(kind):
                raise QuantizationError(
                    f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}."
                )

    def paired(
        self, first: Sequence[Call], middle: Sequence[Call], turn: int = 0
    ) -> list[tuple[Call, Call]]:
        """(student, teacher) of every interval.

        Args:
            first: of every interval the first-order solver's evaluation.
            middle: of every interval the second-order solver's evaluation at the midpoint.
            turn: with ``same-state``, which of both an interval takes changes with it.

        """
        if self.teacher == "same-state":
            both = [(first, middle)[(j + turn) % 2][j] for j in range(len(first))]
            return list(zip(both, both, strict=True))
        if self.pair_at == "end":
            first = [*first[1:], first[-1]]
        pairs = list(zip(middle, first, strict=True))
        return pairs if self.teacher == "printed" else [(x, u) for u, x in pairs]

    def intervals(self, steps: int) -> int:
        """Of so many steps.

        Raises:
            QuantizationError: an odd number of evaluations.

        """
        if self.counted == "intervals":
            return steps
        if steps % 2:
            raise QuantizationError(
                f"{steps} evaluations of a second-order solver are no whole number of intervals: "
                "give an even number, or counted='intervals'."
            )
        return steps // 2

    def as_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {"teacher": self.teacher, "pair_at": self.pair_at, "counted": self.counted}
