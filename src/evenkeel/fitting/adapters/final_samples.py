"""How far a denoiser's final samples are from those of the full-precision one, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
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
        later: so many of the last pairs are sampled for themselves, and only if they are asked for.

    """

    def __init__(self, run: Run, kept: Kept = NOTHING, later: int = 0) -> None:
        self.run, self.kept = run, kept
        cut = len(run.prompts) - later
        self._blocks = (range(cut), range(cut, len(run.prompts)))
        self._full: dict[range, Tensor] = {}
        self._before: dict[range, Tensor] = {}

    def _of_block(
        self, known: dict[range, Tensor], over: range, make: Callable[[range], Tensor]
    ) -> Tensor:
        """Of these pairs, made for the block that they lie in when it is first asked for."""
        block = next(b for b in self._blocks if over.start in b)
        assert over.stop <= block.stop
        if block not in known:
            known[block] = make(block)
        return known[block][over.start - block.start : over.stop - block.start]

    def _full_of(self, over: range) -> Tensor:
        return self._of_block(
            self._full,
            over,
            lambda block: self._sampled(self._part(block), denoiser=self.run.denoiser),
        )

    def before(self, over: range) -> Tensor:
        """(pairs,) float64, errors of the quantized denoiser alone.

        Sampled when first asked for: who compares others among themselves needs none.
        """
        return self._of_block(
            self._before,
            over,
            lambda block: self._errors(self._sampled(self._part(block)), block),
        )

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
        before, some = self.before(over), self._part(over)
        with beside(self.run, adapters):
            found = self._sampled(some, correction=correction, adapters=adapters)
        return gain(before, self._errors(found, over))

    def gains_of(self, quantized: nn.Module, over: range) -> Tensor:
        """The same for another quantized denoiser in place of the run's."""
        return gain(self.before(over), self.errors_of(quantized, over))

    def errors_of(self, quantized: nn.Module, over: range) -> Tensor:
        """(pairs,) float64, squared error of the final sample with this denoiser."""
        return self._errors(self._sampled(self._part(over), denoiser=quantized), over)

    def _part(self, over: range) -> Run:
        return part(self.run, list(over), self.run.seed + over.start)

    def _errors(self, found: Tensor, over: range) -> Tensor:
        each = (found.double() - self._full_of(over).double()).flatten(1).square().mean(1)
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
