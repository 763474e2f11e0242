"""Whatever a fit returns can be saved, loaded and run with the arguments it was fitted with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from bound_rigs import IMAGE, image_pipe
from tiny_pipelines import ALL

import evenkeel
from evenkeel.corrections import QDrift
from evenkeel.errors import OutOfRange, RecordError
from evenkeel.fitting import calibrate, fit_readout, fit_stepbaq, fit_tac
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.record import Record
from evenkeel.sampling.step_law import StepLaw

STEPS = 4
CALLS: dict[str, dict[str, Any]] = {
    "denoising_end": {"height": 32, "width": 32, "denoising_end": 0.6},
    "image to image": {"image": IMAGE, "strength": 0.5},
}
TAKEN = {"denoising_end": 2, "image to image": 2}


def asked(kind: str, scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and what every fit is asked for."""
    tiny = ALL["sdxl"]()
    if scheduler is not None:
        tiny.pipe.scheduler = scheduler.from_config(tiny.pipe.scheduler.config, clip_sample=False)
    pipe = image_pipe(tiny.pipe) if kind == "image to image" else tiny.pipe
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g8"))[0].eval()
    return pipe, {
        "quantized": quantized,
        "prompts": ["a cat", "a dog"],
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
        "call": CALLS[kind],
        "progress": False,
    }


def ran(pipe: Any, kind: str, **changes: Any) -> torch.Tensor:
    given = {**CALLS[kind], "num_inference_steps": STEPS, "guidance_scale": 5.0, **changes}
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=generator, output_type="latent", return_dict=False, **given)[0]


@pytest.mark.parametrize("fit", [calibrate, fit_readout, fit_tac, fit_stepbaq])
@pytest.mark.parametrize("kind", CALLS)
def test_a_fit_of_part_of_a_schedule_is_kept_and_runs(kind: str, fit: Any, tmp_path: Path) -> None:
    pipe, given = asked(kind, diffusers.DDIMScheduler if kind == "image to image" else None)
    found: Any = fit(pipe, **given)
    made_for = found.provenance if isinstance(found, Record) else found.made_for
    assert len(made_for.timesteps) == TAKEN[kind]
    pipe.unet = given["quantized"]
    plain = ran(pipe, kind)
    if isinstance(found, Record) or fit is fit_readout:
        path = evenkeel.save(found, tmp_path / "file.safetensors")
        found = evenkeel.load(path)
    if isinstance(found, Record):
        assert found.law is not None and found.law.steps == TAKEN[kind]
        found = QDrift(found.evidence, strength=100.0, min_explained=0.0)
    evenkeel.apply(pipe, found)
    corrected = ran(pipe, kind)
    assert torch.isfinite(corrected).all()
    assert not torch.equal(corrected, plain) or fit is fit_readout
    assert torch.equal(ran(pipe, kind), corrected)
    if kind == "denoising_end" and fit is calibrate:
        with pytest.raises(OutOfRange):
            ran(pipe, kind, denoising_end=None)  # goes on where nothing was measured


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    pipe, given = asked("denoising_end")
    record = calibrate(pipe, **given)
    short = replace(record.provenance, timesteps=record.provenance.timesteps[:1])
    with pytest.raises(RecordError, match="could not be loaded again"):
        replace(record, provenance=short).save(tmp_path / "record.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_law_is_cut_where_a_run_ends() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    whole = evenkeel.probe_scheduler(scheduler)
    part = whole.until(3)
    assert isinstance(part, StepLaw) and part.steps == 3
    assert part.sample_weights.shape == (3, 3) and part.alpha.shape == (4,)
    assert part.sigma.tolist() == whole.sigma[:4].tolist() and whole.until(9) is whole
