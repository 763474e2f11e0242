"""Generate: one arm's images, batch by batch, kept in a folder so that nothing made is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.applying import applied
from evenkeel.corrections.base import Correction, digest_of
from evenkeel.errors import OVERFLOW, MetricError
from evenkeel.hosts.pipeline.denoiser_calls import answer_of
from evenkeel.hosts.pipeline.pipelines import global_noise_kept
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Batch, Run
from evenkeel.storage import (
    Kind,
    Number,
    Tensors,
    alone,
    check_json,
    check_tensors,
    kind_of,
    read_tensors,
    write_tensors,
)

IMAGES = Kind("images", 1, "remove that folder or use another", keys=("made_by", "seconds"))
_SCHEMA = {"images": Tensors(torch.uint8, ("images", 3, "height", "width"))}


@dataclass(frozen=True)
class Arm:
    """One way to generate: which denoiser, with which correction."""

    name: str
    denoiser: nn.Module
    correction: Correction | None = None
    allow: tuple[str, ...] = ()


def generate(
    run: Run,
    arm: Arm,
    folder: str | os.PathLike[str] | None = None,
    on_batch: Callable[[], Any] = lambda: None,
) -> tuple[Tensor, list[float]]:
    """Images (n, 3, H, W) uint8 of one arm, and seconds per image of every batch.

    Of several processes each makes whole batches, as one process would; the main one gets all of
    them, the others none.

    Args:
        run: of any diffusers image pipeline.
        arm: which denoiser and correction.
        folder: where finished batches are kept and looked for; None keeps nothing.
        on_batch: called after every batch, for progress.

    Raises:
        StorageError: the folder holds images of something else, or damaged ones.
        MetricError: the pipeline makes no images, or some that are not finite.

    """
    made, seconds = [], []
    if folder is not None:
        run.refuse_unknown()
    identity = {} if folder is None else identity_of(run, arm)
    # Of several processes one holds the folder for all of them.
    held = nullcontext() if folder is None or not processes().main else alone(folder)
    with held, sampling_as(run, arm):
        for batch in run.share():
            processes().check()
            asked = {**identity, "seed": batch.seed, "prompts": batch.prompts.keys}
            name = f"{batch.first:06d}-{len(batch):03d}.safetensors"
            path = None if folder is None else Path(folder) / arm.name / name
            if path is not None and path.exists():
                pictures, each = _kept(path, asked)
            else:
                pictures, each = _timed(run, batch, arm)
                if path is not None:
                    header = {"made_by": asked, "seconds": each}
                    write_tensors(path, IMAGES, header, {"images": pictures})
            made.append(pictures)
            seconds.append(each)
            on_batch()
    return _brought_together(made, seconds)


def remove_kept(folder: str | os.PathLike[str]) -> None:
    """Remove the batches that `generate` kept here, and the folder itself unless it holds something else."""
    for path in Path(folder).glob("*/*.safetensors"):
        if kind_of(path) == IMAGES.name:
            path.unlink()
            with suppress(OSError):
                path.parent.rmdir()
    with suppress(OSError):
        Path(folder).rmdir()


def _brought_together(made: list[Tensor], seconds: list[float]) -> tuple[Tensor, list[float]]:
    """Batches of all processes in the order of the prompts, on the main one."""
    us = processes()
    if us.count == 1:
        return torch.cat(made), seconds
    rounds = max(int(n) for n, _ in us.gathered(len(made)))
    found: list[list[tuple[Tensor, float]]] = [[] for _ in range(us.count)]
    for i in range(rounds):  # one batch each at a time: never all images twice
        mine = {"images": made[i]} if i < len(made) else {}
        for batches, (each, tensors) in zip(
            found, us.gathered(seconds[i : i + 1], mine, main_only=True), strict=False
        ):
            batches += [(tensors["images"], float(s)) for s in each]
    whole = [batch for batches in found for batch in batches]
    if not whole:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8), []
    return torch.cat([images for images, _ in whole]), [each for _, each in whole]


@contextmanager
def sampling_as(run: Run, arm: Arm) -> Iterator[None]:
    """Inside, the pipeline samples with the arm's denoiser and correction, and nothing else.

    The correction is applied once for many batches: planning may take as long as a batch.

    Raises:
        EvenkeelError: it was made for another denoiser, scheduler or guidance scale.

    """
    with run.undisturbed(arm.denoiser):
        if arm.correction is None:
            yield
            return
        with applied(
            run.pipeline,
            arm.correction,
            allow=arm.allow,
            guidance_scale=run.guidance_scale,
            recognise=run.fingerprint,
        ):
            yield


def check_corrections(run: Run, arms: Sequence[Arm]) -> None:
    """Apply every arm's correction once: what is refused is refused before anything is generated.

    Plans are only made when the pipeline runs, and every denoiser is recognised once.

    Raises:
        EvenkeelError: a correction was made for another denoiser, scheduler or guidance scale.

    """
    for arm in arms:
        with sampling_as(run, arm):
            pass


def _timed(run: Run, batch: Batch, arm: Arm) -> tuple[Tensor, float]:
    """A batch's images, and seconds for each of them."""
    began = time.perf_counter()
    # DiTPipeline hands its generators to no scheduler: DDPM draws from the global one.
    with global_noise_kept():
        torch.manual_seed(batch.seed)
        with _last_output(arm.denoiser) as last:
            array = np.asarray(run.sample(batch, output_type="np"))
    if array.ndim != 4:
        raise MetricError(
            f"expected images (n, H, W, 3) from {type(run.pipeline).__name__}, got shape {array.shape}; "
            f"compare works on images, not on video."
        )
    spoilt = [i for i, picture in enumerate(array) if not np.isfinite(picture).all()]
    if not spoilt and last and not bool(last[-1].isfinite().all()):
        spoilt = [*range(len(batch))]  # an autoencoder with a codebook makes pictures even of NaN
    if spoilt:
        first = spoilt[0]
        raise MetricError(
            f"arm {arm.name!r} made {len(spoilt)} of {len(batch)} images from values that are NaN or "
            f"infinite, the first of prompt {batch.first + first} ({batch.prompts.texts[first]!r:.60}, "
            f"seed {batch.seeds[first]}); nothing is scored. {OVERFLOW}"
        )
    pictures = torch.from_numpy(array).permute(0, 3, 1, 2) * 255
    return pictures.round().clamp(0, 255).to(torch.uint8), (time.perf_counter() - began) / len(
        batch
    )


@contextmanager
def _last_output(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what the denoiser gave last is kept; empty where it is compiled and no hook is seen."""
    kept: list[Tensor] = []
    if hasattr(denoiser, "_orig_mod") or denoiser._compiled_call_impl is not None:
        yield kept
        return

    def keep(_: nn.Module, given: Any, output: Any) -> None:
        kept[:] = [answer_of(output).detach()]

    hook = denoiser.register_forward_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


def identity_of(run: Run, arm: Arm) -> dict[str, Any]:
    """Whatever decides about an arm's images beside prompts and seeds."""
    return {
        **run.key(arm.denoiser),
        "correction": digest_of(arm.correction),
        "allow": sorted(arm.allow),
    }


def _kept(path: Path, asked: dict[str, Any]) -> tuple[Tensor, float]:
    header, tensors = read_tensors(path, IMAGES)
    with IMAGES.valid(path):
        check_tensors(tensors, _SCHEMA)
        check_json(header["seconds"], Number(float, low=0), "seconds")
    if header["made_by"] != asked:
        raise IMAGES.error(
            f"{path} holds images of other prompts or settings; remove that folder or use another."
        )
    return tensors["images"], float(header["seconds"])
