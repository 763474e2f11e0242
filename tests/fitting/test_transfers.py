"""Calibration and fits on a device that counts what leaves it: one transfer a step, and no float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fake_device import DEVICE, Elsewhere, There, Transfers, sent
from tiny_pipelines import ALL, TinyPipeline
from torch import nn

import evenkeel
from evenkeel.hosts.pipeline.pipelines import run_pipeline
from evenkeel.hosts.pipeline.strand import Strand
from evenkeel.quantizers import QuantizerSpec
from evenkeel.quantizers.methods.base import quantize_module

STEPS, MORE = 3, 5


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> tuple[TinyPipeline, nn.Module]:
    """A pipeline and its quantized denoiser, both on the fake device."""
    tiny = ALL["pixart_sigma"]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w4a8-g8"))[0]
    prints = {id(tiny.model): "a" * 64, id(quantized): "b" * 64}
    # Reading the weights once for their fingerprint is no matter of steps.
    monkeypatch.setattr("evenkeel.hosts.run.fingerprint", lambda module: prints[id(module)])
    for component in tiny.pipe.components.values():
        if isinstance(component, nn.Module):
            sent(component)
    run = Strand._run

    def run_there(strand: Strand) -> None:
        with There():
            run(strand)

    monkeypatch.setattr(Strand, "_run", run_there)
    return tiny, sent(quantized)


def plain(tiny: TinyPipeline, steps: int) -> None:
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    run_pipeline(
        tiny.pipe,
        list(tiny.prompts),
        [0, 1],
        num_inference_steps=steps,
        guidance_scale=tiny.guidance_scale,
        output_type="latent",
        call=call,
    )


def counted(work: Callable[[], Any]) -> Transfers:
    with Transfers() as transfers:
        work()
    return transfers


FITS = {
    "calibrate": evenkeel.calibrate,
    "readout": evenkeel.fit_readout,
    "tac": evenkeel.fit_tac,
    "tac, unconditional": partial(evenkeel.fit_tac, reconstruct_unconditional=True),
    "stepbaq": evenkeel.fit_stepbaq,
    "stepbaq, fenced": partial(evenkeel.fit_stepbaq, fence=1.7),
    "refit": evenkeel.refit_branches,
}
#: How often the pipeline runs whole.
RUNS = {"calibrate": 2, "refit": 1}


@pytest.mark.parametrize("name", FITS)
def test_at_most_one_transfer_a_step(name: str, there: tuple[TinyPipeline, nn.Module]) -> None:
    tiny, quantized = there
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}

    def fit(steps: int) -> None:
        FITS[name](
            tiny.pipe,
            quantized=quantized,
            prompts=list(tiny.prompts),
            num_inference_steps=steps,
            guidance_scale=tiny.guidance_scale,
            call=call,
            progress=False,
        )

    few, many = counted(lambda: fit(STEPS)), counted(lambda: fit(MORE))
    # What diffusers brings to the host by itself, per step.
    own = counted(lambda: plain(tiny, MORE)).count - counted(lambda: plain(tiny, STEPS)).count
    runs = RUNS.get(name, 2) + (2 if name == "calibrate" else 0)  # the noise floor takes two more
    added = many.count - few.count - runs * own
    assert added <= MORE - STEPS, many.places - few.places


def test_the_device_counts_and_refuses() -> None:
    x = Elsewhere(torch.arange(6.0))
    with Transfers() as transfers:
        y = (x * 2 + torch.zeros(6, device=DEVICE)).sum()
        assert isinstance(y, Elsewhere) and transfers.count == 0
        assert float(y) == 30 and transfers.count == 1
        assert x.cpu().tolist() == [0, 1, 2, 3, 4, 5] and transfers.count == 2
        assert bool((x[x > 2] > 2).all()) and transfers.count == 4
        with pytest.raises(AssertionError, match="no float64"):
            x.double()
        with pytest.raises(AssertionError, match="mixes"):
            x + torch.ones(6)
