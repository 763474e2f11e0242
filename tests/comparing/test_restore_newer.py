"""``restore`` runs on newer models as diffusers has them, and what it writes has a place in ComfyUI."""

from __future__ import annotations

import math

import pytest
from newer_pipelines import NEWER
from tiny_pipelines import TinyPipeline

import evenkeel
from evenkeel.comparing.restore import Restored, restore
from evenkeel.corrections import RecoveryAdapters
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.record.lora_file import FILE, write_lora
from evenkeel.reports.restored import write_restored


@pytest.fixture(scope="module", params=NEWER)
def run(request: pytest.FixtureRequest) -> tuple[TinyPipeline, Restored]:
    tiny = NEWER[request.param]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a16-g16"))[0]
    found = restore(
        tiny.pipe, quantized=quantized, prompts=list(tiny.prompts), measured_on=[], budget=1.0,
        num_inference_steps=2, guidance_scale=tiny.guidance_scale, readout=False, progress=False,
        call={k: v for k, v in tiny.call.items() if k != "output_type"},
    )  # fmt: skip
    return tiny, found


def test_both_metrics_are_tried_on_every_quantized_layer(run):
    tiny, found = run
    report = found.report
    assert {c.metric for c in report.candidates} == {"output", "local"}
    assert all(0 <= c.predicted < 0.9 for c in report.candidates)
    assert math.isfinite(report.gain) and report.layers >= 10
    assert found.adapters.made_for.pipeline_class == type(tiny.pipe).__name__


def test_what_was_fitted_is_written_for_diffusers_and_comfyui(run, tmp_path):
    tiny, found = run
    if not found.adapters.layers:  # a random network need not have anything to recover
        pytest.skip("held-out pairs confirmed nothing")
    settings = {"pipeline": "zoo:tiny", "quantized": "w3a16-g16", "seed": 0}
    folder = write_restored(tmp_path / "restored", found, settings, [])
    again = evenkeel.load(folder)
    assert isinstance(again, RecoveryAdapters)
    assert (folder / FILE).exists()  # each of them has a LoRA loader
    assert write_lora(again, tmp_path / "comfyui.safetensors", "comfyui").exists()
    tiny.pipe.load_lora_weights(folder)
    wrapped = {n for n, m in tiny.model.named_modules() if hasattr(m, "base_layer")}
    assert wrapped == {adapter.name for adapter in again.layers}
