"""Quantize a pipeline's denoiser with a method of the literature, on calls of the pipeline itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from evenkeel.errors import QuantizationError
from evenkeel.fitting.mixed_order.calibration import mixed_order_set
from evenkeel.fitting.training.train_quantized import train_quantized
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.run import Run
from evenkeel.quantizers.methods.base import Quantizer, quantized_on
from evenkeel.quantizers.methods.merged_training import TrainedMethod
from evenkeel.quantizers.saved.folder import save_quantized
from evenkeel.quantizers.saved.report import QuantizationReport
from evenkeel.quantizers.workspace.alignment import MixedOrder
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, kept
from evenkeel.quantizers.workspace.workspace import Workspace
from evenkeel.storage import alone

PARTIAL = "partial"


def quantize(
    pipeline: Any,
    method: Quantizer,
    *,
    prompts: Sequence[Prompt] = (),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    calibration_steps: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    call: dict[str, Any] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> tuple[nn.Module, QuantizationReport]:
    """A quantized copy of a pipeline's denoiser, and a report on every layer.

    The pipeline runs in full precision on a few prompts; some of the denoiser's calls, evenly spaced
    over the steps, are what the method calibrates on (with ``alignment="mixed-order"`` of two orders of
    its sampler). The pipeline is not changed. In memory are the
    pipeline, the copy, and what passes through one block at a time.

    Args:
        pipeline: any diffusers pipeline with one denoiser.
        method: an element of :mod:`evenkeel.quantizers.methods.catalogue`, or a ``QuantizerSpec``.
        prompts: texts or class labels to calibrate on; not needed where ``method.calibrated`` is
            False.
        num_inference_steps: of the pipeline, as it will be deployed.
        guidance_scale: the same; None is the pipeline's own.
        calibration_steps: so many of the denoiser's calls per batch are kept.
        batch_size: prompts per pipeline call, and of a calibration call.
        seed: of the first prompt's noise.
        call: further arguments of the pipeline call.
        out: folder for the result. Finished blocks are kept in it meanwhile, so an interrupted run
            continues; None writes nothing.
        progress: show bars.

    Returns:
        The denoiser (see ``save_quantized`` and ``compare``) and the report.

    Raises:
        QuantizationError: no prompts for a method that calibrates; what the method itself refuses.
        StorageError: ``out`` holds another run, or another process is at work in it.

    """
    asked = (
        prompts,
        num_inference_steps,
        guidance_scale,
        calibration_steps,
        batch_size,
        seed,
        call,
    )
    with nullcontext() if out is None else alone(Path(out) / PARTIAL):
        return _quantized(pipeline, method, *asked, None if out is None else Path(out), progress)


def _quantized(
    pipeline: Any,
    method: Quantizer,
    prompts: Sequence[Prompt],
    num_inference_steps: int | None,
    guidance_scale: float | None,
    calibration_steps: int,
    batch_size: int,
    seed: int,
    call: dict[str, Any] | None,
    folder: Path | None,
    progress: bool,
) -> tuple[nn.Module, QuantizationReport]:
    denoiser = denoiser_of(pipeline)
    if isinstance(method, TrainedMethod):
        if not prompts or num_inference_steps is None:
            raise QuantizationError(
                f"{method} trains on runs of the pipeline: give prompts and num_inference_steps."
            )
        run = Run(
            pipeline,
            prompts,
            num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch_size=batch_size,
            call=call,
        )
        kept_in = None if folder is None else folder / PARTIAL
        quantized, report, _ = train_quantized(run, method, folder=kept_in, progress=progress)
        if folder is not None:
            _save(quantized, folder)
        return quantized, report
    calls = None
    if method.calibrated:
        if not prompts or num_inference_steps is None:
            raise QuantizationError(
                f"{method} calibrates on the pipeline's own calls: give prompts (a few dozen) "
                "and num_inference_steps."
            )
        calls = calibration_set(
            pipeline,
            prompts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            calibration_steps=calibration_steps,
            batch_size=batch_size,
            seed=seed,
            call=call,
            progress=progress,
            pairs=getattr(method, "pairs", None),
        )
    with tqdm(desc=str(method), unit="block", disable=not progress, leave=False) as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total, bar.n = total, done  # a method may go through the blocks more than once
            bar.set_postfix_str(name)

        workspace = Workspace(
            denoiser,
            calls,
            progress=show,
            folder=None if folder is None else folder / PARTIAL,
            identity=_identity(denoiser, method, calls),
        )
        quantized, report = quantized_on(workspace, method)
    if folder is not None:
        _save(quantized, folder)
    return quantized, report


def _save(quantized: nn.Module, folder: Path) -> None:
    """The result, and nothing more of what was kept meanwhile."""
    save_quantized(quantized, folder)
    for file in (folder / PARTIAL).glob("*"):
        file.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        (folder / PARTIAL).rmdir()


def calibration_set(
    pipeline: Any,
    prompts: Sequence[Prompt],
    *,
    num_inference_steps: int,
    guidance_scale: float | None,
    calibration_steps: int,
    batch_size: int,
    seed: int = 0,
    call: dict[str, Any] | None = None,
    progress: bool = True,
    pairs: MixedOrder | None = None,
) -> CalibrationSet:
    """Denoiser calls of a full-precision run, evenly spaced over its steps.

    Uniform in time, as Q-Diffusion (arXiv:2302.04304, section 4.2) samples it. Guidance stacks its
    branches in one call or makes two; both are kept. The first and the last step are always among
    them where ``calibration_steps`` is at least 2.

    Args:
        pipeline: any diffusers pipeline with one denoiser.
        prompts: texts or class labels.
        num_inference_steps: of the pipeline.
        guidance_scale: of the pipeline; None is its own.
        calibration_steps: calls kept of every batch.
        batch_size: prompts per pipeline call.
        seed: of the first prompt's noise.
        call: further arguments of the pipeline call.
        progress: show a bar.
        pairs: calls of two orders of the sampler instead, each with its teacher
            (:func:`evenkeel.fitting.mixed_order.calibration.mixed_order_set`).

    Raises:
        QuantizationError: the pipeline never calls its denoiser, or a call holds NaN.

    """
    if calibration_steps < 1 or batch_size < 1:
        raise QuantizationError(
            "calibration_steps and batch_size must be at least 1, got "
            f"{calibration_steps} and {batch_size}."
        )
    run = Run(
        pipeline,
        prompts,
        num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        call=call,
    )
    if pairs is not None:
        return mixed_order_set(run, pairs, calibration_steps, progress=progress)
    chosen: list[Any] = []
    with run.undisturbed():
        for batch in tqdm(
            run.batches(), desc="calibration calls", disable=not progress, leave=False
        ):
            seen: list[Any] = []
            hook = run.denoiser.register_forward_pre_hook(
                lambda _, given, named, seen=seen: seen.append((given, dict(named))),
                with_kwargs=True,
            )
            try:
                run.sample(batch)
            finally:
                hook.remove()
            places = (
                torch.linspace(0, len(seen) - 1, min(calibration_steps, len(seen))).round().long()
            )
            chosen += [seen[i] for i in places.tolist()]
    if not chosen:
        raise QuantizationError(f"{type(pipeline).__name__} never called its denoiser.")
    return kept(chosen)


def _identity(denoiser: nn.Module, method: Quantizer, calls: CalibrationSet | None) -> str:
    """What an interrupted run must agree on to be continued."""
    asked = json.dumps(method.as_dict(), sort_keys=True)
    parts = (fingerprint(denoiser), asked, "" if calls is None else calls.digest)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return f"{method}, {digest}"
