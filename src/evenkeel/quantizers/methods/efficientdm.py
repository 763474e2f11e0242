"""EfficientDM: adapters that are merged before rounding, distilled along the sampler's own run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.methods.merged_training import TrainedMethod


@dataclass(frozen=True)
class EfficientDM(TrainedMethod):
    """A reconstruction of He et al., ICLR 2024 (arXiv:2310.03270), from the paper and its released code.

    One optimizer step for each step of a data-free run; the target is the full-precision denoiser's output at
    the same state, after guidance. See :class:`TrainedMethod` for the layers and all settings; the defaults
    are those of its W4A4 script for LDM-4 (100 steps, 16,000 optimizer steps, two classes per run).

    Differences from the code. Its runs have eta 1 (``eta=1.0`` where the scheduler takes one); here the
    pipeline's own scheduler decides. Ranges of inputs start from the values of their own step, there from one
    range for all. Its runs' scales are found by counting calls, here by the timestep that is told; a
    schedule that was not trained takes the scales of the nearest step, there every fifth of them.

    Attributes:
        advance: whose output the training run goes on with; ``student`` is a closed loop.

    >>> str(EfficientDM.of_bits("w4a8", optimizer_steps=1600))
    'efficientdm-w4a8-optimizer_steps=1600'

    """

    name: ClassVar[str] = "efficientdm"

    steps: tuple[int, ...] = (100,)
    reduction: Literal["sum", "mean"] = "sum"
    advance: Literal["full-precision", "student"] = "full-precision"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advance not in ("full-precision", "student"):
            raise QuantizationError(
                f"advance is 'full-precision' or 'student', got {self.advance!r}."
            )
