"""How far a denoiser's final samples are from those of the full-precision one, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.applying import applied
from evenkeel.corrections.base import Correction, digest_of
from evenkeel.corrections.digest import digest
from evenkeel.errors import CalibrationError
from evenkeel.fitting.adapters.kept import NOTHING, Kept
from evenkeel.fitting.adapters.pairs import part
from evenkeel.hosts.actuators.beside import attach, detach
from evenkeel.hosts.pipeline.pipelines import eager, uncompiled
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Batch, Run
from evenkeel.low_rank.factors import LayerAdapter


class FinalSamples:
    """Final samples of held-out (prompt, seed) pairs: of both denoisers, and how much nearer others are.

    Args:
        run: of these pairs, with a quantized twin.
        kept: where finished samples are, and are looked for.

    """

    def __init__(self, run: Run, kept: Kept = NOTHING) -> None:
        self.run, self.kept = run, kept
        self._full = self._sampled(run, denoiser=run.denoiser)

    @cached_property
    def _before(self) -> Tensor:
        """Errors of the quantized denoiser alone; who compares others among themselves needs none."""
        return self._errors(self._sampled(self.run), self._full)

    def gains(
        self,
        over: range,
        adapters: Sequence[LayerAdapter] = (),
        correction: Correction | None = None,
    ) -> Tensor:
        """(pairs,) float64, dB by which the squared error of the final sample falls.

        Args:
            over: which of the pairs, one after another.
            adapters: beside the quantized denoiser's layers.
            correction: applied on top; made for the denoiser with these adapters.

        Raises:
            CalibrationError: a sample that is not finite.

        """
        before = self._before[over.start : over.stop]
        some = self._part(over)
        with beside(self.run, adapters):
            found = self._sampled(some, correction=correction, adapters=adapters)
        return gain(before, self._errors(found, self._full[over.start : over.stop]))

    def gains_of(self, quantized: nn.Module, over: range) -> Tensor:
        """The same for another quantized denoiser in place of the run's."""
        return gain(self._before[over.start : over.stop], self.errors_of(quantized, over))

    def errors_of(self, quantized: nn.Module, over: range) -> Tensor:
        """(pairs,) float64, squared error of the final sample with this denoiser."""
        found = self._sampled(self._part(over), denoiser=quantized)
        return self._errors(found, self._full[over.start : over.stop])

    def _part(self, over: range) -> Run:
        return part(self.run, list(over), self.run.seed + over.start)

    @staticmethod
    def _errors(found: Tensor, full: Tensor) -> Tensor:
        each = (found.double() - full.double()).flatten(1).square().mean(1)
        if not bool(each.isfinite().all()):
            raise CalibrationError(
                "a final sample is not finite (NaN or infinity); the quantized pipeline, or the "
                "full-precision one, overflows with these settings."
            )
        return each

    def _sampled(
        self,
        run: Run,
        *,
        denoiser: nn.Module | None = None,
        correction: Correction | None = None,
        adapters: Sequence[LayerAdapter] = (),
    ) -> Tensor:
        us, made = processes(), []
        network = uncompiled(run.pair[1] if denoiser is None else denoiser)
        with eager(network), run.undisturbed(network), ExitStack() as stack:
            if correction is not None:
                stack.enter_context(applied(run.pipeline, correction, allow=("denoiser",)))
            made_by: dict[str, Any] = {}
            if self.kept.folder is not None:
                made_by = {
                    "adapters": digest(tuple(adapters)),
                    "correction": digest_of(correction),
                }
            for batch in run.share():
                us.check()
                made_by = {**made_by, **self.kept.made_by(run, batch, network)}
                one = partial(_one, run, batch)
                made.append(self.kept.tensor("samples", made_by, one))
        # Of several processes each samples a share, and all see all samples.
        found = us.gathered(None, {"samples": torch.cat(made)} if made else {})
        return torch.cat([tensors["samples"] for _, tensors in found if tensors])


def _one(run: Run, batch: Batch) -> Tensor:
    return torch.as_tensor(run.sample(batch)).detach().cpu()


@contextmanager
def beside(run: Run, adapters: Sequence[LayerAdapter]) -> Iterator[None]:
    """Inside, the run's quantized denoiser has these adapters."""
    network = uncompiled(run.pair[1])
    with eager(network):
        handles = attach(network, [adapter.unpacked for adapter in adapters])
        try:
            yield
        finally:
            detach(network, handles)


def gain(before: Tensor, after: Tensor) -> Tensor:
    """(pairs,) dB by which the squared error falls.

    >>> gain(torch.tensor([1.0]), torch.tensor([0.1]))
    tensor([10.])

    """
    tiny = torch.finfo(torch.float64).tiny
    return 10 * (before.clamp_min(tiny).log10() - after.clamp_min(tiny).log10())
