"""Run both denoisers over all prompts in lockstep, pausing at the output head.

Each denoiser call of the quantized network pauses at its head, with its features and with what the
full-precision head gives at the same input. When all prompts are there, a strategy solves, and every
prompt goes on with the change that the strategy answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError, UnsupportedPipeline
from evenkeel.fitting.lockstep.call import advance, together, whole_run
from evenkeel.fitting.lockstep.joined import moments_of_all
from evenkeel.fitting.readout.head_call import STEPPED, Answer, HeadCall, bring
from evenkeel.fitting.readout.solve import Unit, blocks, units_of
from evenkeel.fitting.readout.strategies import Strategy
from evenkeel.hosts.actuators.head_rows import outputs_as_rows, rows_as_outputs, rows_of
from evenkeel.hosts.actuators.heads import find_head, is_reordered, layer_of
from evenkeel.hosts.pipeline.denoiser_calls import answer_of
from evenkeel.hosts.pipeline.pipelines import uncompiled
from evenkeel.hosts.pipeline.strand import Finished
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Batch, Run
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.moments import PairedMoments

_AT_HEAD, _REFERENCE, _QUANTIZED, _AGAIN = "at head", "reference", "quantized", "again"
_REWIND = object()


class _Rewound(BaseException):
    """Unwinds a denoiser call whose features are not kept; it runs again once there is a solution."""


class Passed(NamedTuple):
    """What a pass went through: its law, the first batch's first states, every batch's moments per step."""

    law: StepLaw
    first: Tensor
    moments: list[list[PairedMoments] | None]


class HeadRun:
    """Runs the two denoisers in lockstep over all prompts and asks a strategy for solutions."""

    def __init__(
        self, run: Run, head: str | None, feature_memory: float, guided_rows: bool = True
    ) -> None:
        self.run = run
        # Compiled twins are fitted uncompiled: a graph cannot be paused.
        self.reference: Any
        self.quantized: Any
        self.reference, self.quantized = map(uncompiled, run.pair)
        self.head = find_head(self.quantized, head)
        self.layer = layer_of(self.quantized, self.head)
        other = find_head(self.reference, self.head.name)
        if (other.kind, other.features, other.targets) != (
            self.head.kind,
            self.head.features,
            self.head.targets,
        ):
            raise CalibrationError(
                f"the two denoisers have different heads: {other} and {self.head}. They are not twins."
            )
        self.corrected = torch.tensor(self.head.corrected)  # follows the rows from device to device
        self.feature_memory = feature_memory
        self.shares: Tensor | None = None
        self._asks_shares = guided_rows
        self.units: list[Unit] = []
        self._current: HeadCall | None = None
        self._captured: Tensor | None = None
        self._recognised = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, calls of the quantized denoiser come to us."""
        before = self.quantized.__dict__.get("forward")
        self._forward = self.quantized.forward
        reference_layer = layer_of(self.reference, self.head)
        hooks = [
            reference_layer.register_forward_hook(self._capture),
            self.layer.register_forward_hook(self._at_head),
        ]
        self.quantized.forward = self._denoise
        try:
            yield
        finally:
            del self.quantized.forward
            if before is not None:
                self.quantized.forward = before
            for hook in hooks:
                hook.remove()

    def guidance(self) -> Tensor | None:
        """How the pipeline combines the branches of one call, from the first step of one prompt."""
        batch = self.run.batches()[0].alone
        (call,) = calls = [HeadCall(self.run, batch, self.quantized, one_step=True)]
        with together(calls, "readout: guidance", 1, False):
            while self._advance(calls) not in (Finished, STEPPED):
                call.solution = []
            bring(calls)
        shares = call.shares
        if shares is None or len(shares) == 1 or abs(float(shares.sum()) - 1) >= 1e-2:
            return None
        return shares

    def go_through(self, strategy: Strategy, progress: bool) -> Passed:
        """One pass over all steps."""
        calls = self._calls(self.run.lockstep_share())
        with together(calls, strategy.title, self.run.num_inference_steps, progress) as bar:
            while (reason := self._advance(calls)) is not Finished:
                if reason == _AT_HEAD:
                    self._solve(calls, strategy)
                bar.update(calls[0].step - bar.n)
            bar.update(calls[0].step - bar.n)
        bring(calls)  # shares of the last step,
        bring(calls)  # and its moments
        strategy.finish()
        moments = moments_of_all(processes(), [call.moments for call in calls])
        return Passed(*whole_run(calls[0], self.run), moments)

    def _calls(self, batches: list[Batch]) -> list[HeadCall]:
        return [HeadCall(self.run, batch, self.quantized) for batch in batches]

    def _advance(self, calls: list[HeadCall]) -> Any:
        """To the next pause, with the denoiser in place that is asked next."""

        def resume(call: HeadCall) -> Any:
            self._current = call
            shown = call.strand.resume()
            return _AT_HEAD if shown == _AGAIN else shown

        reason = advance(calls, resume)
        if reason in (_REFERENCE, _QUANTIZED):
            self.run.place(self.reference if reason == _REFERENCE else self.quantized)
        return reason

    def _denoise(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the quantized denoiser's forward, inside a batch's strand."""
        call = self._running
        if not self.run.side_by_side:
            call.strand.pause(_REFERENCE)
        expected = self.reference(*args, **kwargs)
        assert self._captured is not None
        self._refuse_another_head(_detached(expected))
        call.expected_rows = outputs_as_rows(self.head, self._captured)
        self._captured = None
        if not self.run.side_by_side:
            call.strand.pause(_QUANTIZED)
        try:
            given = self._forward(*args, **kwargs)
        except _Rewound:
            call.strand.pause(_AGAIN)
            given = self._forward(*args, **kwargs)
        call.answers.append(Answer(_detached(expected), _detached(given)))
        call.clear()
        return given

    def _refuse_another_head(self, prediction: Tensor) -> None:
        """Once: the prediction must be the head's output values and nothing else."""
        assert self._captured is not None
        if self._recognised or is_reordered(self._captured, prediction):
            self._recognised = True
            return
        raise UnsupportedPipeline(
            f"{self.head.name} of {type(self.reference).__name__} is not its output head: the "
            f"prediction holds other values than this layer gives. Name the last layer with head=."
        )

    def _capture(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._captured = output

    def _at_head(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Pause with the features, go on with the corrected output."""
        call = self._running
        call.features = inputs[0]
        own = outputs_as_rows(self.head, output)
        assert call.expected_rows is not None
        expected = call.expected_rows.to(own.device)
        self.corrected = self.corrected.to(own.device)
        call.targets = (expected.float() - own.float())[..., self.corrected]
        if call.solution is None:
            call.strand.pause(_AT_HEAD)
            if call.solution is _REWIND:
                call.solution = None
                call.features = call.targets = None
                raise _Rewound
        if not call.solution:
            return None
        added = torch.zeros(own.shape, device=own.device)
        for sample, positions, change in call.solution(call):
            added[sample, positions].index_copy_(1, self.corrected, change)
        return rows_as_outputs(self.head, (own.float() + added).to(output.dtype), output)

    def rows(self, call: HeadCall) -> Iterator[tuple[Unit, int | None, slice, Tensor, Tensor]]:
        """Rows of a paused call: unit, sample (None: a combination of branches), positions, h, t."""
        features, targets = call.features, call.targets
        assert features is not None and targets is not None
        count = targets.shape[1]
        for unit, sample in blocks(self.units, call.batch.span, len(features)):
            place = unit.rows(count)
            h = rows_of(self.head, self.layer, features[sample : sample + 1])[0, place]
            yield unit, sample, place, h.float(), targets[sample, place]
        if self.shares is None or len(self.shares) * len(call.batch.span) != len(features):
            return
        for unit in self.units:
            if unit.prompt in call.batch.span:
                # Unfolding is linear too: combining inputs first takes one patch matrix, not two.
                mine = slice(unit.prompt - call.batch.span.start, None, len(call.batch.span))
                shares = self.shares.to(features.device, torch.float32)
                mixed = torch.tensordot(shares, features[mine].float(), 1)[None]
                place = unit.rows(count)
                h = rows_of(self.head, self.layer, mixed)[0, place]
                yield unit, None, place, h, torch.tensordot(shares, targets[mine], 1)[place]

    @property
    def _running(self) -> HeadCall:
        assert self._current is not None
        return self._current

    def _solve(self, calls: list[HeadCall], strategy: Strategy) -> None:
        if self._asks_shares:
            self._asks_shares = False
            stacked = [len(c.features) for c in calls if c.features is not None]
            # With one branch per call there is nothing to combine, and two denoiser calls are saved.
            if stacked != [len(c.batch) for c in calls]:
                self.shares = self.guidance()
        if not self.units:
            assert calls[0].targets is not None
            positions = calls[0].targets.shape[1]
            self.units = units_of(len(self.run.prompts), positions, self.head.features)
        strategy.open(calls[0].step, len(calls[0].answers))
        kept = 0
        rewound = []
        for call in calls:
            try:
                strategy.take(call)
            except CalibrationError:
                bring(calls)  # what went wrong in the step before says more
                raise
            assert call.features is not None
            kept += call.features.nbytes
            if kept > self.feature_memory and len(calls) > 1:
                call.solution = _REWIND
                rewound.append(call)
        for call in rewound:
            self._current = call
            call.strand.resume()
        bring(calls, *strategy.pending)
        strategy.close()
        for call in calls:
            call.solution = strategy.answer


def _detached(output: Any) -> Tensor:
    return answer_of(output).detach()
