"""SA-QLoRA: EfficientDM's layers, trained on pairs of calls of a lower- and a higher-order sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.methods.merged_training import TrainedMethod
from evenkeel.quantizers.workspace.alignment import Counted, MixedOrder, PairAt, Teacher


@dataclass(frozen=True)
class SAQLoRA(TrainedMethod):
    """A reconstruction of "Sampling-Aware Quantization", CVPR 2026 (arXiv:2505.02242), W4A8 and W4A4.

    Its authors have released no code, and formulas and words of the paper pair the two samplers in opposite
    directions; rank, rates, batch and the list of step counts are in no source, and are EfficientDM's here.
    Loss: L_MOTA + ``cosine`` L_COS (Eqs 19, 20), on pairs from full-precision runs of first and second order
    from one noise. See :class:`TrainedMethod` for the layers and all settings.

    Attributes:
        teacher: ``printed`` (the formulas: the student at the midpoint learns full precision at the
            interval's start), ``midpoint`` (the words: the student at the start learns the midpoint), or
            ``same-state`` (both at the same state, on the calls of both runs: the control).
        pair_at: at which end of the interval the first-order run is read.
        counted: whether numbers of steps count ``intervals``, or the ``evaluations`` of the second-order
            solver, which are twice as many.
        steps: counts to train with one after another, progressively; () is (2 M, M) where M steps are
            deployed.

    >>> SAQLoRA().schedule(20), SAQLoRA(steps=(100, 50, 20)).schedule(20)
    ((40, 20), (100, 50, 20))

    """

    name: ClassVar[str] = "sa-qlora"

    cosine: float = 1.0
    teacher: Teacher = "printed"
    pair_at: PairAt = "start"
    counted: Counted = "intervals"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs.teacher == "same-state" and self.calibration_runs < 2:
            raise QuantizationError(
                "teacher='same-state' takes every other call of a run and the others from the next: "
                f"calibration_runs must be at least 2, got {self.calibration_runs}."
            )

    @property
    def pairs(self) -> MixedOrder:
        """Who learns from whom."""
        return MixedOrder(self.teacher, self.pair_at, self.counted)

    def schedule(self, deployed: int) -> tuple[int, ...]:
        """See :class:`TrainedMethod`."""
        return self.steps or (2 * deployed, deployed)
