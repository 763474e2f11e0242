"""Restore: fit what brings a quantized pipeline nearer, keep what held-out pairs confirm, measure it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from evenkeel.comparing.comparison import Arm, Comparison, Evaluator, compare, standard_arms
from evenkeel.corrections.base import Correction, digest_of
from evenkeel.corrections.composite import Composite
from evenkeel.corrections.readout import Readout
from evenkeel.corrections.recovery_adapters import RecoveryAdapters
from evenkeel.errors import EvenkeelError
from evenkeel.fitting.adapters.confirming import Confirmation, confirmation
from evenkeel.fitting.adapters.final_samples import FinalSamples
from evenkeel.fitting.adapters.fit_adapters import AdapterReport, Fitted, fitted
from evenkeel.fitting.adapters.kept import Kept
from evenkeel.fitting.adapters.pairs import Pairs
from evenkeel.fitting.readout.fit_readout import fit_readout
from evenkeel.fitting.refit.refit_branches import refit_branches
from evenkeel.hosts.actuators.beside import with_adapters
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.quantizers import load_quantized, save_quantized
from evenkeel.quantizers.layers.quantized_layers import Quantized
from evenkeel.record import load, save

RESTORED = "restored"
OTHER_STEPS = (4, 50)  # measured beside the fitted number


@dataclass(frozen=True)
class Restored:
    """What was kept, and what it is worth.

    Attributes:
        adapters: empty where they were not confirmed.
        report: of their fit.
        readout: fitted on top; None where it was not confirmed or cannot be.
        readout_gain: what the confirming pairs say that it adds.
        no_readout: why there is none.
        measured: number of steps -> comparison on other prompts.
        refitted: the denoiser with its own branches refitted, which all parts belong to; None where it has
            none, or where that was not confirmed.
        refit_gain: what they say that the refit brings.
        unmeasured: number of steps -> why nothing was measured there.

    """

    adapters: RecoveryAdapters
    report: AdapterReport
    readout: Readout | None
    readout_gain: Confirmation | None
    no_readout: str
    refitted: nn.Module | None = None
    refit_gain: Confirmation | None = None
    measured: dict[int, Comparison] = field(default_factory=dict)
    unmeasured: dict[int, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Correction, ...]:
        """What was kept, in the order in which it acts."""
        kept = [self.adapters] if self.adapters.layers else []
        return (*kept, *([] if self.readout is None else [self.readout]))

    def arms(self, quantized: nn.Module) -> list[Arm]:
        """What was kept, for ``compare``; nothing where nothing was."""
        if not self.parts and self.refitted is None:
            return []
        kept = Composite(self.parts) if len(self.parts) > 1 else next(iter(self.parts), None)
        return [Arm(RESTORED, quantized if self.refitted is None else self.refitted, kept)]

    @property
    def sentence(self) -> str:
        """What came out."""
        if not self.parts and self.refitted is None:
            return self.report.text().splitlines()[0]
        found = "no adapters: they were not confirmed"
        if self.adapters.layers:
            found = self.report.text().splitlines()[0]
        if self.refitted is not None and self.refit_gain is not None:
            gain, bound, _ = self.refit_gain
            found = f"refitted branches bring {gain:+.2f} dB (bound {bound:+.2f}); on top, {found}"
        if self.readout is not None and self.readout_gain is not None:
            found += f"; a readout adds {self.readout_gain[0]:+.2f} dB (bound {self.readout_gain[1]:+.2f})"
        for steps, comparison in self.measured.items():
            psnr = comparison[RESTORED].difference_to_quantized["psnr"]
            found += (
                f"; at {steps} steps PSNR to full precision {psnr.value:+.2f} dB "
                f"[{psnr.low:+.2f}, {psnr.high:+.2f}] on {psnr.n} other images"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "sentence": self.sentence,
            "parts": [part.name for part in self.parts],
            "adapters": self.report.as_dict(),
            "readout": None if self.readout_gain is None else list(self.readout_gain),
            "no_readout": self.no_readout,
            "refit": None if self.refit_gain is None else list(self.refit_gain),
            "refitted": self.refitted is not None,
            "measured": {
                str(steps): [arm.as_dict() for arm in comparison.arms]
                for steps, comparison in self.measured.items()
            },
            "unmeasured": {str(steps): why for steps, why in self.unmeasured.items()},
        }


def restore(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    measured_on: Sequence[Prompt],
    num_inference_steps: int,
    budget: float = 0.05,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    call: dict[str, Any] | None = None,
    evaluator: Evaluator | None = None,
    readout: bool = True,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Restored:
    """Adapters within a budget, a readout on top, each kept only if held-out pairs confirm it.

    Where layers of this library's quantizers have low-rank branches, these are refitted first
    (``refit_branches`` in the metric of the output), and kept on the same condition. Under torchrun the
    processes share the prompts.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: its quantized denoiser, of any backend; not changed.
        prompts: to fit on.
        measured_on: other prompts; what was kept is compared on them at the fitted number of steps, at 4
            and at 50. Empty measures nothing.
        num_inference_steps: as passed to the pipeline.
        budget: bytes of the adapters over bytes of the quantized denoiser.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call.
        call: further arguments of the pipeline call.
        evaluator: of images, as of ``compare``.
        readout: whether to try one.
        folder: for what is finished. After a kill, the same call goes on there. It is not removed.
        progress: show bars.

    Raises:
        CalibrationError: nothing is quantized, or an argument is out of range.

    """
    asked: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "batch_size": batch_size,
        "call": call,
    }
    kept = Kept.of(folder)
    run = Run(pipeline, prompts, num_inference_steps, seed=seed, quantized=quantized, **asked)
    if len(measured_on):
        Run(pipeline, measured_on, num_inference_steps, **asked)  # refused now, not after the fit
    refit, refit_gain = _refitted(run, progress, kept) if has_branches(quantized) else (None, None)
    base = quantized if refit is None else refit
    if refit is not None:
        run = Run(pipeline, prompts, num_inference_steps, seed=seed, quantized=base, **asked)
    fit = fitted(run, budget, folder=folder, progress=progress)
    adapters = fit.adapters
    head, gained, why = (
        _readout(run, fit, progress, kept) if readout else (None, None, "not asked for")
    )
    found = Restored(adapters, fit.report, head, gained, why, refit, refit_gain)
    arms = found.arms(quantized)
    if not (arms and len(measured_on)):
        return found
    for count in dict.fromkeys((num_inference_steps, *OTHER_STEPS)):
        # Heads belong to the fitted noise levels; adapters do not.
        whole = count == num_inference_steps or head is None
        if not (whole or adapters.layers or refit is not None):
            found.unmeasured[count] = "the readout that was kept belongs to the fitted steps"
            continue
        arm = arms[0] if whole else Arm(RESTORED, base, adapters)
        pictures = None
        if kept.folder is not None:
            made_by = {**_identity(run), "count": count, "restored": digest_of(arm.correction)}
            pictures = kept.path("images", made_by, "")
        try:
            found.measured[count] = compare(
                pipeline,
                [*standard_arms(pipeline, quantized, {}), arm],
                prompts=measured_on,
                num_inference_steps=count,
                evaluator=evaluator,
                folder=pictures,
                progress=progress,
                **asked,
            )
        except EvenkeelError as e:
            found.unmeasured[count] = str(e)
    return found


def has_branches(quantized: nn.Module) -> bool:
    """Whether a layer of this library's quantizers has a low-rank branch."""
    return any(m.rank for m in quantized.modules() if isinstance(m, Quantized))


def _as_asked(run: Run) -> dict[str, Any]:
    """A run as the keywords of a fit."""
    return {
        "quantized": run.quantized,
        "prompts": run.prompts,
        "num_inference_steps": run.num_inference_steps,
        "guidance_scale": run.guidance_scale,
        "seed": run.seed,
        "batch_size": run.batch_size,
        "call": run.call,
    }


def _identity(run: Run) -> dict[str, Any]:
    """Everything that decides about what is fitted with a run."""
    size = {"batch_size": run.batch_size, "seed": run.seed}
    return {**run.key(*run.pair), **size, "prompts": run.prompts.keys}


def _refitted(run: Run, progress: bool, kept: Kept) -> tuple[nn.Module | None, Confirmation | None]:
    """The denoiser with refitted branches, where held-out pairs confirm it, and what these say."""
    pairs = Pairs.of(run, choosing=False)
    made_by = {} if kept.folder is None else _identity(pairs.fit)
    place = kept.path("refitted", made_by, "")
    module: nn.Module | None = None
    if kept.get("refit", made_by) is None:
        module, _ = refit_branches(
            run.pipeline, metric="output", progress=progress, **_as_asked(pairs.fit)
        )
        if place is not None and processes().main:
            save_quantized(module, place)
            kept.put("refit", made_by, "done", {})
        processes().barrier()
    if place is not None:  # what comes later is kept for the denoiser as it comes from its folder
        module = load_quantized(place)[0]
    assert module is not None
    held_out = FinalSamples(pairs.held_out, kept, len(pairs.further))
    said = confirmation(pairs, partial(held_out.gains_of, module))
    return (module if said.holds else None), said


def _readout(
    run: Run, found: Fitted, progress: bool, kept: Kept
) -> tuple[Readout | None, Confirmation | None, str]:
    """A readout of the denoiser with its adapters, what it adds, and why there is none."""
    _, quantized = run.pair
    fit = Pairs.of(run).fit
    place = None
    if kept.folder is not None:
        place = kept.path("readout", {**_identity(fit), "beside": found.adapters.digest()})
    if place is not None and place.exists():
        readout = load(place)
        assert isinstance(readout, Readout)
    else:
        try:
            with with_adapters(quantized, found.adapters):
                readout = fit_readout(run.pipeline, progress=progress, **_as_asked(fit))
        except EvenkeelError as e:
            return None, None, str(e)
        if place is not None and processes().main:
            save(readout, place)
    layers, held_out = found.adapters.layers, found.held_out
    said = confirmation(
        found.pairs, lambda over: held_out.gains(over, layers, readout) - found.gains_over(over)
    )
    if said.holds:
        return readout, said, ""
    return None, said, "no certain improvement on held-out pairs"
