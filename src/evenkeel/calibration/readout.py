"""Fit a readout: all prompts advance together, and at every step the output head is refitted.

Each denoiser call of the quantized network pauses at its output head. When all prompts are there, the
normal equations of the step are solved, and every prompt goes on with the head that was fitted
*without* it: the states of later steps are those that new prompts will meet, and the error that is
left is an honest one. Only one step's sums are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.calibration.head_fit import CallFit, Judge, Unit, blocks, new_folds, take_in, units_of
from evenkeel.calibration.lockstep_batch import Answer, Batch
from evenkeel.calibration.provenance import provenance_of
from evenkeel.calibration.settings import Settings
from evenkeel.corrections.head_table import HeadTable
from evenkeel.errors import CalibrationError, UnsupportedPipeline
from evenkeel.hosts.head_rows import outputs_as_rows, rows_as_outputs, rows_of
from evenkeel.hosts.heads import find_head, is_reordered, layer_of
from evenkeel.hosts.layouts import LatentLayout
from evenkeel.hosts.lockstep import Finished
from evenkeel.hosts.pipelines import (
    Prompt,
    call_parameters,
    denoiser_of,
    fingerprint,
    quantizer_text,
    quiet,
    run_pipeline,
)
from evenkeel.record import Provenance
from evenkeel.record.readout import FORMS, HeadFit, Readout
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.normal_equations import NormalEquations


def fit_readout(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    form: str = "per-step",
    head: str | None = None,
    guided_rows: bool = True,
    side_by_side: bool = True,
    call: dict[str, Any] | None = None,
    layout: LatentLayout | None = None,
    feature_memory: float = 64e6,
    progress: bool = True,
) -> Readout:
    """Refit the output head of ``quantized`` per step, in closed form, on its corrected trajectory.

    Costs one run of both denoisers (two for the forms that need a shared change first). Prompt i
    starts from noise of seed ``seed + i``.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: the quantized denoiser; not changed.
        prompts: texts, or class labels; a few are enough, one works.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call; all calls advance together.
        form: ``per-step``, ``shared`` or ``hierarchical``, see ``Readout``.
        head: name of the output layer, where it is not found by itself.
        guided_rows: also count what the branches' combination at this guidance scale leaves, beside
            the branches themselves. Guidance amplifies their difference; the table stays valid at
            other scales.
        side_by_side: keep both denoisers where they are; False moves the idle one to the CPU.
        call: further arguments of the pipeline call.
        layout: where the latent's channels are; found by itself for known pipelines.
        feature_memory: bytes of head inputs kept while a step is solved; prompts beyond it run their
            quantized denoiser a second time.
        progress: show a bar.

    Returns:
        The readout; ``evenkeel.apply(pipe, readout)`` uses it, ``readout.save(path)`` keeps it.

    Raises:
        CalibrationError: no prompts, identical twins, non-finite outputs.
        UnsupportedPipeline: no output head that can be refitted.

    Example: see ``examples/readout.py``.

    """
    _check(prompts, quantized, denoiser_of(pipeline), form, batch_size)
    if guidance_scale is None:
        default = call_parameters(pipeline).get("guidance_scale")
        if default is not None and isinstance(default.default, (int, float)):
            guidance_scale = float(default.default)
    twins = fingerprint(denoiser_of(pipeline)), fingerprint(quantized)
    if twins[0] == twins[1]:
        raise CalibrationError(
            "the quantized denoiser is identical to the full-precision one: nothing was quantized, "
            "or the same object was passed twice."
        )
    settings = Settings(
        num_inference_steps,
        guidance_scale,
        dict(call or {}),
        "corrected",
        None,
        layout,
        False,
        side_by_side,
        twins,
        quantizer_text(quantized),
    )
    fit = _Fit(pipeline, quantized, list(prompts), seed, batch_size, settings, head, feature_memory)
    with torch.no_grad(), quiet(pipeline), fit.in_place():
        shares = fit.guidance()
        fit.shares = shares if guided_rows else None
        solved: _Solved = _PerStep(fit)
        if form != "per-step":
            shared = _Shared(fit)
            fit.run(shared, progress)
            prior = shared.solution()
            solved = _Fixed(fit, prior) if form == "shared" else _PerStep(fit, prior)
        fit.run(solved, progress)
    return solved.readout(form)


def _check(
    prompts: Sequence[Prompt],
    quantized: nn.Module,
    reference: nn.Module,
    form: str,
    batch_size: int,
) -> None:
    if isinstance(prompts, str) or len(prompts) == 0:
        raise CalibrationError(
            f"expected a non-empty list of prompts, got {prompts!r}; a few dozen are plenty."
        )
    if form not in FORMS:
        raise CalibrationError(f"form must be one of {FORMS}, got {form!r}.")
    if batch_size < 1:
        raise CalibrationError(f"batch_size must be at least 1, got {batch_size}.")
    if quantized is reference:
        raise CalibrationError(
            "quantized is the pipeline's own denoiser object; pass the quantized copy, and keep the "
            "full-precision one in the pipeline."
        )


_AT_HEAD, _REFERENCE, _QUANTIZED, _AGAIN = "at head", "reference", "quantized", "again"
_REWIND = object()


class _Rewound(BaseException):
    """Unwinds a denoiser call whose features are not kept; it runs again once there is a solution."""


class _Fit:
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

    def run(self, strategy: _Strategy, progress: bool) -> None:
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
        for unit, sample, _ in blocks(self.units, batch.span, len(features)):
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

    def _solve(self, batches: list[Batch], strategy: _Strategy) -> None:
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
        if rewound:
            for batch in rewound:
                self._current = batch
                batch.strand.resume()
        strategy.close()
        for batch in batches:
            batch.solution = strategy.answer


def _tensor(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found.detach()


class _Strategy:
    """What is solved from a step's rows, and what the prompts go on with."""

    title = "readout"
    #: Called with a batch: (sample, positions, change of the head's output); empty: no change.
    answer: Any

    def __init__(self, fit: _Fit) -> None:
        self.fit = fit
        self.batches: list[Batch] = []

    def open(self, step: int, branch: int) -> None:
        """A denoiser call begins."""

    def take(self, batch: Batch) -> None:
        """All rows of one batch."""

    def close(self) -> None:
        """All rows have been seen."""

    def finish(self) -> None:
        """The pass is over."""

    def _new_folds(self) -> list[NormalEquations]:
        head = self.fit.head
        return new_folds(self.fit.units, head.features, len(head.corrected), head.has_bias)


class _Shared(_Strategy):
    """Sums of all steps along the quantized trajectory: one change for all of them."""

    title = "readout: shared change"

    def __init__(self, fit: _Fit) -> None:
        super().__init__(fit)
        self.answer = []
        self._folds: list[NormalEquations] = []

    def take(self, batch: Batch) -> None:
        self._folds = self._folds or self._new_folds()
        take_in(self._folds, ((unit, h, t) for unit, _, _, h, t in self.fit.rows(batch)))

    def solution(self) -> CallFit:
        """The change that suits all steps best."""
        return CallFit.of(self._folds)


class _Solved(_Strategy):
    """Advances every prompt with the solution that was fitted without it, and judges it."""

    def __init__(self, fit: _Fit) -> None:
        super().__init__(fit)
        self.answer = self._answer
        self.calls: dict[tuple[int, int], CallFit] = {}
        self.fits: dict[tuple[int, int], HeadFit] = {}
        self._call: CallFit | None = None
        self._judge: Judge | None = None

    def _answer(self, batch: Batch) -> Iterator[tuple[int, slice, Tensor]]:
        assert self._call is not None and self._judge is not None
        for unit, sample, place, h, t in self.fit.rows(batch):
            weight, constant = self._call.without[unit.fold]
            change = h @ weight.to(h) + constant.to(h)
            self._judge.see(unit, t, t - change)
            if sample is not None:
                yield sample, place, change

    def readout(self, form: str) -> Readout:
        """Table, verdicts and the evidence that is left."""
        fit = self.fit
        steps = 1 + max(step for step, _ in self.calls)
        branches = 1 + max(branch for _, branch in self.calls)
        weight = torch.zeros(steps, branches, fit.head.features, fit.head.targets)
        constant = torch.zeros(steps, branches, fit.head.targets)
        active = torch.zeros(steps, branches, dtype=torch.bool)
        for (step, branch), call in self.calls.items():
            weight[step, branch][:, fit.corrected] = call.whole[0].float()
            constant[step, branch][fit.corrected] = call.whole[1].float()
            active[step, branch] = not self.fits[step, branch].explanation
        provenance = self._provenance(form)
        levels = np.array(provenance.alpha), np.array(provenance.sigma)
        table = HeadTable.of(*levels, weight, constant, active)
        evidence = self._evidence(provenance)
        fits = tuple(self.fits[key] for key in sorted(self.fits))
        return Readout(provenance, fit.head.name, form, table, fits, evidence)

    def _provenance(self, form: str) -> Provenance:
        watch = self.batches[0].watch
        assert watch.law is not None and watch.sample is not None and watch.layout is not None
        sample = watch.sample.unsqueeze(1)
        fit = self.fit
        made = provenance_of(fit.pipeline, watch.law, sample, watch.layout, fit.settings)
        return replace(made, correction=f"readout(form={form!r})")

    def _evidence(self, provenance: Provenance) -> Evidence | None:
        parts = [batch.watch.moments for batch in self.batches]
        if any(p is None for p in parts):
            return None
        runs = [joined(p, 1) for p in parts if p is not None]
        levels = np.array(provenance.alpha), np.array(provenance.sigma)
        return Evidence(provenance.prediction, *levels, joined(runs, 0), source=provenance)


class _PerStep(_Solved):
    """A head per denoiser call, drawn to the shared change if there is one."""

    def __init__(self, fit: _Fit, prior: CallFit | None = None) -> None:
        super().__init__(fit)
        self._prior = prior
        self._key = (0, 0)
        self._folds: list[NormalEquations] = []

    def open(self, step: int, branch: int) -> None:
        self.finish()
        self._key = (step, branch)
        self._folds = self._new_folds()
        self._judge = Judge(self.fit.units)

    def take(self, batch: Batch) -> None:
        take_in(self._folds, ((unit, h, t) for unit, _, _, h, t in self.fit.rows(batch)))

    def close(self) -> None:
        self._call = self.calls[self._key] = CallFit.of(self._folds, self._prior)
        self._folds = []

    def finish(self) -> None:
        if self._call is not None and self._judge is not None:
            self.fits[self._key] = self._judge.verdict(*self._key, self._call.penalty)


class _Fixed(_Solved):
    """The shared change at every step, judged as a whole."""

    def __init__(self, fit: _Fit, call: CallFit) -> None:
        super().__init__(fit)
        self._call = call
        self._judge = Judge(fit.units)

    def open(self, step: int, branch: int) -> None:
        assert self._call is not None
        self.calls[step, branch] = self._call

    def finish(self) -> None:
        assert self._call is not None and self._judge is not None
        for key in self.calls:
            self.fits[key] = self._judge.verdict(*key, self._call.penalty)


def joined(parts: Sequence[PairedMoments], dim: int) -> PairedMoments:
    """Moments side by side along one of their leading axes."""
    names = [f.name for f in fields(PairedMoments)]
    return PairedMoments(**{n: torch.cat([getattr(p, n) for p in parts], dim) for n in names})
