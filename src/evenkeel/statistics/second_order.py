"""What second-order moments say about the error: gain, slope, explained share, conditional variance.

Everything is per step and channel, in the units of the raw model output unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.statistics.moments import PairedMoments


@dataclass(frozen=True)
class SecondOrder:
    """Population covariances of (x, e, D) on a leading shape, float64.

    ``q = e + D`` follows by expansion: S_qq = S_ee + 2 S_eD + S_DD, S_qD = S_eD + S_DD.
    """

    xx: Tensor
    xe: Tensor
    xd: Tensor
    ee: Tensor
    ed: Tensor
    dd: Tensor

    @classmethod
    def of(cls, moments: PairedMoments) -> SecondOrder:
        """Covariances (divided by n) of pooled moments."""
        n = moments.count.double()
        return cls(
            moments.s_xx / n,
            moments.s_xe / n,
            moments.s_xd / n,
            moments.s(2, 0) / n,
            moments.s(1, 1) / n,
            moments.s(0, 2) / n,
        )

    @property
    def gain(self) -> Tensor:
        """K of ``D = k e + d + r`` (PTQD, He et al. 2023): S_eD / S_ee."""
        return _ratio(self.ed, self.ee)

    @property
    def slope(self) -> Tensor:
        """a, the slope of D regressed on q (D2-DPM, Q-Drift Eq. 14): S_qD / S_qq."""
        return _ratio(self.ed + self.dd, self.ee + 2 * self.ed + self.dd)

    @property
    def explained(self) -> Tensor:
        """R^2, the squared correlation of e and q."""
        qe, qq = self.ee + self.ed, self.ee + 2 * self.ed + self.dd
        return _ratio(qe * qe, self.ee * qq)

    @property
    def residual(self) -> Tensor:
        """Var(r) of ``D = k e + d + r``: S_DD - S_eD^2 / S_ee, never below zero."""
        return (self.dd - _ratio(self.ed * self.ed, self.ee)).clamp_min(0)

    def edited(self, gain: Tensor, sample: Tensor, std: Tensor) -> Tensor:
        """Var(D') of the edited output ``q' = gain q + sample x + std z``, with D' = q' - e."""
        qq, qe = self.ee + 2 * self.ed + self.dd, self.ee + self.ed
        known = gain * gain * qq - 2 * gain * qe + self.ee
        xq = self.xe + self.xd
        from_sample = sample * sample * self.xx + 2 * sample * (gain * xq - self.xe)
        return (known + from_sample).clamp_min(0) + std * std

    def noise_form(self, to_eps: Tensor, from_sample: Tensor) -> SecondOrder:
        """The same of noise predictions ``to_eps output + from_sample x``; the error is scaled only."""
        u, w = to_eps, from_sample
        return SecondOrder(
            xx=self.xx,
            xe=u * self.xe + w * self.xx,
            xd=u * self.xd,
            ee=u * u * self.ee + 2 * u * w * self.xe + w * w * self.xx,
            ed=u * u * self.ed + u * w * self.xd,
            dd=u * u * self.dd,
        )

    def conditional_variance(self, to_eps: Tensor, from_sample: Tensor) -> Tensor:
        """Var(D | p) with ``p = to_eps q + from_sample x``, under joint normality (Q-Drift Eq. 25).

        S_DD - S_pD^2 / S_pp; never below zero, and S_DD where p does not vary. With ``to_eps = 1``
        and ``from_sample = 0`` the condition is the raw output itself.
        """
        qq, qd = self.ee + 2 * self.ed + self.dd, self.ed + self.dd
        u, w = to_eps, from_sample
        pp = u * u * qq + 2 * u * w * (self.xe + self.xd) + w * w * self.xx
        pd = u * qd + w * self.xd
        return (self.dd - _ratio(pd * pd, pp)).clamp_min(0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0: nothing varies there, so nothing is explained."""
    safe = torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / safe)
