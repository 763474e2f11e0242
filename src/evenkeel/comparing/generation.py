"""Generate: one arm's images, batch by batch, kept in a folder so that nothing made is lost."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from evenkeel.applying import applied
from evenkeel.corrections.base import Correction, digest_of
from evenkeel.errors import MetricError, UnsupportedSampler
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.pipelines import Prompt, denoiser_swapped, quiet, run_pipeline
from evenkeel.hosts.scheduler.interception import install, installed, uninstall
from evenkeel.hosts.scheduler.tape import Recorder, Tape
from evenkeel.sampling.step_law import StepLaw
from evenkeel.storage import write_atomically


@dataclass(frozen=True)
class Arm:
    """One way to generate: which denoiser, with which correction."""

    name: str
    denoiser: nn.Module
    correction: Correction | None = None
    allow: tuple[str, ...] = ()


def generate(
    pipeline: Any,
    arm: Arm,
    prompts: Sequence[Prompt],
    seed: int,
    batch_size: int,
    options: Mapping[str, Any],
    folder: str | os.PathLike[str] | None,
    on_batch: Callable[[], Any],
) -> tuple[Tensor, list[float]]:
    """Images (n, 3, H, W) uint8 of one arm, and seconds per image of every batch.

    Args:
        pipeline: any diffusers image pipeline.
        arm: which denoiser and correction.
        prompts: texts or class labels.
        seed: of the first prompt's noise; prompt i uses ``seed + i``.
        batch_size: prompts per pipeline call.
        options: ``num_inference_steps``, ``guidance_scale`` and ``call`` of ``run_pipeline``.
        folder: where finished batches are kept and looked for; None keeps nothing.
        on_batch: called after every batch, for progress.

    Raises:
        MetricError: the folder holds images of something else, or the pipeline makes no images.

    """
    made, seconds = [], []
    identity = _identity(pipeline, arm) if folder is not None else ""
    with (
        quiet(pipeline),
        denoiser_swapped(pipeline, arm.denoiser),
        corrected(pipeline, arm, options["guidance_scale"]),
    ):
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            path = None
            if folder is not None:
                path = Path(folder) / arm.name / f"{start:06d}-{len(batch):03d}.safetensors"
            key = json.dumps([identity, seed, [str(p) for p in batch], {**options}], default=str)
            kept = _kept(path, key)
            if kept is None:
                began = time.perf_counter()
                pictures = _pictures(pipeline, batch, seed + start, options)
                each = (time.perf_counter() - began) / len(batch)
                if path is not None:
                    _keep(path, key, pictures, each)
            else:
                pictures, each = kept
            made.append(pictures)
            seconds.append(each)
            on_batch()
    return torch.cat(made), seconds


def law_of_run(
    pipeline: Any, denoiser: nn.Module, prompt: Prompt, options: Mapping[str, Any]
) -> StepLaw:
    """The step law of a run with these options, read off one run of one prompt.

    Args:
        pipeline: any diffusers pipeline.
        denoiser: to run with.
        prompt: any.
        options: as for ``generate``.

    Raises:
        UnsupportedSampler: the scheduler has no law of our form.

    """
    tape = Tape()
    before = installed(pipeline.scheduler)
    install(pipeline.scheduler, Recorder(tape))
    try:
        with quiet(pipeline), denoiser_swapped(pipeline, denoiser):
            run_pipeline(pipeline, [prompt], [0], output_type="latent", **options)
    finally:
        uninstall(pipeline.scheduler)
        if before:
            install(pipeline.scheduler, *before)
    if tape.law is None:
        raise UnsupportedSampler(
            f"{type(pipeline).__name__} never called its scheduler's step; nothing can be corrected."
        )
    return tape.law


def corrected(pipeline: Any, arm: Arm, guidance_scale: float | None) -> AbstractContextManager[Any]:
    """Applied once for the whole arm: checking the denoiser and planning cost as much as a batch."""
    if arm.correction is None:
        return nullcontext()
    return applied(pipeline, arm.correction, allow=arm.allow, guidance_scale=guidance_scale)


def check_corrections(pipeline: Any, arms: Sequence[Arm], guidance_scale: float | None) -> None:
    """Apply every arm's correction once: what is refused is refused before anything is generated.

    Costs a fingerprint of the denoiser for each arm; plans are only made when the pipeline runs.

    Raises:
        EvenkeelError: a correction was made for another denoiser, scheduler or guidance scale.

    """
    for arm in arms:
        with denoiser_swapped(pipeline, arm.denoiser), corrected(pipeline, arm, guidance_scale):
            pass


def _pictures(pipeline: Any, batch: list[Prompt], seed: int, options: Mapping[str, Any]) -> Tensor:
    seeds = range(seed, seed + len(batch))
    # DiTPipeline hands its generators to no scheduler: DDPM draws from the global one.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        array = np.asarray(run_pipeline(pipeline, batch, seeds, output_type="np", **options))
    if array.ndim != 4:
        raise MetricError(
            f"expected images (n, H, W, 3) from {type(pipeline).__name__}, got shape {array.shape}; "
            f"compare works on images, not on video."
        )
    return (torch.from_numpy(array).permute(0, 3, 1, 2) * 255).round().clamp(0, 255).to(torch.uint8)


def _identity(pipeline: Any, arm: Arm) -> str:
    """Whatever else decides about an arm's images: networks, scheduler, correction and its evidence."""
    scheduler = pipeline.scheduler
    digest = hashlib.sha256(fingerprint(arm.denoiser).encode())
    digest.update(type(scheduler).__name__.encode())
    config = dict(scheduler.config)
    # A list made from a set: its order differs from process to process.
    if "_use_default_values" in config:
        config["_use_default_values"] = sorted(config["_use_default_values"])
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(f"{digest_of(arm.correction)} {sorted(arm.allow)}".encode())
    return digest.hexdigest()


def _keep(path: Path, key: str, pictures: Tensor, seconds: float) -> None:
    tensors = {
        "images": pictures.contiguous(),
        "seconds": torch.tensor([seconds], dtype=torch.float64),
        "key": torch.tensor(list(key.encode()), dtype=torch.uint8),
    }
    write_atomically(path, save(tensors))


def _kept(path: Path | None, key: str) -> tuple[Tensor, float] | None:
    if path is None or not path.exists():
        return None
    found = load_file(path)
    if bytes(found["key"].tolist()).decode() != key:
        raise MetricError(
            f"{path} holds images of other prompts or settings; remove that folder or use another."
        )
    return found["images"], float(found["seconds"])
