"""Calibrate: run the full-precision and the quantized denoiser side by side and keep statistics.

Both see the same states, after guidance and everything else the pipeline does, because the second
run is led through the states of the first (``hosts.tape``). Raw outputs are dropped as soon as their
moments are taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.corrections.plan import Correction
from evenkeel.errors import CalibrationError
from evenkeel.hosts.correcting import Corrector
from evenkeel.hosts.interception import (
    Interceptor,
    install,
    installed,
    plain_class,
    uninstall,
)
from evenkeel.hosts.layouts import LatentLayout, find_layout
from evenkeel.hosts.pipelines import (
    Prompt,
    call_parameters,
    denoiser_name,
    denoiser_of,
    denoiser_swapped,
    fingerprint,
    quantizer_text,
    quiet,
    run_pipeline,
)
from evenkeel.hosts.tape import Recorder, Replayer, Tape
from evenkeel.record import (
    Provenance,
    Record,
    canonical_order,
    fixed_point_spectrum,
    prompt_key,
)
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import radial_spectrum, step_gram
from evenkeel.statistics.histogram import ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments

TRAJECTORIES = ("full-precision", "quantized", "corrected")


@dataclass(frozen=True)
class _Settings:
    """What does not change from batch to batch."""

    num_inference_steps: int
    guidance_scale: float | None
    call: dict[str, Any]
    trajectory: str
    correction: Correction | None
    layout: LatentLayout | None
    histograms: bool
    side_by_side: bool


def calibrate(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    trajectory: str = "full-precision",
    correction: Correction | None = None,
    histograms: bool = True,
    side_by_side: bool = True,
    call: dict[str, Any] | None = None,
    layout: LatentLayout | None = None,
    pilot: Record | None = None,
    noise_floor_limit: float = 0.05,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Record:
    """Measure the quantization error of ``quantized`` along ``pipeline``'s own trajectories.

    Prompt i starts from noise of seed ``seed + i``, whatever the batch size. Under torchrun the
    batches are shared between the processes and every process returns the whole record.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: the quantized denoiser, same call signature.
        prompts: texts, or class labels for class-conditional pipelines.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call.
        trajectory: whose outputs advance the sample: ``full-precision`` (as published),
            ``quantized``, or ``corrected`` (quantized with ``correction`` applied).
        correction: needed for, and only for, ``corrected``.
        histograms: also keep error histograms, for trimming.
        side_by_side: keep both denoisers where they are; False moves the idle one to the CPU.
        call: further arguments of the pipeline call, such as ``{"height": 512}``.
        layout: where the latent's channels are; found by itself for known pipelines.
        pilot: a record whose histogram frame to use, so that the two can be merged.
        noise_floor_limit: how much two runs of the same denoiser may differ, relative to the error.
        resume: a folder for finished batches. After a kill, the same call continues there and gives
            the bit-identical record; the folder is removed at the end.
        progress: show a bar.

    Returns:
        The record; save it with ``record.save(path)``.

    Raises:
        CalibrationError: no prompts, identical twins, non-finite outputs, outputs of another shape,
            a pipeline that is not repeatable, a resume folder of another calibration.
        UnsupportedPipeline, UnsupportedSampler: see there.

    Example: see ``examples/three_lines.py``.

    """
    _check_arguments(prompts, quantized, denoiser_of(pipeline), trajectory, correction, batch_size)
    if guidance_scale is None:
        default = call_parameters(pipeline).get("guidance_scale")
        if default is not None and isinstance(default.default, (int, float)):
            guidance_scale = float(default.default)
    settings = _Settings(
        num_inference_steps,
        guidance_scale,
        dict(call or {}),
        trajectory,
        correction,
        layout,
        histograms,
        side_by_side,
    )
    rank, world = _process()
    starts = range(0, len(prompts), batch_size)
    batches = [(list(prompts[i : i + batch_size]), seed + i) for i in starts]
    folder = _part_folder(resume, world)
    twins = fingerprint(denoiser_of(pipeline)), fingerprint(quantized)
    if twins[0] == twins[1]:
        raise CalibrationError(
            "the quantized denoiser is identical to the full-precision one: nothing was quantized, "
            "or the same object was passed twice."
        )
    if folder is not None:
        _claim(folder, pipeline, settings, batches, twins)
    before = installed(pipeline.scheduler)
    parts: list[Record | None] = [None] * len(batches)
    frame = pilot.frame if pilot is not None else None
    try:
        with quiet(pipeline):
            mine = [0, *(i for i in range(1, len(batches)) if i % world == rank)]
            if rank != 0:
                _barrier(world)  # the first batch makes the frame that all histograms share
                mine = mine[1:]
            bar = tqdm(mine, desc="calibrate", unit="batch", disable=not progress or rank != 0)
            for index in bar:
                path = None if folder is None else folder / f"part-{index:05d}.safetensors"
                if frame is None and index != 0:
                    frame = _first_frame(parts, folder)
                if path is not None and path.exists():
                    parts[index] = Record.load(path)
                else:
                    part = _calibrate_batch(
                        pipeline, quantized, batches[index], settings, twins, frame
                    )
                    if index == 0:
                        part = _with_noise_floor(
                            part, pipeline, batches[0], settings, noise_floor_limit
                        )
                    parts[index] = part
                    if path is not None:
                        part.save(path)
                if index == 0 and rank == 0:
                    _barrier(world)
        _barrier(world)
    finally:
        uninstall(pipeline.scheduler)
        if before:
            install(pipeline.scheduler, *before)
    record = _merged(parts, folder, len(batches))
    _barrier(world)
    if folder is not None and rank == 0:
        _tidy(folder)
    return record


def _check_arguments(
    prompts: Sequence[Prompt],
    quantized: nn.Module,
    reference: nn.Module,
    trajectory: str,
    correction: Correction | None,
    batch_size: int,
) -> None:
    if isinstance(prompts, str) or len(prompts) == 0:
        raise CalibrationError(
            f"expected a non-empty list of prompts, got {prompts!r}; a few dozen are plenty."
        )
    if batch_size < 1:
        raise CalibrationError(f"batch_size must be at least 1, got {batch_size}.")
    if trajectory not in TRAJECTORIES:
        raise CalibrationError(f"trajectory must be one of {TRAJECTORIES}, got {trajectory!r}.")
    if (trajectory == "corrected") != (correction is not None):
        raise CalibrationError(
            f"trajectory={trajectory!r} with correction={correction!r}: pass a correction for, and "
            f"only for, trajectory='corrected'."
        )
    if quantized is reference:
        raise CalibrationError(
            "quantized is the pipeline's own denoiser object; pass the quantized copy, and keep the "
            "full-precision one in the pipeline."
        )


def _calibrate_batch(
    pipeline: Any,
    quantized: nn.Module,
    batch: tuple[list[Prompt], int],
    settings: _Settings,
    twins: tuple[str, str],
    frame: Frame | None,
) -> Record:
    reference = denoiser_of(pipeline)
    leader, follower = reference, quantized
    if settings.trajectory != "full-precision":
        leader, follower = quantized, reference
    tape = Tape()
    interceptors: list[Interceptor] = [Recorder(tape)]
    if settings.correction is not None:
        corrector = Corrector(settings.correction, pipeline, layout=settings.layout)
        interceptors.insert(0, corrector)
    _run(pipeline, leader, follower, batch, settings, interceptors)
    _refuse_non_finite(tape.outputs, leader is reference)  # or the replay would seem to differ
    replay = Replayer(tape)
    _run(pipeline, follower, leader, batch, settings, [replay])
    _refuse_non_finite(replay.outputs, follower is reference)
    if len(replay.outputs) != len(tape.outputs):
        raise CalibrationError(
            f"the first run took {len(tape.outputs)} steps, the second {len(replay.outputs)}; the "
            f"pipeline is not deterministic under replay."
        )
    first, second = _stacked(tape.outputs, batch), _stacked(replay.outputs, batch)
    e, q = (first, second) if settings.trajectory == "full-precision" else (second, first)
    return _statistics(pipeline, tape, e, q, quantized, batch, settings, twins, frame)


def _run(
    pipeline: Any,
    active: nn.Module,
    idle: nn.Module,
    batch: tuple[list[Prompt], int],
    settings: _Settings,
    interceptors: list[Interceptor],
) -> None:
    prompts, seed = batch
    home = next(iter(active.parameters()), torch.zeros(0)).device
    if not settings.side_by_side:
        home = torch.device(getattr(pipeline, "_execution_device", home))
        idle.to("cpu")
        active.to(home)
    install(pipeline.scheduler, *interceptors)
    with denoiser_swapped(pipeline, active):
        run_pipeline(
            pipeline,
            prompts,
            range(seed, seed + len(prompts)),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            output_type="latent",
            call=settings.call,
        )


def _refuse_non_finite(outputs: list[Tensor], is_reference: bool) -> None:
    for k, output in enumerate(outputs):
        if not torch.isfinite(output).all():
            raise CalibrationError(
                f"the {'full-precision' if is_reference else 'quantized'} denoiser gave a non-finite "
                f"output (NaN or infinity) at step {k}; float16 often overflows where bfloat16 does "
                f"not."
            )


def _stacked(tensors: list[Tensor], batch: tuple[list[Prompt], int]) -> Tensor:
    """(prompts, steps, ...) in float32 or wider.

    Class-conditional guidance (DiT) hands the scheduler every sample twice; the halves are equal.
    """
    stacked = torch.stack(tensors, 1)
    n = len(batch[0])
    if len(stacked) == 2 * n and torch.equal(stacked[:n], stacked[n:]):
        stacked = stacked[:n]
    if len(stacked) != n:
        raise CalibrationError(
            f"the scheduler was handed {len(stacked)} samples for {n} prompts; calibrate with "
            f"num_images_per_prompt=1."
        )
    return stacked.cpu()


def _statistics(
    pipeline: Any,
    tape: Tape,
    e: Tensor,
    q: Tensor,
    quantized: nn.Module,
    batch: tuple[list[Prompt], int],
    settings: _Settings,
    twins: tuple[str, str],
    frame: Frame | None,
) -> Record:
    x = _stacked(tape.samples, batch)
    layout = settings.layout or find_layout(pipeline, x[:, 0])
    d = q.double() - e.double()
    if not d.any():
        raise CalibrationError(
            "the quantized denoiser gives exactly the full-precision outputs: nothing was quantized."
        )

    def channels(t: Tensor) -> Tensor:
        flat = layout.as_channels(t.flatten(0, 1))
        return flat.reshape(*t.shape[:2], *flat.shape[1:])

    e_c, d_c = channels(e), channels(d)
    moments = PairedMoments.of(e_c, d_c, channels(x))
    if frame is None:
        frame = _frame_of(moments)
    spectrum = None
    if layout.is_spatial:
        spectrum = fixed_point_spectrum(radial_spectrum(d), frame)
    assert tape.law is not None
    prompts, seed = batch
    return Record(
        provenance=_provenance(pipeline, quantized, tape.law, x, layout, settings, twins),
        prompt_keys=torch.stack([prompt_key(str(p)) for p in prompts]),
        seeds=torch.arange(seed, seed + len(prompts)),
        moments=moments,
        gram=step_gram(d_c),
        frame=frame,
        spectrum=spectrum,
        histogram=ErrorHistogram.of(frame, e_c, d_c) if settings.histograms else None,
        noise_floor=torch.zeros(x.shape[1], dtype=torch.float64),
        law=tape.law,
    )


def _frame_of(moments: PairedMoments) -> Frame:
    pooled = moments.pooled(0)
    n = pooled.count.double()
    return Frame(
        mean_d=pooled.mean_d,
        std_d=(pooled.s(0, 2) / n).sqrt(),
        mean_e=pooled.mean_e,
        std_e=(pooled.s(2, 0) / n).sqrt(),
    )


def _provenance(
    pipeline: Any,
    quantized: nn.Module,
    law: StepLaw,
    x: Tensor,
    layout: LatentLayout,
    settings: _Settings,
    twins: tuple[str, str],
) -> Provenance:
    scheduler = pipeline.scheduler
    return Provenance(
        pipeline_class=type(pipeline).__name__,
        denoiser=denoiser_name(pipeline),
        reference=twins[0],
        quantized=twins[1],
        quantizer=quantizer_text(quantized),
        scheduler_class=type(scheduler).__name__,
        scheduler_config=_config_of(scheduler),
        prediction=law.prediction,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        timesteps=law.timesteps.tolist(),
        alpha=law.alpha[:-1].tolist(),
        sigma=law.sigma[:-1].tolist(),
        call=json_safe(settings.call),
        trajectory=settings.trajectory,
        layout=layout.to_dict(),
        latent_shape=list(x.shape[2:]),
        dtype=str(x.dtype).removeprefix("torch."),
        elements=x[0, 0].numel() // layout.channels,
        versions={
            name: importlib.metadata.version(name)
            for name in ("evenkeel", "diffusers", "torch", "transformers")
        },
    )


def _config_of(scheduler: Any) -> dict[str, Any]:
    return json_safe({k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")})


def json_safe(values: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON reads it back; what JSON cannot hold becomes its type's name."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=lambda v: type(v).__name__))
    return plain


def _with_noise_floor(
    part: Record,
    pipeline: Any,
    batch: tuple[list[Prompt], int],
    settings: _Settings,
    limit: float,
) -> Record:
    """Run one prompt twice with the reference: what differs is not quantization."""
    one = (batch[0][:1], batch[1])
    reference = denoiser_of(pipeline)
    tape = Tape()
    _run(
        pipeline, reference, reference, one, replace(settings, side_by_side=True), [Recorder(tape)]
    )
    replay = Replayer(tape)
    _run(pipeline, reference, reference, one, replace(settings, side_by_side=True), [replay])
    pairs = zip(tape.outputs, replay.outputs, strict=True)
    floor = torch.stack([(a.double() - b.double()).pow(2).mean().cpu() for a, b in pairs])
    error = part.gram.double().diagonal(dim1=1, dim2=2).mean(0)
    if (floor > limit * error).any():
        step = int((floor / error.clamp_min(1e-300)).argmax())
        raise CalibrationError(
            f"two runs of the full-precision denoiser on the same input differ: at step {step} by "
            f"{floor[step]:.3g} (mean square), against a quantization error of {error[step]:.3g}. "
            f"Non-deterministic kernels or dropout; raise noise_floor_limit to accept it."
        )
    return replace(part, noise_floor=floor)


def _first_frame(parts: list[Record | None], folder: Path | None) -> Frame:
    first = parts[0]
    if first is None:
        assert folder is not None
        first = Record.load(folder / "part-00000.safetensors")
    return first.frame


def _merged(parts: list[Record | None], folder: Path | None, n: int) -> Record:
    """All parts as one record, rows in canonical order."""
    record: Record | None = None
    for index in range(n):
        part = parts[index]
        if part is None:
            assert folder is not None
            part = Record.load(folder / f"part-{index:05d}.safetensors")
        record = part if record is None else record.merge(part)
    assert record is not None
    order = canonical_order(record.prompt_keys, record.seeds)
    assert torch.equal(order, torch.arange(len(order)))
    return record


def _part_folder(resume: str | os.PathLike[str] | None, world: int) -> Path | None:
    if resume is None and world > 1:
        raise CalibrationError(
            "several processes exchange finished batches through a folder: pass resume=<folder>, the "
            "same for all of them."
        )
    return None if resume is None else Path(resume)


def _tidy(folder: Path) -> None:
    """Remove what calibration wrote, and the folder itself unless it holds something else."""
    for pattern in ("part-*.safetensors*", "calibration.json*"):
        for path in folder.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _claim(
    folder: Path,
    pipeline: Any,
    settings: _Settings,
    batches: list[tuple[list[Prompt], int]],
    twins: tuple[str, str],
) -> None:
    """Mark the folder as this calibration's, or refuse one that belongs to another."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = json.dumps(
        {
            "pipeline": type(pipeline).__name__,
            "scheduler": [
                plain_class(pipeline.scheduler).__name__,
                _config_of(pipeline.scheduler),
            ],
            "correction": hashlib.sha256(repr(settings.correction).encode()).hexdigest(),
            "layout": None if settings.layout is None else settings.layout.to_dict(),
            "steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "trajectory": settings.trajectory,
            "call": json_safe(settings.call),
            "histograms": settings.histograms,
            "twins": twins,
            "prompts": [
                [b[1], *(bytes(prompt_key(str(p)).tolist()).hex() for p in b[0])] for b in batches
            ],
        },
        sort_keys=True,
    )
    path = folder / "calibration.json"
    if path.exists() and path.read_text() != claim:
        raise CalibrationError(
            f"{folder} holds the finished batches of another calibration (other models, prompts or "
            f"settings). Remove it, or pass another folder."
        )
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(claim)
    os.replace(partial, path)


def _process() -> tuple[int, int]:
    """Rank and number of processes under torchrun; joins the group if the launcher set one up."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available():
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()
