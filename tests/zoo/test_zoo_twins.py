"""Every twin of the zoo: plain, small, and everything works on it."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import evenkeel
from evenkeel import zoo
from evenkeel.comparing.generation import Arm, generate
from evenkeel.corrections import QDrift
from evenkeel.errors import EvenkeelError
from evenkeel.hosts.pipeline.pipelines import denoiser_name, denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.zoo.folders import bytes_in, denoiser_weights
from evenkeel.zoo.parts import signed
from evenkeel.zoo.pictures import KINDS

STEPS, PROMPTS = 3, 2


def asked(twin):
    return {
        "num_inference_steps": STEPS,
        "guidance_scale": twin.guidance_scale,
        "prompts": KINDS[twin.pictures].prompts(PROMPTS, 0),
    }


def samples(pipeline, twin, denoiser=None):
    """(PROMPTS, 3, size, size) uint8."""
    arm = Arm("samples", denoiser or denoiser_of(pipeline))
    run = Run(pipeline, **asked(twin), seed=5, batch_size=PROMPTS)
    images, _ = generate(run, arm)
    return images


def shape_of(twin):
    size = KINDS[twin.pictures].size
    return PROMPTS, 3, size, size


def test_the_package_carries_the_embedded_twin_alone():
    # The wheel holds src/evenkeel and nothing else; all other twins are in the checkout's zoo/.
    weights = Path(zoo.__file__).parent / "weights"
    assert [p.name for p in weights.iterdir()] == ["pixart-sigma"]
    packages = (weights.parents[3] / "pyproject.toml").read_text()
    assert 'packages = ["src/evenkeel"]' in packages


def test_all_twins_together_are_small():
    assert sum(bytes_in(zoo.path_of(name)) for name in zoo.TWINS) <= 120e6


@pytest.fixture(params=list(zoo.TWINS))
def twin(request):
    return zoo.twin(request.param)


def test_a_twin_is_a_plain_small_diffusers_folder(twin):
    folder = zoo.path_of(twin.name)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipeline).__name__ == twin.pipeline
    assert bytes_in(folder) <= 16e6
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    assert signed(folder) == {"name": twin.name, "pictures": twin.pictures}


def test_the_denoiser_has_1_to_3_million_parameters(twin):
    denoiser = denoiser_of(zoo.load(twin.name))
    # DiT's table of 1,001 classes is written into its pipeline, once in every block; ten are used.
    tables = sum(p.numel() for n, p in denoiser.named_parameters() if "embedding_table" in n)
    parameters = sum(p.numel() for p in denoiser.parameters())
    assert 1e6 <= parameters - tables <= 3e6
    # Buffers are stored as well, but are next to nothing.
    assert parameters <= denoiser_weights(zoo.path_of(twin.name)) <= 1.01 * parameters


def test_loading_a_twin_says_nothing(twin, caplog):
    remarks = logging.getLogger("diffusers.pipelines.pipeline_utils")
    remarks.addHandler(caplog.handler)
    try:
        zoo.load(twin.name)
    finally:
        remarks.removeHandler(caplog.handler)
    assert not caplog.records


def test_networks_are_loaded_in_the_precision_asked_for(twin):
    for asked_for in (None, torch.bfloat16):
        pipeline = zoo.load(twin.name, dtype=asked_for)
        networks = [c for c in pipeline.components.values() if isinstance(c, torch.nn.Module)]
        found = {p.dtype for network in networks for p in network.parameters()}
        assert found == {asked_for or torch.float32}
        assert not any(network.training for network in networks)


def test_a_twin_samples_in_bfloat16_nearly_what_it_samples_in_single_precision(twin):
    full = samples(zoo.load(twin.name), twin).float()
    half = samples(zoo.load(twin.name, dtype=torch.bfloat16), twin).float()
    # Three steps; a coarser number format moves grey levels, it does not draw another picture.
    assert full.shape == shape_of(twin)
    assert (half - full).square().mean().sqrt() < 0.5 * full.std()


SAMPLERS = [(t.name, s) for t in zoo.TWINS.values() for s in t.schedulers]


@pytest.mark.parametrize(("name", "scheduler"), SAMPLERS, ids=["-".join(s) for s in SAMPLERS])
def test_every_scheduler_of_the_original_runs_and_has_a_law(name, scheduler):
    twin = zoo.twin(name)
    pipeline = zoo.load(name, scheduler)
    assert type(pipeline.scheduler).__name__ == twin.schedulers[scheduler].scheduler
    first = samples(pipeline, twin)
    assert first.float().std() > 1
    assert torch.equal(samples(pipeline, twin), first)
    assert Run(pipeline, **asked(twin)).law().steps >= STEPS


def test_the_first_scheduler_is_the_pipelines_own(twin):
    own = zoo.load(twin.name)
    named = zoo.load(twin.name, next(iter(twin.schedulers)))
    assert type(own.scheduler) is type(named.scheduler)
    assert torch.equal(samples(own, twin), samples(named, twin))


def test_a_scheduler_that_the_original_has_not_is_refused(twin):
    with pytest.raises(EvenkeelError, match=next(iter(twin.schedulers))):
        zoo.load(twin.name, "nonsense")


def test_calibrate_apply_sample_remove(twin):
    pipeline = zoo.load(twin.name)
    full = samples(pipeline, twin)
    quantized, report = quantize_module(denoiser_of(pipeline), QuantizerSpec.parse("w4a4"))
    assert report.quantized
    record = evenkeel.calibrate(pipeline, quantized=quantized, progress=False, **asked(twin))
    readout = evenkeel.fit_readout(pipeline, quantized=quantized, progress=False, **asked(twin))
    plain = samples(pipeline, twin, quantized)
    assert not torch.equal(plain, full)
    setattr(pipeline, denoiser_name(pipeline), quantized)
    for correction in (QDrift(record.evidence), readout):
        evenkeel.apply(pipeline, correction, guidance_scale=twin.guidance_scale)
        corrected = samples(pipeline, twin)
        assert corrected.shape == plain.shape
        evenkeel.remove(pipeline)
        assert torch.equal(samples(pipeline, twin), plain)


def test_compare_measures_what_rounding_does(twin):
    pipeline = zoo.load(twin.name)
    full = denoiser_of(pipeline)
    arms = [Arm("full-precision", full)]
    for spec in ("w8a16", "w3a16"):
        arms.append(Arm(spec, quantize_module(full, QuantizerSpec.parse(spec))[0]))
    found = evenkeel.compare(pipeline, arms, progress=False, **asked(twin))
    coarse, fine = found["w3a16"].measures["psnr"].value, found["w8a16"].measures["psnr"].value
    assert 5 < coarse < fine - 6  # five bits are 30 dB; networks this small give back some of them
    assert found.images["w8a16"].shape == shape_of(twin)
