"""Drive a full-precision and a quantized run of all prompts in lock-step, step by step.

Every batch has two pipeline calls from the same noise. All calls stop at the scheduler: once with the
model's output, once with the step's result. There a rule sees the pairs of all batches and says what
the runs go on with. Nothing is kept from step to step but the calls' own states, and the denoisers run
exactly as often as in two plain runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evenkeel.corrections.base import Correction, text_of
from evenkeel.errors import CalibrationError
from evenkeel.fitting.closed_loop.paused_call import PausedCall
from evenkeel.fitting.lockstep.call import advance, first_state, together, whole_run
from evenkeel.hosts.pipeline.denoiser_calls import pending_shares
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import global_noise_kept, uncompiled
from evenkeel.hosts.pipeline.strand import Finished
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.exact import Pending, settled
from evenkeel.statistics.provenance import Provenance


@dataclass
class Pair:
    """One batch at one step; all tensors have one row per prompt.

    Attributes:
        reference_sample, sample: states that enter the step, full-precision run and quantized run.
        reference_output, output: what the scheduler is handed, after guidance (the quantized one with
            the correction below).
        reference_branches, branches: the denoiser's own outputs, one per guidance branch, without
            learned-variance channels; empty where they do not have the sample's shape.

    """

    reference_sample: Tensor
    sample: Tensor
    reference_output: Tensor
    output: Tensor
    reference_branches: tuple[Tensor, ...]
    branches: tuple[Tensor, ...]

    @property
    def shares(self) -> Pending[Tensor | None]:
        """(branches,) with which guidance combined the branches, or None where it is not linear."""
        if not self.reference_branches:
            return Pending((), lambda: None)
        # Two prompts tell whether guidance is linear with one share for all of them.
        return pending_shares([b[:2] for b in self.reference_branches], self.reference_output[:2])


#: Per batch what the full-precision and what the quantized run goes on with; None: with what it has.
Answers = tuple[list[Tensor] | None, list[Tensor] | None]


class Rule:
    """What the runs go on with; subclasses override what they change.

    Both methods are called once per step, with all batches, in the order of the prompts. ``step``
    counts scheduler steps from 0, as the rows of ``law`` do. None lets all runs go on with what they
    have.

    Attributes:
        waiting: the loop's own checks of the step, on the device; ``settled`` takes them along.

    """

    waiting: Sequence[Pending[None]] = ()

    def settled(self, *pending: Pending[Any]) -> list[Any]:
        """These results, and whatever waits, after one transfer."""
        waiting, self.waiting = self.waiting, ()
        return settled([*waiting, *pending])[len(waiting) :]

    def output(
        self, step: int, pairs: list[Pair], layout: LatentLayout, law: StepLaw
    ) -> Answers | None:
        """Outputs that the scheduler is handed in place of those of the pairs."""
        return None

    def state(
        self, step: int, results: list[tuple[Tensor, Tensor]], layout: LatentLayout, law: StepLaw
    ) -> Answers | None:
        """States in place of ``results``, which holds the (full-precision, quantized) one per batch."""
        return None


@dataclass(frozen=True)
class LoopResult:
    """What a closed loop ran on.

    Attributes:
        law: of the full-precision runs.
        sample: (prompts, ...) the first batch's first states.
        steps: scheduler steps taken.
        provenance: what a correction fitted in this loop is for.

    """

    law: StepLaw
    sample: Tensor
    steps: int
    provenance: Provenance


def run_closed_loop(
    run: Run,
    rule: Rule,
    *,
    correction: Correction | None = None,
    title: str = "closed loop",
    progress: bool = True,
) -> LoopResult:
    """Run both denoisers over all prompts, letting ``rule`` change the runs at every step.

    Prompt i starts from noise of seed ``seed + i``, and both of its runs draw the same noise later.
    Compiled denoisers run uncompiled. The pipeline itself is not touched.

    Args:
        run: with a quantized twin.
        rule: sees every step of all batches.
        correction: applied to the quantized runs, below the rule.
        title: of the bar.
        progress: show a bar.

    Raises:
        CalibrationError: identical twins, an output that is not finite, calls that fall out of step.

    """
    twins = [uncompiled(denoiser) for denoiser in run.pair]  # a graph cannot be paused
    with processes().telling(), run.undisturbed(), global_noise_kept():
        run.agreed(title)
        batches = run.lockstep_share()
        references = [PausedCall(run, b, twins[0], reads_law=b is batches[0]) for b in batches]
        quantized = [
            PausedCall(run, b, twins[1], is_quantized=True, correction=correction) for b in batches
        ]
        calls = [*references, *quantized]

        def resume(call: PausedCall) -> Any:
            run.place(call.denoiser)
            return call.resume()

        steps = 0
        with together(calls, title, run.num_inference_steps, progress) as bar:
            while advance(calls, resume) is not Finished:
                pairs = [_pair(*both, steps) for both in zip(references, quantized, strict=True)]
                rule.waiting = [call.finite(steps) for call in calls]
                law, first = first_state(references[0], run)
                layout = run.layout(first[:, 0])
                _answer(references, quantized, rule.output(steps, pairs, layout, law))
                del pairs
                advance(calls, resume)
                results = [(e.result, q.result) for e, q in zip(references, quantized, strict=True)]
                answers = rule.state(steps, results, layout, law)
                rule.settled()
                _answer(references, quantized, answers)
                steps += 1
                bar.update()
        law, first = whole_run(references[0], run)
    made_for = run.provenance(law, first, correction=text_of(correction))
    return LoopResult(law, first[:, 0], steps, made_for)


def _answer(
    references: list[PausedCall], quantized: list[PausedCall], answers: Answers | None
) -> None:
    for calls, given in zip((references, quantized), answers or (), strict=False):
        for call, answer in zip(calls, given or (), strict=False):
            call.answer = answer


def _pair(reference: PausedCall, quantized: PausedCall, step: int) -> Pair:
    e, q = reference.output, quantized.output
    if e.shape != q.shape:
        raise CalibrationError(
            f"at step {step} the two runs give outputs of different shape: {tuple(e.shape)} and "
            f"{tuple(q.shape)}. The denoisers are not twins."
        )
    return Pair(
        reference_sample=reference.sample,
        sample=quantized.sample,
        reference_output=e,
        output=q,
        reference_branches=reference.step_branches(),
        branches=quantized.step_branches(),
    )
