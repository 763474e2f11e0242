"""Records built by hand: five prompts at three steps and two channels, with and without closed loop."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.corrections import TAC, StepbaQ
from evenkeel.corrections.reconstruction import Reconstruction
from evenkeel.record import (
    Provenance,
    Record,
    fixed_point_spectrum,
    prompt_key,
)
from evenkeel.record.closed_loop import ClosedLoop
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import step_gram
from evenkeel.statistics.histogram import ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.residual import ResidualHistogram

STEPS, CHANNELS, ELEMENTS = 3, 2, 16
LAW = [f.name for f in fields(StepLaw) if f.name not in ("sampler", "prediction")]
FRAME = Frame(*(torch.full((STEPS, CHANNELS), v, dtype=torch.float64) for v in (0, 1, 0, 1, 0, 1)))


def provenance(steps: int = STEPS, elements: int = ELEMENTS, **changes: Any) -> Provenance:
    made = Provenance(
        pipeline_class="SomePipeline",
        denoiser="unet",
        reference="0" * 32,
        quantized="1" * 32,
        quantizer="w4a16",
        scheduler_class="EulerDiscreteScheduler",
        scheduler_config={"beta_start": 0.00085, "trained_betas": None, "steps_offset": 1},
        prediction="epsilon",
        num_inference_steps=steps,
        guidance_scale=5.0,
        timesteps=[1000.0 / (k + 1) for k in range(steps)],
        alpha=[1.0] * steps,
        sigma=[14.6 / (k + 1) for k in range(steps)],
        call={"height": 32},
        trajectory="full-precision",
        layout={"ndim": 4, "axis": 1, "channels": CHANNELS, "patch": 1},
        latent_shape=[CHANNELS, 4, 4],
        dtype="float32",
        elements=elements,
        versions={"torch": "2"},
    )
    return replace(made, **changes)


def part(index: int) -> Record:
    """What one batch of one prompt leaves; prompt and seed depend on the index."""
    generator = torch.Generator().manual_seed(index)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    e, d, x = (draw(1, STEPS, CHANNELS, ELEMENTS) for _ in range(3))
    return Record(
        provenance=provenance(),
        prompt_keys=prompt_key(f"prompt {index}")[None],
        seeds=torch.tensor([index]),
        moments=PairedMoments.of(e, d, x),
        gram=step_gram(d),
        frame=FRAME,
        spectrum=fixed_point_spectrum(draw(1, STEPS, 2).abs(), FRAME),
        histogram=ErrorHistogram.of(FRAME, e, d),
        noise_floor=draw(STEPS).abs(),
        law=law(),
        residual=ResidualHistogram.of(FRAME, e, d),
    )


def law(steps: int = STEPS) -> StepLaw:
    line, square = np.linspace(1, 2, steps + 1), np.tril(np.ones((steps, steps)))
    return StepLaw(
        "EulerDiscreteScheduler",
        "epsilon",
        timesteps=line[1:],
        sample_weights=square,
        output_weights=-square,
        noise_weights=line[:-1],
        alpha=line,
        sigma=line[::-1].copy(),
        sigma_down=line[1:],
    )


def merged(parts: list[Record]) -> Record:
    return functools.reduce(Record.merge, parts)


WHOLE = merged([part(i) for i in range(5)])


def tensors_of(record: Record) -> dict[str, Tensor]:
    assert record.spectrum is not None and record.histogram is not None
    assert record.residual is not None
    return {
        **{f.name: getattr(record.moments, f.name) for f in fields(PairedMoments)},
        **{f"frame.{f.name}": getattr(record.frame, f.name) for f in fields(Frame)},
        **{n: getattr(record, n) for n in ("prompt_keys", "seeds", "gram", "noise_floor")},
        "spectrum": record.spectrum,
        "histogram": record.histogram.sums,
        "residual": record.residual.counts,
        **{n: torch.from_numpy(getattr(record.law, n)) for n in LAW},
    }


def same(a: Record, b: Record) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    assert a.law is not None and b.law is not None
    names = a.law.sampler == b.law.sampler and a.law.prediction == b.law.prediction
    equal = names and all(
        torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype for n in left
    )
    return equal and a.provenance == b.provenance


def closed_loop() -> ClosedLoop:
    levels = WHOLE.provenance.levels
    source = replace(WHOLE.provenance, trajectory="corrected")
    tac = TAC(
        *levels,
        torch.full((STEPS, CHANNELS), 1.1, dtype=torch.float64),
        torch.randn(STEPS, CHANNELS, 2, 2),
        reconstruction=Reconstruction(),
        source=source,
    )
    stepbaq = StepbaQ(
        *levels,
        torch.randn(STEPS, CHANNELS, 1, 1),
        torch.rand(STEPS),
        np.linspace(0.01, 9.0, 20),
        relabel_time=False,
        source=source,
    )
    return ClosedLoop(
        {"tac": tac, "tac-ibc": replace(tac, gain=None, reconstruction=None), "stepbaq": stepbaq}
    )
