"""Compare: same prompts, same noise, equal numbers, images kept and reused."""

import math

import pytest
import torch
from tiny_pipelines import ALL

import evenkeel
from evenkeel.comparing.comparison import Arm, Comparison, compare, standard_arms
from evenkeel.corrections import Identity, QDrift
from evenkeel.errors import EvenkeelError, MetricError, StorageError
from evenkeel.quantizers import QuantizerSpec, quantize_module


class MeanColour:
    """A tiny evaluator: features are channel means and spreads, every image matches its prompt."""

    def features(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)

    def matches(self, images, prompts):
        return torch.ones(len(images), 2)


@pytest.fixture(scope="module")
def tiny():
    return ALL["sd3"]()


@pytest.fixture(scope="module")
def quantized(tiny):
    return quantize_module(tiny.model, QuantizerSpec.parse("w4a8-g8"))[0]


def run(tiny, quantized, **options) -> Comparison:
    settings = {
        "prompts": [f"prompt {i}" for i in range(6)],
        "num_inference_steps": 3,
        "guidance_scale": tiny.guidance_scale,
        "batch_size": 4,
        "call": {k: v for k, v in tiny.call.items() if k != "output_type"},
        "evaluator": MeanColour(),
        "progress": False,
    }
    return compare(
        tiny.pipe, standard_arms(tiny.pipe, quantized, [Identity()]), **{**settings, **options}
    )


def test_identity_arm_equals_the_quantized_arm(tiny, quantized):
    found = run(tiny, quantized)
    assert torch.equal(found.images["identity"], found.images["quantized"])
    assert not torch.equal(found.images["quantized"], found.images["full-precision"])
    assert found["identity"].difference_to_quantized["ssim"].value == 0
    assert found["full-precision"].measures["frechet_full_precision"].value == 0
    assert found["quantized"].measures["frechet_full_precision"].value > 0
    assert found["quantized"].measures["alignment"].value == 1
    assert math.isinf(found["full-precision"].measures["psnr"].value)
    assert found["full-precision"].as_dict()["psnr"]["value"] is None
    assert math.isnan(found["quantized"].measures["frechet_reference"].value)


def test_batch_size_does_not_change_the_noise(tiny, quantized):
    a, b = run(tiny, quantized, batch_size=6), run(tiny, quantized, batch_size=3)
    difference = (a.images["quantized"].int() - b.images["quantized"].int()).abs()
    assert difference.max() <= 1  # rounding of another batching, at most one grey level


def test_images_are_kept_and_reused(tiny, quantized, tmp_path):
    first = run(tiny, quantized, folder=tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    times = [f.stat().st_mtime_ns for f in files]
    again = run(tiny, quantized, folder=tmp_path)
    assert len(files) == 6
    assert [f.stat().st_mtime_ns for f in files] == times
    assert torch.equal(first.images["quantized"], again.images["quantized"])
    with pytest.raises(StorageError, match="other prompts or settings"):
        run(tiny, quantized, folder=tmp_path, seed=5)
    other = quantize_module(tiny.model, QuantizerSpec.parse("w8a8-g8"))[0]
    with pytest.raises(StorageError, match="other prompts or settings"):
        run(tiny, other, folder=tmp_path)


def test_more_images_take_those_that_are_kept_and_make_the_others(tiny, quantized, tmp_path):
    prompts = [f"prompt {i}" for i in range(16)]
    asked = {"batch_size": 4, "num_inference_steps": 2}
    run(tiny, quantized, prompts=prompts[:8], folder=tmp_path / "grown", **asked)
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "grown").rglob("*.safetensors")}
    calls = []
    hook = quantized.register_forward_pre_hook(lambda *_: calls.append(1))
    grown = run(tiny, quantized, prompts=prompts, folder=tmp_path / "grown", **asked)
    made, calls[:] = len(calls), []
    whole = run(tiny, quantized, prompts=prompts, folder=tmp_path / "whole", **asked)
    hook.remove()
    assert 2 * made == len(calls)
    assert kept == {f: f.stat().st_mtime_ns for f in kept}
    assert all(torch.equal(grown.images[name], whole.images[name]) for name in whole.images)


def test_images_that_were_changed_on_disk_are_refused(tiny, quantized, tmp_path):
    run(tiny, quantized, folder=tmp_path)
    path = max(tmp_path.rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match="changed after it was written"):
        run(tiny, quantized, folder=tmp_path)


def test_the_pipeline_is_as_before(tiny, quantized):
    denoiser, scheduler = tiny.model, type(tiny.pipe.scheduler)
    run(tiny, quantized)
    assert tiny.pipe.transformer is denoiser
    assert type(tiny.pipe.scheduler) is scheduler


def test_unequal_numbers_are_refused(tiny, quantized):
    with pytest.raises(MetricError, match="as many reference images"):
        run(tiny, quantized, reference_images=torch.zeros(5, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("names", [["one"], ["same", "same"]])
def test_arms_must_differ(tiny, quantized, names):
    with pytest.raises(MetricError, match="different names"):
        compare(tiny.pipe, [Arm(n, quantized) for n in names], prompts=["a"], num_inference_steps=2)


def test_a_correction_for_another_denoiser_is_refused_before_anything_is_generated(
    tiny, quantized, tmp_path
):
    prompts = ["one", "two"]
    settings = {"num_inference_steps": 3, "guidance_scale": tiny.guidance_scale}
    record = evenkeel.calibrate(
        tiny.pipe,
        quantized=quantized,
        prompts=prompts,
        call={k: v for k, v in tiny.call.items() if k != "output_type"},
        progress=False,
        **settings,
    )
    other, _ = quantize_module(tiny.model, QuantizerSpec.parse("w3a8-g8"))
    arms = standard_arms(tiny.pipe, other, [QDrift(record.evidence)])
    with pytest.raises(EvenkeelError, match="not the one the record was made for"):
        compare(tiny.pipe, arms, prompts=prompts, folder=tmp_path, progress=False, **settings)
    assert not list(tmp_path.iterdir())
