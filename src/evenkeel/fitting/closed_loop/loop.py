"""Drive a full-precision and a quantized run of all prompts in lock-step, step by step.

Every batch has two pipeline calls from the same noise. All calls stop at the scheduler: once with the
model's output, once with the step's result. There a rule sees the pairs of all batches and says what
the quantized runs go on with. Nothing is kept from step to step but the calls' own states, and the
denoisers run exactly as often as in two plain runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.corrections.base import Correction
from evenkeel.errors import CalibrationError
from evenkeel.fitting.lockstep.paused_call import PausedCall, global_noise_kept
from evenkeel.fitting.provenance import provenance_of
from evenkeel.fitting.request import Settings, check_request
from evenkeel.hosts.pipeline.denoiser_calls import shares_of
from evenkeel.hosts.pipeline.layouts import LatentLayout, find_layout
from evenkeel.hosts.pipeline.pipelines import Prompt, denoiser_of, quiet
from evenkeel.hosts.pipeline.strand import Finished
from evenkeel.record import Provenance
from evenkeel.sampling.step_law import StepLaw


@dataclass
class Pair:
    """One batch at one step; all tensors have one row per prompt.

    Attributes:
        reference_sample, sample: states that enter the step, full-precision run and quantized run.
        reference_output, output: what the scheduler is handed, after guidance (the quantized one with
            the correction below).
        reference_branches, branches: the denoiser's own outputs, one per guidance branch, without
            learned-variance channels; empty where they do not have the sample's shape.
        shares: (branches,) with which guidance combined the branches, or None where it is not linear.

    """

    reference_sample: Tensor
    sample: Tensor
    reference_output: Tensor
    output: Tensor
    reference_branches: tuple[Tensor, ...]
    branches: tuple[Tensor, ...]
    shares: Tensor | None


OutputChange = Callable[[Tensor, Tensor, Pair], Tensor]
StateChange = Callable[[Tensor], Tensor]


class Rule:
    """What the quantized runs go on with; subclasses override what they change.

    Both methods are called once per step, with all batches, in the order of the prompts. ``step``
    counts scheduler steps from 0, as the rows of ``law`` do.
    """

    def output(
        self, step: int, pairs: list[Pair], layout: LatentLayout, law: StepLaw
    ) -> OutputChange | None:
        """A function (output, sample, pair) that gives each batch's new output, or None."""
        return None

    def state(
        self, step: int, results: list[tuple[Tensor, Tensor]], layout: LatentLayout, law: StepLaw
    ) -> tuple[StateChange | None, bool]:
        """A function (result) that gives each batch's new state, or None; whether to synchronize.

        ``results`` holds (full-precision, quantized) result per batch. Synchronized, the
        full-precision runs go on from the quantized runs' new states.
        """
        return None, False


@dataclass(frozen=True)
class LoopResult:
    """What a closed loop ran on.

    Attributes:
        law: of the full-precision runs.
        layout: of the latents.
        sample: (prompts, ...) the first batch's first states.
        steps: scheduler steps taken.

    """

    law: StepLaw
    layout: LatentLayout
    sample: Tensor
    steps: int

    def provenance(self, pipeline: Any, settings: Settings) -> Provenance:
        """What a correction fitted in this loop is for."""
        return provenance_of(pipeline, self.law, self.sample[:, None], self.layout, settings)


def run_closed_loop(
    pipeline: Any,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    rule: Rule,
    *,
    settings: Settings,
    seed: int,
    batch_size: int,
    correction: Correction | None = None,
    progress: bool = True,
) -> LoopResult:
    """Run both denoisers over all prompts, letting ``rule`` change the quantized runs at every step.

    Prompt i starts from noise of seed ``seed + i``, and both of its runs draw the same noise later.
    Compiled denoisers run uncompiled. The pipeline itself is not touched.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: the quantized denoiser.
        prompts: texts, or class labels.
        rule: sees every step of all batches.
        settings: steps, guidance and further arguments of the pipeline call.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call.
        correction: applied to the quantized runs, below the rule.
        progress: show a bar.

    Raises:
        CalibrationError: a bad request, an output that is not finite, calls that fall out of step.

    """
    check_request(pipeline, quantized, prompts, batch_size)
    with quiet(pipeline):
        loop = _Loop(pipeline, quantized, list(prompts), settings, seed, batch_size, correction)
        try:
            with tqdm(
                total=settings.num_inference_steps,
                desc="closed loop",
                unit="step",
                disable=not progress,
            ) as bar:
                while loop.step_once(rule):
                    bar.update()
        finally:
            loop.abandon()
    return loop.result()


class _Loop:
    """All calls, and the step they are at."""

    def __init__(
        self,
        pipeline: Any,
        quantized: nn.Module,
        prompts: list[Prompt],
        settings: Settings,
        seed: int,
        batch_size: int,
        correction: Correction | None,
    ) -> None:
        twins = [getattr(m, "_orig_mod", m) for m in (denoiser_of(pipeline), quantized)]
        starts = range(0, len(prompts), batch_size)
        spans = [range(i, min(i + batch_size, len(prompts))) for i in starts]
        self.references, self.quantized = (
            [
                PausedCall(
                    pipeline, twin, prompts[s.start : s.stop], seed + s.start, settings, below
                )
                for s in spans
            ]
            for twin, below in zip(twins, (None, correction), strict=True)
        )
        for call in self.quantized:
            call.is_wide = True
        self.references[0].reads_law = True
        self._pipeline, self._twins, self._settings = pipeline, twins, settings
        self.step, self._turn = 0, 0
        self._answers: tuple[list[Any], list[Any]] = ([None] * len(spans), [None] * len(spans))
        self._first: Tensor | None = None
        self._layout = settings.layout
        self._noise = ExitStack()
        self._noise.enter_context(global_noise_kept())

    def abandon(self) -> None:
        for call in (*self.references, *self.quantized):
            call.strand.abandon()
        self._noise.close()

    def result(self) -> LoopResult:
        law, layout, first = self.references[0].law, self._layout, self._first
        if law is None or layout is None or first is None:
            raise CalibrationError(
                f"{type(self._pipeline).__name__} never called its scheduler's step; there is nothing "
                f"to fit."
            )
        return LoopResult(law, layout, first, self.step)

    def step_once(self, rule: Rule) -> bool:
        """Every call takes one step; False once they have returned."""
        none = [None] * len(self.references)
        if self._advance() == Finished:
            return False
        pairs = self._compare()
        law = self.references[0].law
        assert law is not None and self._layout is not None
        change = rule.output(self.step, pairs, self._layout, law)
        if change is None:
            self._answers = (none, none)
        else:
            self._answers = (none, [change(p.output, p.sample, p) for p in pairs])
        del pairs
        self._advance()
        both = zip(self.references, self.quantized, strict=True)
        results = [(r.kept(r.result), q.kept(q.result)) for r, q in both]
        moved, together = rule.state(self.step, results, self._layout, law)
        states = [q if moved is None else moved(q) for _, q in results]
        self._answers = (states if together else none, none if moved is None else states)
        self.step += 1
        return True

    def _advance(self) -> Any:
        """Let every call run to its next stop; all must stop for the same reason."""
        shown = set()
        for side, calls in enumerate((self.references, self.quantized)):
            self._place(side)
            for call, answer in zip(calls, self._answers[side], strict=True):
                found = call.resume(answer, self._turn)
                shown.add(Finished if isinstance(found, Finished) else found)
        self._turn += 1
        if len(shown) > 1:
            raise CalibrationError(
                f"the pipeline calls fell out of step at step {self.step}: they take different numbers "
                f"of scheduler steps. Pass prompts that are treated alike, or "
                f"batch_size=len(prompts)."
            )
        return shown.pop()

    def _place(self, side: int) -> None:
        """With denoisers taking turns on the device: bring the one that runs next."""
        if self._settings.side_by_side:
            return
        home = torch.device(getattr(self._pipeline, "_execution_device", "cpu"))
        self._twins[1 - side].to("cpu")
        self._twins[side].to(home)

    def _compare(self) -> list[Pair]:
        pairs = []
        for reference, quantized in zip(self.references, self.quantized, strict=True):
            reference.refuse_non_finite("full-precision", self.step)
            quantized.refuse_non_finite("quantized", self.step)
            if reference.output.shape != quantized.output.shape:
                raise CalibrationError(
                    f"at step {self.step} the two runs give outputs of different shape: "
                    f"{tuple(reference.output.shape)} and {tuple(quantized.output.shape)}. The "
                    f"denoisers are not twins."
                )
            e, branches = reference.kept(reference.output), reference.branches()
            pairs.append(
                Pair(
                    reference_sample=reference.kept(reference.sample),
                    sample=quantized.kept(quantized.sample),
                    reference_output=e,
                    output=quantized.kept(quantized.output),
                    reference_branches=branches,
                    branches=quantized.branches(),
                    # Two prompts tell whether guidance is linear with one share for all of them.
                    shares=shares_of([b[:2] for b in branches], e[:2]) if branches else None,
                )
            )
        if self._first is None:
            self._first = pairs[0].reference_sample
            self._layout = self._layout or find_layout(self._pipeline, self._first)
        return pairs
