"""What a measured change says about a published one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evenkeel.estimate import Estimate

Word = Literal["reproduced", "opposite", "null", "underpowered"]


@dataclass(frozen=True)
class Verdict:
    """A published relative change beside ours.

    Attributes:
        word: ``reproduced``, the interval excludes 0 on the paper's side; ``opposite``, on the other;
            ``null``, it includes 0 and excludes a change as large as the paper's; ``underpowered``, it
            includes both.
        published: relative change of the paper's measure; below 0 is better.
        value, low, high: ours, relative to the quantized arm's measure, with the 95 % interval.

    """

    word: Word
    published: float
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.word}: {100 * self.published:+.1f} % published, {100 * self.value:+.1f} % "
            f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}] here"
        )


def judged(published: float, change: Estimate, quantized: float) -> Verdict:
    """The verdict on a paired change of a measure whose quantized value is ``quantized``.

    >>> judged(-0.05, Estimate(-0.4, 0.1, -0.6, -0.2, 500), 4.0).word
    'reproduced'
    >>> judged(-0.05, Estimate(0.0, 0.01, -0.02, 0.02, 500), 4.0).word
    'null'

    """
    value, low, high = (v / quantized for v in (change.value, change.low, change.high))
    side = -1.0 if published < 0 else 1.0
    word: Word
    if low > 0 or high < 0:
        word = "reproduced" if side * value > 0 else "opposite"
    else:
        word = "underpowered" if low <= published <= high else "null"
    return Verdict(word, published, value, low, high)


def images_needed(published: float, change: Estimate, quantized: float) -> int:
    """So many images that the interval's half is half of the paper's change, from a measured one.

    >>> images_needed(-0.1, Estimate(-0.4, 0.2, -0.8, 0.0, 100), 4.0)
    400

    """
    half = (change.high - change.low) / 2 / quantized
    wanted = abs(published) / 2
    return round(change.n * (half / wanted) ** 2) if wanted > 0 else change.n
