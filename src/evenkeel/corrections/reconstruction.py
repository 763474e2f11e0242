"""The gain of TAC-Diffusion's noise estimation reconstruction (ECCV 2024, Eqs. 8 to 19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.statistics.exact import Pending, sum_pair, working


@dataclass(frozen=True)
class GainSums:
    """Sums of Eq. 19 over the masked elements of any number of samples; (C,) or (1,) float64.

    Attributes:
        qe, qq, ee: sum of q e, of q^2, of e^2.
        ratio, ratio_squared: sum of q / e, of (q / e)^2; zero where they are not needed.
        count: masked elements.
        samples: how many were summed.
        size: elements of one sample, N = C H W.

    """

    qe: Tensor
    qq: Tensor
    ee: Tensor
    ratio: Tensor
    ratio_squared: Tensor
    count: Tensor
    samples: int
    size: int

    def __add__(self, other: GainSums) -> GainSums:
        return GainSums(
            self.qe + other.qe,
            self.qq + other.qq,
            self.ee + other.ee,
            self.ratio + other.ratio,
            self.ratio_squared + other.ratio_squared,
            self.count + other.count,
            self.samples + other.samples,
            self.size,
        )


@dataclass(frozen=True)
class Reconstruction:
    """How the gain K of noise estimation reconstruction is found: TAC-Diffusion Eqs. 11 to 19.

    K minimizes ``(1 - lambda_1) mean (K q - e)^2 + lambda_1 mean ((K q - e) / e)^2
    + lambda_2 (K - 1)^2`` over the elements where the full-precision output e is large,

        K = [(1 - l1) sum q e + l1 sum q/e + l2 n] / [(1 - l1) sum q^2 + l1 sum (q/e)^2 + l2 n]

    with n the number of elements summed, over all samples at once. The paper gives no values for
    ``lambda_1``, ``lambda_2`` and ``threshold``; with ours ``least_squares`` is just that, held at 1 where
    the outputs vanish. Our default is another K, the ratio of root mean squares.

    Attributes:
        lambda_1: weight of the relative error, 0 to 1.
        lambda_2: weight of (K - 1)^2, in units of the output squared; of least squares alone.
        threshold: k_threshold of Eq. 17; elements beyond ``threshold`` times the sample's mean |e| count.
        mask: ``"magnitude"``, |e| beyond it, or ``"signed"``, e beyond it as Eq. 18 prints.
        per_channel: one K per channel, or one for all.
        form: ``"consistent"`` as above; ``"published"`` keeps the factor N = C H W that Eqs. 13 to 19
            print in front of the relative sums, where Eq. 12 had divided by it: any ``lambda_1`` then
            counts N times as much. Its ``n`` is N per sample, masked or not.
        estimator: ``"least-squares"`` as above. Where the two trajectories have drifted apart it shrinks
            the output, because q e falls with their correlation; ``"rms"``, ours, is the ratio of root
            mean squares, sqrt(sum e^2 / sum q^2), which does not (experiments/MATRIX.md compares the two).
        lowest, highest: limits of K as it is applied; the paper has none (None).

    Raises:
        CalibrationError: a value out of range, ``lambda_1`` with ``"rms"``, or ``lambda_1`` without a
            threshold: the mean of (q / e)^2 is infinite where e may be 0.

    """

    lambda_1: float = 0.0
    lambda_2: float = 1e-3
    threshold: float = 0.0
    mask: Literal["magnitude", "signed"] = "magnitude"
    per_channel: bool = True
    form: Literal["consistent", "published"] = "consistent"
    estimator: Literal["least-squares", "rms"] = "rms"
    lowest: float | None = 0.5
    highest: float | None = 1.5

    @classmethod
    def published(
        cls, *, lambda_1: float = 0.0, lambda_2: float = 1e-3, threshold: float = 0.0
    ) -> Reconstruction:
        """As Eqs. 11 to 19 print it, K without limits; the paper gives no values for the three."""
        return cls(
            lambda_1,
            lambda_2,
            threshold,
            "signed",
            True,
            "published",
            "least-squares",
            lowest=None,
            highest=None,
        )

    @classmethod
    def least_squares(cls, **options: Any) -> Reconstruction:
        """K by least squares as in the paper, within our limits; ``options`` are the attributes."""
        return cls(estimator="least-squares", **options)

    def __post_init__(self) -> None:
        values = {"lambda_2": self.lambda_2, "threshold": self.threshold}
        wrong = [f"{n}={v!r}" for n, v in values.items() if not 0 <= v < float("inf")]
        if not 0 <= self.lambda_1 <= 1:
            wrong.append(f"lambda_1={self.lambda_1!r}")
        if wrong:
            raise CalibrationError(
                f"expected lambda_1 between 0 and 1, lambda_2 and threshold at least 0; got "
                f"{', '.join(wrong)}."
            )
        if self.mask not in ("magnitude", "signed") or self.form not in ("consistent", "published"):
            raise CalibrationError(
                f"expected mask 'magnitude' or 'signed' and form 'consistent' or 'published'; got "
                f"{self.mask!r} and {self.form!r}."
            )
        if self.estimator not in ("least-squares", "rms") or (
            self.estimator == "rms" and self.lambda_1
        ):
            raise CalibrationError(
                f"expected estimator 'least-squares', or 'rms' with lambda_1=0 (a ratio of sums knows no "
                f"relative error); got {self.estimator!r} and lambda_1={self.lambda_1}."
            )
        if self.lambda_1 > 0 and self.threshold == 0:
            raise CalibrationError(
                f"lambda_1={self.lambda_1} weighs the relative error (K q - e) / e, whose mean square "
                f"is infinite where e passes zero; pass threshold > 0 with it, such as 0.5."
            )

    def sums(self, e: Tensor, q: Tensor) -> GainSums:
        """Of full-precision and quantized outputs, (samples, channels, elements).

        Raises:
            CalibrationError: shapes differ, or a value is not finite.

        """
        return self.pending(e, q).now()

    def pending(self, e: Tensor, q: Tensor) -> Pending[GainSums]:
        """The same, still where the outputs are."""
        if e.shape != q.shape or e.dim() != 3:
            raise CalibrationError(
                f"expected two outputs of one shape (samples, channels, elements), got "
                f"{tuple(e.shape)} and {tuple(q.shape)}."
            )
        e, q = working(e), working(q)
        size = e.abs() if self.mask == "magnitude" else e
        chosen = size > self.threshold * e.abs().mean((1, 2), keepdim=True)
        masked = q * chosen
        ratio = torch.zeros_like(q)
        if self.lambda_1 > 0:
            ratio = torch.where(chosen, q / torch.where(chosen, e, torch.ones_like(e)), ratio)
        values = (
            masked * e,
            masked * masked,
            e * e * chosen,
            ratio,
            ratio * ratio,
            chosen.to(q.dtype),
        )
        rows = torch.stack([v.transpose(0, 1).flatten(1) for v in values])
        sums = sum_pair(rows if self.per_channel else rows.flatten(1)[:, None])
        samples, elements = len(e), e[0].numel()

        def finish(sums: Tensor, fine: Tensor) -> GainSums:
            if not fine:
                raise CalibrationError(
                    "the outputs hold values that are not finite (NaN or infinity)."
                )
            qe, qq, ee, ratio, squared, count = sums.sum(0)
            return GainSums(qe, qq, ee, ratio, squared, count, samples, elements)

        return Pending((sums, (e.isfinite() & q.isfinite()).all()), finish)

    def gain(self, sums: GainSums) -> Tensor:
        """K, (C,) or (1,) float64; 1 where no element was summed."""
        if self.estimator == "rms":
            some = sums.qq > 0
            return torch.where(some, sums.ee / torch.where(some, sums.qq, 1.0), 1.0).sqrt()
        published = self.form == "published"
        n = torch.full_like(sums.count, sums.size * sums.samples) if published else sums.count
        relative = self.lambda_1 * (sums.size if published else 1)
        above = (1 - self.lambda_1) * sums.qe + relative * sums.ratio + self.lambda_2 * n
        below = (1 - self.lambda_1) * sums.qq + relative * sums.ratio_squared + self.lambda_2 * n
        nothing = below == 0
        one = torch.ones_like(below)
        return torch.where(nothing, one, above / torch.where(nothing, one, below))

    def limited(self, gain: Tensor) -> Tensor:
        """K as it is applied: beyond the limits the two outputs have little to do with each other."""
        if self.lowest is None and self.highest is None:
            return gain
        return gain.clamp(self.lowest, self.highest)


def reconstruction_gain(e: Tensor, q: Tensor, **options: Any) -> Tensor:
    """K by which quantized outputs come closest to full-precision ones: TAC-Diffusion Eq. 19.

    Args:
        e: (samples, channels, elements) full-precision outputs.
        q: same shape, quantized outputs.
        options: as of ``Reconstruction``; by least squares unless they say otherwise.

    Returns:
        (channels,) float64, or (1,) with ``per_channel=False``.

    Raises:
        CalibrationError: see ``Reconstruction``.

    >>> e = torch.tensor([[[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]])
    >>> reconstruction_gain(e, e / 1.25, lambda_2=0.0)
    tensor([1.2500, 1.2500], dtype=torch.float64)

    """
    rule = Reconstruction(**{"estimator": "least-squares", **options})
    return rule.gain(rule.sums(e, q))
