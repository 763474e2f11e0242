"""One batch of prompts: two runs through the same states, and the moments of what they gave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError
from evenkeel.fitting.provenance import provenance_of
from evenkeel.fitting.request import Settings
from evenkeel.hosts.actuators.correcting import heads_attached, interceptors_of
from evenkeel.hosts.pipeline.layouts import find_layout
from evenkeel.hosts.pipeline.pipelines import Prompt, denoiser_of, denoiser_swapped, run_pipeline
from evenkeel.hosts.scheduler.interception import Interceptor, install
from evenkeel.hosts.scheduler.tape import Recorder, Replayer, Tape
from evenkeel.record import Record, fixed_point_spectrum, prompt_key
from evenkeel.statistics.error_structure import radial_spectrum, step_gram
from evenkeel.statistics.histogram import ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.residual import ResidualHistogram
from evenkeel.statistics.second_order import SecondOrder


def calibrate_batch(
    pipeline: Any,
    quantized: nn.Module,
    batch: tuple[list[Prompt], int],
    settings: Settings,
    frame: Frame | None,
) -> Record:
    """Lead one denoiser along the trajectory, the other through its states; the batch's record."""
    reference = denoiser_of(pipeline)
    leader, follower = reference, quantized
    if settings.trajectory != "full-precision":
        leader, follower = quantized, reference
    tape = Tape()
    interceptors: list[Interceptor] = [Recorder(tape)]
    if settings.correction is not None:
        parts = interceptors_of(settings.correction, pipeline, leader, layout=settings.layout)
        interceptors = [*parts, *interceptors]
    with heads_attached(interceptors):
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
    return _statistics(pipeline, tape, (e, q), batch, settings, frame)


def with_noise_floor(
    part: Record,
    pipeline: Any,
    batch: tuple[list[Prompt], int],
    settings: Settings,
    limit: float,
) -> Record:
    """Run one prompt twice with the reference: what differs is not quantization."""
    one = (batch[0][:1], batch[1])
    reference = denoiser_of(pipeline)
    tape = Tape()
    alone = replace(settings, side_by_side=True)  # one denoiser: nothing to move away
    _run(pipeline, reference, reference, one, alone, [Recorder(tape)])
    replay = Replayer(tape)
    _run(pipeline, reference, reference, one, alone, [replay])
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


def _run(
    pipeline: Any,
    active: nn.Module,
    idle: nn.Module,
    batch: tuple[list[Prompt], int],
    settings: Settings,
    interceptors: list[Interceptor],
) -> None:
    prompts, seed = batch
    if not settings.side_by_side:
        home = next(iter(active.parameters()), torch.zeros(0)).device
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
    outputs: tuple[Tensor, Tensor],
    batch: tuple[list[Prompt], int],
    settings: Settings,
    frame: Frame | None,
) -> Record:
    e, q = outputs
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
        provenance=provenance_of(pipeline, tape.law, x, layout, settings),
        prompt_keys=torch.stack([prompt_key(str(p)) for p in prompts]),
        seeds=torch.arange(seed, seed + len(prompts)),
        moments=moments,
        gram=step_gram(d_c),
        frame=frame,
        spectrum=spectrum,
        histogram=ErrorHistogram.of(frame, e_c, d_c) if settings.histograms else None,
        noise_floor=torch.zeros(x.shape[1], dtype=torch.float64),
        law=tape.law,
        residual=ResidualHistogram.of(frame, e_c, d_c) if settings.histograms else None,
    )


def _frame_of(moments: PairedMoments) -> Frame:
    pooled = moments.pooled(0)
    second = SecondOrder.of(pooled)
    return Frame(
        mean_d=pooled.mean_d,
        std_d=second.dd.sqrt(),
        mean_e=pooled.mean_e,
        std_e=second.ee.sqrt(),
        gain=second.gain,
        std_r=second.residual.sqrt(),
    )
