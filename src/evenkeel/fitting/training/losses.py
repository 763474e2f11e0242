"""What training lowers: the distance of the student's prediction from its target, and their angle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.fitting.training.aligned_call import AlignedCall


@dataclass(frozen=True)
class Loss:
    """L = || eps_hat - eps ||^2 + w (1 - <eps, eps_hat> / (|eps| |eps_hat|)).

    The first term is EfficientDM's (arXiv:2310.03270) and L_MOTA of SA-QLoRA (arXiv:2505.02242, Eq. 19), the
    second its L_COS (Eq. 20), with the norms of the two vectors that are compared; the cosine is one per
    sample, averaged. Both see what guidance makes of the branches.

    Attributes:
        cosine: w.
        reduction: ``sum`` (over the batch, as EfficientDM's code) or ``mean`` of squares; only the ratio to
            the second term depends on it, as the optimizer's steps do not depend on a loss's unit.
        guided: False compares every branch instead of their combination.

    >>> from evenkeel.quantizers.workspace.calibration_set import DenoiserCall
    >>> call = AlignedCall(DenoiserCall((), {}), torch.tensor([[3.0, 4.0]]))
    >>> Loss(cosine=1.0)(call, torch.tensor([[3.0, 4.0]])).item()
    0.0

    """

    cosine: float = 0.0
    reduction: Literal["sum", "mean"] = "mean"
    guided: bool = True

    def __post_init__(self) -> None:
        if self.reduction not in ("sum", "mean") or not self.cosine >= 0:
            raise QuantizationError(
                f"reduction is 'sum' or 'mean', and the weight of the cosine not negative; got "
                f"{self.reduction!r} and {self.cosine}."
            )

    def __call__(self, call: AlignedCall, output: Tensor) -> Tensor:
        """0-dimensional, of a denoiser's output for this call."""
        found, target = call.prediction(output), call.target
        if self.guided:
            found, target = call.combined(found), call.combined(target)
        error = (found - target).square()
        total = error.sum() if self.reduction == "sum" else error.mean()
        if self.cosine:
            angle = torch.cosine_similarity(found.flatten(1), target.flatten(1), dim=1)
            total = total + self.cosine * (1 - angle).mean()
        return total
