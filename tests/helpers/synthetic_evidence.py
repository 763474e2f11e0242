"""Calibration evidence with known statistics, built by hand instead of measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import ORDERS, PairedMoments

COUNT = 1000


def moments_of(ee: Any, ed: Any, dd: Any, *, xx: Any = 0.0, xe: Any = 0.0) -> PairedMoments:
    """Moments with these covariances; shapes (prompts, levels, channels), or what broadcasts to it."""
    arrays = [torch.as_tensor(v, dtype=torch.float64) for v in (ee, ed, dd, xx, xe)]
    ee, ed, dd, xx, xe = (COUNT * a for a in torch.broadcast_tensors(*arrays))
    central = torch.zeros(*ee.shape, len(ORDERS), dtype=torch.float64)
    for order, values in {(2, 0): ee, (1, 1): ed, (0, 2): dd}.items():
        central[..., ORDERS.index(order)] = values
    zero = torch.zeros_like(ee)
    return PairedMoments(
        count=torch.full(ee.shape, COUNT),
        mean_e=zero,
        mean_d=zero,
        mean_x=zero,
        central=central,
        s_xx=xx.clone(),
        s_xe=xe.clone(),
        s_xd=zero,
    )


def white_error(variance: Any) -> PairedMoments:
    """Var(D | q) is ``variance`` exactly: an output ten billion times larger, D independent of it.

    With S_ed = 0 and V' = S_DD, Var(D | q) = V' - V'^2 / (E + V') = V' E / (E + V').
    """
    v = torch.as_tensor(variance, dtype=torch.float64)
    ee = 1e10 * v + 1.0
    return moments_of(ee, 0.0, v * ee / (ee - v))


def evidence_for(law: StepLaw, variance: Any) -> Evidence:
    """White error of this variance, per step (K,) or one for all, at the levels of ``law``."""
    v = np.broadcast_to(np.asarray(variance, dtype=np.float64), law.steps)
    return Evidence(
        law.prediction, law.alpha[:-1], law.sigma[:-1], white_error(v.copy()[None, :, None])
    )
