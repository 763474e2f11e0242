"""Run both denoisers over all prompts in lockstep, pausing at the output head.

Each denoiser call of the quantized network pauses at its head, with its features and with what the
full-precision head gives at the same input. When all prompts are there, a strategy solves, and every
prompt goes on with the change that the strategy answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.errors import CalibrationError, UnsupportedPipeline
from evenkeel.fitting.lockstep.lockstep_batch import Answer, Batch
from evenkeel.fitting.readout.solve import Unit, blocks, units_of
from evenkeel.fitting.readout.strategies import Strategy
from evenkeel.fitting.request import Settings
from evenkeel.hosts.actuators.head_rows import outputs_as_rows, rows_as_outputs, rows_of
from evenkeel.hosts.actuators.heads import find_head, is_reordered, layer_of
from evenkeel.hosts.pipeline.pipelines import Prompt, denoiser_of, run_pipeline
from evenkeel.hosts.pipeline.strand import Finished

_AT_HEAD, _REFERENCE, _QUANTIZED, _AGAIN = "at head", "reference", "quantized", "again"
_REWIND = object()


class _Rewound(BaseException):
    """Unwinds a denoiser call whose features are not kept; it runs again once there is a solution."""


class HeadRun:
    """Runs the two denoisers in lockstep over all prompts and asks a strategy for solutions."""

    def __init__(
        self,
        pipeline: Any,
        quantized: nn.Module,
        prompts: list[Prompt],
        seed: int,
        batch_size: int,
        settings: Settings,
        head: str | None,
        feature_memory: float,
    ) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.prompts, self.seed, self.batch_size = prompts, seed, batch_size
        # Compiled twins are fitted uncompiled: a graph cannot be paused.
        self.quantized: Any = getattr(quantized, "_orig_mod", quantized)
        self.reference: Any = getattr(denoiser_of(pipeline), "_orig_mod", denoiser_of(pipeline))
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
        self.corrected = torch.tensor(self.head.corrected)
        self.feature_memory = feature_memory
        self.shares: Tensor | None = None
        self.units: list[Unit] = []
        self._current: Batch | None = None
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
        batch = self._batches(self.prompts[:1])[0]
        try:
            shown = self._advance([batch])
            while not isinstance(shown[0], Finished) and batch.watch.step == 0:
                self._place(shown[0])
                batch.solution = []
                shown = self._advance([batch])
            shares = batch.watch.shares
        finally:
            batch.strand.abandon()
        several = shares is not None and len(shares) > 1
        return shares if several and abs(float(shares.sum()) - 1) < 1e-2 else None  # type: ignore[union-attr]

    def run(self, strategy: Strategy, progress: bool) -> None:
        """One pass over all steps."""
        batches = self._batches(self.prompts)
        strategy.batches = batches
        total = self.settings.num_inference_steps
        try:
            with tqdm(total=total, desc=strategy.title, unit="step", disable=not progress) as bar:
                shown = self._advance(batches)
                while not isinstance(shown[0], Finished):
                    if shown[0] == _AT_HEAD:
                        self._solve(batches, strategy)
                    self._place(shown[0])
                    shown = self._advance(batches)
                    bar.update(batches[0].watch.step - bar.n)
        finally:
            for batch in batches:
                batch.strand.abandon()
        strategy.finish()

    def _batches(self, prompts: list[Prompt]) -> list[Batch]:
        size = self.batch_size
        starts = range(0, len(prompts), size)
        spans = [range(i, min(i + size, len(prompts))) for i in starts]
        layout = self.settings.layout
        return [
            Batch(self.pipeline, self.quantized, prompts[s.start : s.stop], s, layout, self._body)
            for s in spans
        ]

    def _body(self, shell: Any, batch: Batch) -> None:
        s = self.settings
        run_pipeline(
            shell,
            batch.prompts,
            [self.seed + i for i in batch.span],
            num_inference_steps=s.num_inference_steps,
            guidance_scale=s.guidance_scale,
            output_type="latent",
            call=s.call,
        )

    def _advance(self, batches: list[Batch]) -> list[Any]:
        """Let every batch run to its next pause; all must pause for the same reason."""
        shown = []
        for batch in batches:
            self._current = batch
            shown.append(batch.strand.resume())
        kinds = {type(s) if isinstance(s, Finished) else s for s in shown} - {_AT_HEAD, _AGAIN}
        if len(kinds) > 1 or (kinds and any(s in (_AT_HEAD, _AGAIN) for s in shown)):
            raise CalibrationError(
                "the pipeline calls fell out of step: they make different numbers of denoiser calls. "
                "Pass prompts that are treated alike, or batch_size=len(prompts)."
            )
        return [_AT_HEAD if s == _AGAIN else s for s in shown]

    def _place(self, wanted: Any) -> None:
        """With denoisers taking turns on the device: bring the one that runs next."""
        if self.settings.side_by_side or wanted not in (_REFERENCE, _QUANTIZED):
            return
        home = torch.device(getattr(self.pipeline, "_execution_device", "cpu"))
        pair = (self.reference, self.quantized)
        active, idle = pair if wanted == _REFERENCE else pair[::-1]
        idle.to("cpu")
        active.to(home)

    def _denoise(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the quantized denoiser's forward, inside a batch's strand."""
        batch = self._batch()
        if not self.settings.side_by_side:
            batch.strand.pause(_REFERENCE)
        expected = self.reference(*args, **kwargs)
        assert self._captured is not None
        self._refuse_another_head(_tensor(expected))
        batch.expected_rows = outputs_as_rows(self.head, self._captured)
        self._captured = None
        if not self.settings.side_by_side:
            batch.strand.pause(_QUANTIZED)
        try:
            given = self._forward(*args, **kwargs)
        except _Rewound:
            batch.strand.pause(_AGAIN)
            given = self._forward(*args, **kwargs)
        batch.watch.answers.append(Answer(_tensor(expected), _tensor(given)))
        batch.clear()
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
        batch = self._batch()
        batch.features = inputs[0]
        own = outputs_as_rows(self.head, output)
        assert batch.expected_rows is not None
        expected = batch.expected_rows.to(own.device)
        batch.targets = (expected.float() - own.float())[..., self.corrected.to(own.device)]
        if batch.solution is None:
            batch.strand.pause(_AT_HEAD)
            if batch.solution is _REWIND:
                batch.solution = None
                batch.features = batch.targets = None
                raise _Rewound
        if not batch.solution:
            return None
        added = torch.zeros(own.shape, device=own.device)
        columns = self.corrected.to(own.device)
        for sample, positions, change in batch.solution(batch):
            added[sample, positions].index_copy_(1, columns, change)
        return rows_as_outputs(self.head, (own.float() + added).to(output.dtype), output)

    def rows(self, batch: Batch) -> Iterator[tuple[Unit, int | None, slice, Tensor, Tensor]]:
        """Rows of a paused batch: unit, sample (None: a combination of branches), positions, h, t."""
        features, targets = batch.features, batch.targets
        assert features is not None and targets is not None
        count = targets.shape[1]
        for unit, sample in blocks(self.units, batch.span, len(features)):
            place = unit.rows(count)
            h = rows_of(self.head, self.layer, features[sample : sample + 1])[0, place]
            yield unit, sample, place, h.float(), targets[sample, place]
        if self.shares is None or len(self.shares) * len(batch.span) != len(features):
            return
        for unit in self.units:
            if unit.prompt in batch.span:
                # Unfolding is linear too: combining inputs first takes one patch matrix, not two.
                mine = slice(unit.prompt - batch.span.start, None, len(batch.span))
                shares = self.shares.to(features.device, torch.float32)
                mixed = torch.tensordot(shares, features[mine].float(), 1)[None]
                place = unit.rows(count)
                h = rows_of(self.head, self.layer, mixed)[0, place]
                yield unit, None, place, h, torch.tensordot(shares, targets[mine], 1)[place]

    def _batch(self) -> Batch:
        assert self._current is not None
        return self._current

    def _solve(self, batches: list[Batch], strategy: Strategy) -> None:
        if not self.units:
            first = batches[0]
            assert first.targets is not None
            self.units = units_of(len(self.prompts), first.targets.shape[1], self.head.features)
        strategy.open(batches[0].watch.step, len(batches[0].watch.answers))
        kept = 0
        rewound = []
        for batch in batches:
            strategy.take(batch)
            assert batch.features is not None
            kept += batch.features.nbytes
            if kept > self.feature_memory and len(batches) > 1:
                batch.solution = _REWIND
                rewound.append(batch)
        for batch in rewound:
            self._current = batch
            batch.strand.resume()
        strategy.close()
        for batch in batches:
            batch.solution = strategy.answer


def _tensor(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found.detach()
