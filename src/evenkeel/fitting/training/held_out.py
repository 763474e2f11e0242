"""Held-out sampler error: which state of a training is kept, and whether it is better than its start."""

from __future__ import annotations

from torch import Tensor, nn

from evenkeel.fitting.adapters.final_samples import FinalSamples, gain
from evenkeel.fitting.adapters.pairs import part
from evenkeel.hosts.run import Run
from evenkeel.statistics.student import mean_and_bound

CHOOSING, CONFIRMING = 16, 16  # (prompt, seed) pairs
_SEED = 1 << 31  # of their noise: nobody counts images so far, and training draws from further up


class HeldOut:
    """Final samples of (prompt, seed) pairs that nothing is trained on, as the pipeline is deployed.

    Args:
        run: prompts, sampler, steps and guidance as deployed. The prompts may be those that are trained
            with; the noise never is.
        start: the denoiser that training starts from.
        choosing, confirming: pairs that choose between states, and others that confirm the chosen one.

    """

    def __init__(
        self, run: Run, start: nn.Module, choosing: int = CHOOSING, confirming: int = CONFIRMING
    ) -> None:
        count = len(run.prompts)
        which = [i % count for i in range(choosing + confirming)]
        self._samples = FinalSamples(part(run, which, _SEED + run.seed))
        self._choose, self._confirm = range(choosing), range(choosing, choosing + confirming)
        whole = range(choosing + confirming)
        self._before = self._samples.errors_of(start, whole)

    @property
    def start(self) -> float:
        """Mean squared error of the start's final samples, on the pairs that choose."""
        return float(self._before[: len(self._choose)].mean())

    def chosen_by(self, denoiser: nn.Module) -> float:
        """How many dB the squared error of final samples is below that of the start, mean."""
        return float(self._gains(denoiser, self._choose).mean())

    def confirmed(self, denoiser: nn.Module) -> tuple[float, float]:
        """The same on the other pairs, and its one-sided 95 % lower bound."""
        return mean_and_bound(self._gains(denoiser, self._confirm))

    def _gains(self, denoiser: nn.Module, over: range) -> Tensor:
        before = self._before[over.start : over.stop]
        return gain(before, self._samples.errors_of(denoiser, over))
