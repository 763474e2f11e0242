"""What the tests of step law share."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.testing.scheduler_cases import BY_NAME

# diffusers' own, of DEIS with NumPy 2 and of settings it means to drop
# Linear, and refused all the same: the output is preconditioned with the input (EDM), or the step
# adds earlier noise again (SA-Solver with tau > 0).
REFUSED = [
    "sa-tau1",
    "edm-euler-epsilon",
    "edm-euler-v_prediction",
    "edm-dpmpp-1",
    "edm-dpmpp-2",
    "edm-dpmpp-3",
    "edm-dpmpp-2-heun",
    "edm-sde-dpmpp-2",
]


@functools.cache
def law_of(name: str) -> StepLaw:
    case = BY_NAME[name]
    return probe_scheduler(case.ready(), step_kwargs=case.step)


def probed(scheduler: Any, steps: int = 10, **kwargs: Any) -> StepLaw:
    scheduler.set_timesteps(steps)
    return probe_scheduler(scheduler, **kwargs)


class Noise:
    """What a scheduler draws, under the test's control."""

    def __init__(self) -> None:
        self.next = torch.zeros(1)

    def tensor(self, shape: Any, *_: Any, **__: Any) -> torch.Tensor:
        return self.next.reshape(tuple(shape))


def dpmpp_coefficients(a: Array, s: Array, k: int, order: int) -> tuple[float, list[float]]:
    """x_{k+1} = keep x_k + C_0 x0_k + C_1 x0_{k-1} + C_2 x0_{k-2}; Lu et al. 2022b, midpoint."""
    with np.errstate(divide="ignore"):
        lam = np.log(a) - np.log(s)
    h = lam[k + 1] - lam[k]
    e = math.exp(-h)
    keep, a_next = s[k + 1] / s[k], a[k + 1]
    if order == 1:
        return keep, [a_next * (1 - e)]
    r0 = (lam[k] - lam[k - 1]) / h
    if order == 2:
        c1 = -a_next * (1 - e) / (2 * r0)
        return keep, [a_next * (1 - e) - c1, c1]
    r1 = (lam[k - 1] - lam[k - 2]) / h
    m = np.eye(3)  # D1 and D2 as combinations of (x0_k, x0_{k-1}, x0_{k-2})
    d10, d11 = (m[0] - m[1]) / r0, (m[1] - m[2]) / r1
    d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
    c = a_next * ((1 - e) * m[0] + ((e - 1) / h + 1) * d1 - ((e - 1 + h) / h**2 - 0.5) * d2)
    return keep, c.tolist()
