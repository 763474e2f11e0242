"""Fit TAC-Diffusion in closed loop: each step's gain and bias on the run that the earlier ones left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import OutputEdit
from evenkeel.corrections.reconstruction import GainSums, Reconstruction
from evenkeel.corrections.tac import TAC
from evenkeel.errors import CalibrationError
from evenkeel.fitting.closed_loop.loop import Answers, Pair, Rule, run_closed_loop
from evenkeel.fitting.lockstep.joined import gains_of_all
from evenkeel.hosts.actuators.step_change import Edit
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.exact import Pending, add_pairs, fetched, pair_sum, sum_pair, working


def fit_tac(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    reconstruction: Reconstruction | None = Reconstruction(),  # noqa: B008 - frozen
    input_bias: bool = True,
    input_bias_per_channel: bool = False,
    bias_of_the_output: bool = False,
    reconstruct_unconditional: bool = False,
    correction: Correction | None = None,
    call: dict[str, Any] | None = None,
    progress: bool = True,
) -> TAC:
    """Gain of every output and mean error of every state, against full-precision runs of the same noise.

    At each step the full-precision output e is taken on the full-precision trajectory and the
    quantized output q on the corrected quantized one (TAC-Diffusion, ECCV 2024, Alg. 1). K of all
    prompts is applied, the sampler steps, and the mean over all prompts of the state error that is
    left is taken off at once. Costs two denoiser evaluations per step and batch; memory does not
    grow with the number of steps.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: the quantized denoiser.
        prompts: texts, or class labels; published with 64 to 256.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call; the result is that of all prompts together.
        reconstruction: how K is found (NER), ``Reconstruction.published()`` as printed; None fits none.
        input_bias: fit B (IBC).
        input_bias_per_channel: one B per channel instead of one per element; of fewer than about a
            hundred prompts the latter adds more noise than it takes away.
        bias_of_the_output: take the mean error of every *output* off instead, and leave the state's alone:
            the estimation bias correction that the paper's Appendix B compares with. Without K, and
            for samplers without memory, where it is a shift of the state by the step's own weight.
        reconstruct_unconditional: K acts on the unconditional branch, before guidance, as published
            for text-to-image models.
        correction: applied below it, such as a ``Readout``.
        call: further arguments of the pipeline call.
        progress: show a bar.

    Raises:
        CalibrationError: nothing to fit, no prompts, identical twins, outputs that are not finite,
            options that do not go together, or no unconditional branch where one is asked for.

    """
    run = Run(
        pipeline,
        prompts,
        num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        call=call,
        quantized=quantized,
    )
    if reconstruction is None and (reconstruct_unconditional or not input_bias):
        raise CalibrationError(
            f"reconstruction=None, input_bias={input_bias}, "
            f"reconstruct_unconditional={reconstruct_unconditional}: at least one part must be "
            f"fitted, and the unconditional branch only with a reconstruction."
        )
    if bias_of_the_output and (reconstruction is not None or not input_bias):
        raise CalibrationError(
            "bias_of_the_output=True is compared with the input bias alone: pass reconstruction=None."
        )
    rule = TACFit(
        reconstruction,
        input_bias,
        input_bias_per_channel,
        reconstruct_unconditional,
        bias_of_the_output,
    )
    return rule.fitted(run, correction=correction, progress=progress)


class TACFit(Rule):
    """Collects K and B, and goes on with what they leave; the arguments are those of ``fit_tac``."""

    def __init__(
        self,
        how: Reconstruction | None,
        input_bias: bool = True,
        per_channel: bool = False,
        unconditional: bool = False,
        of_the_output: bool = False,
    ) -> None:
        self.how, self.input_bias = how, input_bias
        self.per_channel, self.unconditional = per_channel, unconditional
        self.of_the_output = of_the_output
        self.gains: list[Tensor] = []
        self.biases: list[Tensor] = []
        self._branch: int | None = None

    def fitted(
        self, run: Run, *, correction: Correction | None = None, progress: bool = True
    ) -> TAC:
        """The correction for this run."""
        made_for = run_closed_loop(
            run, self, correction=correction, title="TAC", progress=progress
        ).provenance
        return TAC(
            *made_for.levels,
            gain=None if self.how is None else torch.stack(self.gains),
            bias=torch.stack(fetched(self.biases)).float() if self.input_bias else None,
            branch=self._chosen_branch() if self.unconditional else None,
            reconstruction=self.how,
            source=made_for,
        )

    def output(
        self, step: int, pairs: list[Pair], layout: LatentLayout, law: StepLaw
    ) -> Answers | None:
        """Fit K of this step, multiply; or take the mean error off."""
        if self.of_the_output:
            return self._unbiased(step, pairs, layout, law)
        if self.how is None:
            return None
        if not self.unconditional:
            outputs = [(p.reference_output, p.output) for p in pairs]
            gain = self._fitted(self.how, self.settled(*self._sums(self.how, outputs, layout)))
            edit = _edit(gain, layout, pairs[0].output.device)
            return None, [edit(p.output, p.sample, None) for p in pairs]
        shares = [p.shares for p in pairs]
        known = self._branch if {len(p.branches) for p in pairs} == {2} else None
        both = self._of_branch(pairs, known)
        found = self.settled(*shares, *self._sums(self.how, both, layout))
        told, sums = found[: len(pairs)], found[len(pairs) :]
        branch = self._unconditional(step, pairs, told)
        if branch is None:
            self.gains.append(torch.ones(layout.channels, dtype=torch.float64))
            return None
        if known is None:
            sums = self.settled(*self._sums(self.how, self._of_branch(pairs, branch), layout))
        change = _edit(self._fitted(self.how, sums) - 1, layout, pairs[0].output.device)

        answers = []
        for pair, share in zip(pairs, told, strict=True):
            # Guidance is linear: what is added to a branch arrives with the branch's share.
            assert share is not None
            added = change(pair.branches[branch].to(pair.output), pair.sample, None)
            answers.append(pair.output + float(share[branch]) * added)
        return None, answers

    def state(
        self, step: int, results: list[tuple[Tensor, Tensor]], layout: LatentLayout, law: StepLaw
    ) -> Answers | None:
        """Measure B after this step, subtract."""
        if not self.input_bias or self.of_the_output:
            return None
        bias = self._mean_error(results, layout)
        if law.intermediate[step]:
            bias = torch.zeros_like(bias)
        self.biases.append(bias[0])  # where the states are, until the end
        if law.intermediate[step]:
            return None
        return None, [quantized - bias for _, quantized in results]

    def _unbiased(
        self, step: int, pairs: list[Pair], layout: LatentLayout, law: StepLaw
    ) -> Answers:
        """Outputs without their mean error; a step adds its weight times an output to the state."""
        if law.has_history:
            raise CalibrationError(
                f"the mean error of an output is taken off samplers without memory; {law.sampler} uses "
                f"earlier outputs again. Use DDIM or Euler, or the input bias."
            )
        bias = self._mean_error([(p.reference_output, p.output) for p in pairs], layout)
        self.biases.append(float(law.output_weights[step, step]) * bias[0])
        return None, [p.output - bias for p in pairs]

    def _chosen_branch(self) -> int:
        """Which branch K acted on."""
        if self._branch is None:
            raise CalibrationError(
                "the denoiser has one guidance branch at every step, so none is unconditional. Fit "
                "with guidance, or with reconstruct_unconditional=False."
            )
        return self._branch

    @staticmethod
    def _of_branch(pairs: list[Pair], branch: int | None) -> list[tuple[Tensor, Tensor]]:
        """Outputs of that branch, full precision and quantized; none while it is not known."""
        if branch is None:
            return []
        return [(p.reference_branches[branch], p.branches[branch]) for p in pairs]

    @staticmethod
    def _sums(
        how: Reconstruction, outputs: list[tuple[Tensor, Tensor]], layout: LatentLayout
    ) -> list[Pending[GainSums]]:
        """Of all batches, still where the outputs are."""
        return [how.pending(layout.as_channels(e), layout.as_channels(q)) for e, q in outputs]

    def _fitted(self, how: Reconstruction, sums: list[GainSums]) -> Tensor:
        """K over all batches, as it is applied."""
        self.gains.append(how.gain(gains_of_all(processes(), reduce(add, sums))))
        return how.limited(self.gains[-1])

    def _unconditional(
        self, step: int, pairs: list[Pair], shares: list[Tensor | None]
    ) -> int | None:
        """The branch with the smallest share, the same at every step; None where there is only one."""
        counts = {len(p.branches) for p in pairs}
        if counts == {1}:
            return None
        if counts != {2} or any(s is None for s in shares):
            raise CalibrationError(
                f"at step {step} guidance is not a linear combination of two branches of the denoiser, "
                f"so its unconditional branch cannot be corrected before guidance. Fit with "
                f"reconstruct_unconditional=False."
            )
        found = {int(s.argmin()) for s in shares if s is not None}
        if len(found) > 1 or self._branch not in (None, *found):
            raise CalibrationError(
                f"at step {step} the branch with the smallest share of guidance is another than "
                f"before: it cannot be told which one is unconditional. Fit with "
                f"reconstruct_unconditional=False."
            )
        self._branch = found.pop()
        return self._branch

    def _mean_error(self, results: list[tuple[Tensor, Tensor]], layout: LatentLayout) -> Tensor:
        """Over all prompts, (1, *sample) float32; over all elements of a channel too if so asked."""
        us = processes()
        prompts = int(us.summed(torch.tensor(sum(len(q) for _, q in results))))
        errors = (pair_sum(working(q) - working(e)) for e, q in results)
        mean = us.summed(reduce(add_pairs, errors)).sum(0)[None] / prompts
        if self.per_channel:
            rows = layout.as_channels(mean)[0]
            mean = layout.broadcast(sum_pair(rows).sum(0) / rows.shape[-1])
        return mean.float()


def _edit(gain: Tensor, layout: LatentLayout, device: torch.device) -> Edit:
    """Multiplication by ``gain`` exactly as it will happen at sampling time."""
    return Edit.of(OutputEdit.of(gain[None]), 0, layout, device)
