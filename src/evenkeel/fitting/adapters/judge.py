"""How far a denoiser's final samples are from those of the full-precision one, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from scipy import stats
from torch import Tensor

from evenkeel.applying import applied
from evenkeel.corrections.base import Correction
from evenkeel.errors import CalibrationError
from evenkeel.hosts.actuators.beside import attach
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.low_rank.factors import LayerAdapter


class Judge:
    """Final samples of some (prompt, seed) pairs, and what others are away from them.

    Args:
        run: of these pairs, with a quantized twin.

    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._reference = self._sampled(full=True)

    def errors(
        self, adapters: Sequence[LayerAdapter] = (), correction: Correction | None = None
    ) -> Tensor:
        """(pairs,) float64 squared distance of every final sample, with these adapters attached.

        Args:
            adapters: beside the quantized denoiser's layers.
            correction: applied on top; made for the denoiser with these adapters.

        """
        with beside(self.run, adapters):
            found = self._sampled(full=False, correction=correction)
        each = (found.double() - self._reference.double()).flatten(1).square().mean(1)
        if not bool(each.isfinite().all()):
            raise CalibrationError(
                "a final sample is not finite (NaN or infinity); the quantized pipeline, or the "
                "full-precision one, overflows with these settings."
            )
        return each

    def _sampled(self, *, full: bool, correction: Correction | None = None) -> Tensor:
        run, us, made = self.run, processes(), []
        with run.undisturbed(None if full else run.pair[1]), ExitStack() as stack:
            if correction is not None:
                stack.enter_context(applied(run.pipeline, correction, allow=("denoiser",)))
            for batch in run.share():
                us.check()
                made.append(torch.as_tensor(run.sample(batch)).detach().cpu())
        # Of several processes each samples a share, and all see all samples.
        found = us.gathered(None, {"samples": torch.cat(made)} if made else {})
        return torch.cat([tensors["samples"] for _, tensors in found if tensors])


@contextmanager
def beside(run: Run, adapters: Sequence[LayerAdapter]) -> Iterator[None]:
    """Inside, the run's quantized denoiser has these adapters."""
    handles = attach(run.pair[1], adapters)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gain(before: Tensor, after: Tensor) -> Tensor:
    """(pairs,) dB by which the squared error falls.

    >>> gain(torch.tensor([1.0]), torch.tensor([0.1]))
    tensor([10.])

    """
    tiny = torch.finfo(torch.float64).tiny
    return 10 * (before.clamp_min(tiny).log10() - after.clamp_min(tiny).log10())


def lower_bound(gains: Tensor, confidence: float = 0.95) -> float:
    """One-sided bound of the mean gain by Student's t over pairs; minus infinity for one pair."""
    n = len(gains)
    if n < 2:
        return -float("inf")
    error = float(gains.double().std()) / n**0.5
    bound: float = float(gains.double().mean()) - float(stats.t.ppf(confidence, n - 1)) * error
    return bound
