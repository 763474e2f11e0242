"""SA-PTQ: rounding learned block by block, on calls of two orders of the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.methods.q_diffusion import QDiffusion
from evenkeel.quantizers.numbers.grids import Grid

WIDE = 8


@dataclass(frozen=True)
class SAPTQ(QDiffusion):
    """A reconstruction of "Sampling-Aware Quantization", CVPR 2026 (arXiv:2505.02242), for W8A8 (and W4A8).

    Its authors have released no code. What is known: BRECQ with AdaRound, of which the rounding alone is
    learned, every block for itself, from pairs of calls of a first- and a second-order solver with one
    noise (Eq. 15, Algorithm 1). What is in no source has BRECQ's settings inside PTQD: ranges of weights by
    squared error with a zero point, first and last layer with 8 bits, 10,000 iterations in minibatches of
    8, regularizer 0.01. Its granularity there is a tensor, which 4 bits do not bear: a channel by default.
    The engine, and what it leaves in full precision, are :class:`QDiffusion`'s.

    Attributes:
        granularity: what one scale of weights is for, ``channel`` or ``tensor``.
        first, last: so many layers at either end have 8 bits, in the order of the module.
        (others): see :class:`QDiffusion`; ``teacher``, ``pair_at`` and ``counted`` decide about the pairs.

    Raises:
        QuantizationError: a field out of range.

    >>> str(SAPTQ.of_bits("w4a8", iterations=1000, teacher="same-state"))
    'sa-ptq-w4a8-teacher=same-state-iterations=1000'

    """

    name: ClassVar[str] = "sa-ptq"

    weight_bits: int = 8
    iterations: int = 10_000
    batch_size: int = 8
    activation_iterations: int = 0
    split: Literal["concatenations", "shortcuts", "none"] = "none"
    alignment: Literal["none", "mixed-order"] = field(default="mixed-order", kw_only=True)
    granularity: Literal["channel", "tensor"] = field(default="channel", kw_only=True)
    first: int = field(default=1, kw_only=True)
    last: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("channel", "tensor"):
            raise QuantizationError(
                f"granularity must be channel or tensor, got {self.granularity!r}."
            )
        for name in ("first", "last"):
            if type(found := getattr(self, name)) is not int or found < 0:
                raise QuantizationError(f"{name} is an integer of at least 0, got {found!r}.")
        if self.granularity == "tensor" and self.split != "none":
            raise QuantizationError("one scale for a tensor cannot be split: set split='none'.")

    def grid_of(self, bits: int) -> Grid:
        """One scale per channel or for the tensor."""
        return replace(super().grid_of(bits), per_tensor=self.granularity == "tensor")

    def bits_of(self, name: str, layers: Sequence[str]) -> tuple[int, int]:
        """8 at both ends."""
        place = list(layers).index(name)
        if self.first <= place < len(layers) - self.last:
            return self.weight_bits, self.activation_bits
        return max(self.weight_bits, WIDE), max(self.activation_bits, WIDE)
