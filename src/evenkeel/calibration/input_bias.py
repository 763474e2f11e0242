"""Fit TAC-Diffusion's input bias in closed loop: two runs of all prompts in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.calibration.provenance import provenance_of
from evenkeel.calibration.settings import Settings, check_request
from evenkeel.corrections.input_bias import InputBias
from evenkeel.corrections.plan import Correction
from evenkeel.hosts.correcting import heads_attached, interceptors_of
from evenkeel.hosts.interception import Interceptor, install, installed, uninstall
from evenkeel.hosts.layouts import find_layout
from evenkeel.hosts.pipelines import (
    Prompt,
    denoiser_of,
    denoiser_swapped,
    quiet,
    run_pipeline,
)
from evenkeel.hosts.tape import Recorder, Tape


class _Subtract(Interceptor):
    """Measures the mean state error after each step and takes it off at once."""

    def __init__(self, tape: Tape, axes: tuple[int, ...]) -> None:
        self.tape, self.axes = tape, axes
        self.biases: list[Tensor] = []

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        target = self.tape.results[len(self.biases)]
        bias = (result.double() - target.double()).mean(self.axes, keepdim=True).float()
        self.biases.append(bias[0].cpu())
        return result - bias.to(result)


def fit_input_bias(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    per_channel: bool = False,
    correction: Correction | None = None,
    call: dict[str, Any] | None = None,
) -> InputBias:
    """Mean state error of the quantized run against the full-precision run of the same noise.

    All prompts run as one batch, because each step's mean is needed before the next.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: the quantized denoiser.
        prompts: texts, or class labels; published with 64 to 256.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline.
        seed: of the first prompt's initial noise.
        per_channel: one value per channel instead of one per element.
        correction: applied below it, such as a ``Readout``.
        call: further arguments of the pipeline call.

    Raises:
        CalibrationError: no prompts, or identical twins.

    """
    check_request(pipeline, quantized, prompts)
    settings = Settings.of(
        pipeline, quantized, num_inference_steps, guidance_scale, call, correction=correction
    )

    def run(denoiser: nn.Module, interceptors: list[Interceptor]) -> None:
        install(pipeline.scheduler, *interceptors)
        with denoiser_swapped(pipeline, denoiser), heads_attached(interceptors):
            run_pipeline(
                pipeline,
                prompts,
                range(seed, seed + len(prompts)),
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                output_type="latent",
                call=settings.call,
            )

    before = installed(pipeline.scheduler)
    tape = Tape()
    try:
        with quiet(pipeline):
            run(denoiser_of(pipeline), [Recorder(tape)])
            layout = find_layout(pipeline, tape.samples[0])
            every = tuple(a for a in range(layout.ndim) if a != layout.axis)
            subtract = _Subtract(tape, every if per_channel else (0,))
            below = [] if correction is None else interceptors_of(correction, pipeline, quantized)
            run(quantized, [*below, subtract])
    finally:
        uninstall(pipeline.scheduler)
        if before:
            install(pipeline.scheduler, *before)
    assert tape.law is not None
    made_for = provenance_of(pipeline, tape.law, tape.samples[0][:, None], layout, settings)
    return InputBias(*made_for.levels, torch.stack(subtract.biases), source=made_for)
