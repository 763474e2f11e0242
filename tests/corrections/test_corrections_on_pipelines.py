"""Every correction on every class of real pipeline: calibrated, applied, sampled, taken off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import ALL

import evenkeel
from evenkeel.corrections import applicable
from evenkeel.corrections.catalogue import ALL as CORRECTIONS
from evenkeel.corrections.catalogue import FILE, root_of
from evenkeel.hosts.pipeline.pipelines import denoiser_of, denoiser_swapped, run_pipeline
from evenkeel.quantizers import QuantizerSpec, quantize_module

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]


@pytest.mark.parametrize("name", ALL)
def test_all_corrections_run_and_leave_no_trace(name: str) -> None:
    tiny = ALL[name]()
    pipe, reference = tiny.pipe, denoiser_of(tiny.pipe)
    quantized = quantize_module(reference, QuantizerSpec.parse("w3a4-g16-r4"))[0]
    prompts = list(tiny.prompts[:2])
    asked: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": tiny.guidance_scale}
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    record = evenkeel.calibrate(
        pipe,
        quantized=quantized,
        prompts=prompts,
        batch_size=2,
        closed_loop=True,
        call=call,
        progress=False,
        **asked,
    )
    assert record.law is not None
    made, reasons = record.corrections()
    found, others = applicable(made, record.law)
    assert found.keys() | reasons.keys() | others.keys() == {
        n for n in CORRECTIONS if root_of(n) != FILE
    }
    with denoiser_swapped(pipe, quantized):

        def sample() -> torch.Tensor:
            return torch.as_tensor(
                run_pipeline(pipe, prompts, [5, 6], output_type="latent", call=call, **asked)
            )

        plain = sample()
        for correction in found.values():
            with evenkeel.applied(pipe, correction, guidance_scale=tiny.guidance_scale):
                corrected = sample()
            assert bool(torch.isfinite(corrected).all()), correction.name
            assert not torch.equal(corrected, plain), correction.name
        assert torch.equal(sample(), plain)
    assert len(found) >= 8
