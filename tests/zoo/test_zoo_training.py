"""The training command, from data to a saved pipeline, with two steps for every network."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from evenkeel.hosts.pipeline.pipelines import run_pipeline
from evenkeel.zoo import TWINS, twin
from evenkeel.zoo.folders import saved_dtypes
from evenkeel.zoo.handwriting import CENTRED, sample_pictures
from evenkeel.zoo.making import (
    autoencoders,
    evaluators,
    objectives,
    pools,
    text_encoders,
    vector_quantized,
)
from evenkeel.zoo.making import train as training
from evenkeel.zoo.making.autoencoders import build, encode
from evenkeel.zoo.making.loop import Recipe
from evenkeel.zoo.pictures import KINDS

SMALL = {"PICTURES": 100, "PAIRS": 100, "STARTS": 100, "STEPS": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of all runs: shared networks are trained once."""
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture
def _short(monkeypatch):
    """Two steps a network, few pictures."""
    modules = [
        importlib.import_module(f"evenkeel.zoo.making.twins.{t.maker.split(':')[0]}")
        for t in TWINS.values()
    ]
    for module in {*modules, autoencoders, text_encoders, evaluators, vector_quantized}:
        for name, value in vars(module).copy().items():
            if isinstance(value, Recipe):
                monkeypatch.setattr(module, name, shortened(value))
            elif isinstance(value, tuple) and value and isinstance(value[0], Recipe):
                monkeypatch.setattr(module, name, tuple(map(shortened, value)))
            elif isinstance(value, dict) and name == "RECIPES":
                monkeypatch.setattr(module, name, {k: shortened(r) for k, r in value.items()})
            elif name in SMALL and module in [*modules, vector_quantized]:
                monkeypatch.setattr(module, name, SMALL[name])
    monkeypatch.setattr(evaluators, "HELD_OUT_PICTURES", 10)


def shortened(recipe):
    return dataclasses.replace(recipe, steps=2)


# pixart-sigma is left out: training it here would prove nothing that its weights and these do not.
NAMES = [name for name in TWINS if name != "pixart-sigma"]


@pytest.mark.rarely
@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("name", NAMES)
def test_one_command_trains_from_data_to_a_saved_pipeline(name, work):
    out = training.train(name, work)
    pipeline = DiffusionPipeline.from_pretrained(
        out, local_files_only=True, torch_dtype=torch.float32
    )
    about = twin(name)
    assert type(pipeline).__name__ == about.pipeline
    own = next(iter(about.schedulers.values()))
    assert type(pipeline.scheduler).__name__ == own.scheduler
    assert saved_dtypes(out) == ["F16"]
    kind = KINDS[about.pictures]
    prompts = kind.prompts(2, 0)
    made = run_pipeline(
        pipeline,
        prompts,
        [0, 1],
        num_inference_steps=2,
        guidance_scale=about.guidance_scale,
        output_type="np",
        call={},
    )
    images = torch.from_numpy(made).permute(0, 3, 1, 2).float()
    assert images.shape == (2, 3, kind.size, kind.size)
    assert kind.evaluator(out).features(images).isfinite().all()
    told = json.loads((out / "training.json").read_text())
    assert told["command"] == f"python -m evenkeel.zoo.making.train {name}"
    networks = told["networks"]
    assert all(n["recipe"]["steps"] == 2 for n in networks.values())
    assert {f"loss-{n}.jsonl" for n in networks} == {p.name for p in out.glob("loss-*.jsonl")}
    assert set(twin(name).shares) <= set(networks)
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")}
    training.train(name, work)  # nothing left to do, and the same weights
    assert {p: p.read_bytes() for p in out.rglob("*.safetensors")} == before


@pytest.mark.parametrize("name", list(TWINS))
def test_every_twin_can_be_trained(name):
    module, function = twin(name).maker.split(":")
    assert callable(
        getattr(importlib.import_module(f"evenkeel.zoo.making.twins.{module}"), function)
    )


@pytest.mark.parametrize("name", list(autoencoders.RECIPES))
def test_latents_are_scaled_as_the_pipelines_unscale_them(name):
    torch.manual_seed(0)
    vae = build(name).eval()
    vae.register_to_config(scaling_factor=0.5)
    if vae.config.get("shift_factor") is not None:
        vae.register_to_config(shift_factor=0.25)
    pictures = torch.rand(2, 3, 32, 32)
    raw, scaled = encode(vae, pictures, scaled=False), encode(vae, pictures)
    shift = vae.config.get("shift_factor") or 0.0
    assert torch.allclose(scaled / vae.config.scaling_factor + shift, raw, atol=1e-6)


@pytest.mark.parametrize("factor", list(vector_quantized.SHAPES))
def test_the_codebook_starts_where_latents_are(factor, monkeypatch):
    monkeypatch.setattr(vector_quantized, "PICTURES", 200)
    torch.manual_seed(0)
    vae = vector_quantized.build(factor).eval()
    pictures = sample_pictures(32, np.random.default_rng(5), fixed=CENTRED)[0]
    latents = encode(vae, pictures, scaled=False)
    side = 32 // factor
    assert latents.shape == (32, vae.config.latent_channels, side, side)
    before = (vae.quantize(latents)[0] - latents).square().mean()
    vector_quantized._set_entries(vae, np.random.default_rng(6))
    rounded, _, (_, _, chosen) = vae.quantize(latents)
    assert (rounded - latents).square().mean() < 0.1 * min(before, latents.var())
    assert len(chosen.unique()) > 100


def test_a_codebook_starts_with_the_other_autoencoders_weights_where_they_fit():
    torch.manual_seed(0)
    other = build("kl-4")
    for factor, level in ((4, 0), (8, 1)):
        vae = vector_quantized.build(factor)
        vector_quantized._start(vae, other)
        mine, theirs = vae.state_dict(), other.state_dict()
        part = "resnets.0.conv1.weight"
        assert torch.equal(
            mine[f"decoder.up_blocks.{level}.{part}"], theirs[f"decoder.up_blocks.0.{part}"]
        )
        assert torch.equal(
            mine[f"encoder.down_blocks.0.{part}"], theirs[f"encoder.down_blocks.0.{part}"]
        )


def test_no_level_weighs_more_than_the_heaviest():
    signal = torch.full((1000,), 1e-4)
    signal[:500] = 0.5

    def loss(heaviest):
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        x = torch.zeros(64, 1, 16, 16)
        return objectives.epsilon_loss(lambda z, t: 0 * z, x, rng, signal, heaviest).item()

    # Half of the timesteps have weight 2, half have 10,000 or the limit; the error is 1.
    assert loss(float("inf")) == pytest.approx(0.5 * (2 + 1e4), rel=0.2)
    assert loss(100.0) == pytest.approx(0.5 * (2 + 100), rel=0.2)
    assert loss(100.0) < loss(1000.0) < loss(float("inf"))


def test_packing_is_what_flux_unpacks():
    from diffusers import FluxPipeline

    from evenkeel.zoo.making.twins.flux import pack

    latents = torch.randn(2, 16, 8, 8)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 8, 8))
    assert torch.equal(FluxPipeline._unpack_latents(packed, 32, 32, 4), latents)


def test_flow_points_lie_on_the_line_and_name_their_velocity():
    x = torch.randn(64, 3, 2, 2)
    torch.manual_seed(1)
    noisy, t, velocity = objectives.flow_point(x, np.random.default_rng(0), 3.0)
    level = (t / 1000).reshape(-1, 1, 1, 1)
    assert torch.allclose(noisy, x + level * velocity, atol=1e-5)
    assert 0 < t.min() < t.max() < 1000
    # Shifted by 3 the median level is 3 / 4: sigma = 1 / 2 before.
    assert abs(t.median() - 750) < 20


def test_variance_bound_is_least_at_the_true_variance():
    signal = objectives.alphas_cumprod()
    t = torch.tensor([5, 20, 100])
    x = torch.randn(3, 4, 8, 8)
    noise = torch.randn_like(x)
    kept = signal[t][:, None, None, None]
    noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise

    def bound(value):
        variance = torch.full_like(x, value)
        return objectives.variance_bound(x, noisy, noise, variance, t, signal)

    # With the true noise the mean is right, and the true variance is the lower bound (v = -1).
    assert torch.allclose(bound(-1.0), torch.zeros(3), atol=1e-5)
    assert (bound(0.0) > bound(-1.0)).all() and (bound(1.0) > bound(0.0)).all()


def test_captions_are_dropped_row_by_row():
    batch = {"latents": torch.randn(1000, 2), "ids": torch.ones(1000, 4, dtype=torch.int64)}
    empty = {"ids": torch.zeros(1, 4, dtype=torch.int64)}
    out = pools.drop_captions(batch, empty, 0.1, np.random.default_rng(0))
    assert torch.equal(out["latents"], batch["latents"])
    dropped = (out["ids"] == 0).all(1)
    assert torch.equal(dropped, (out["ids"] == 0).any(1))
    assert 60 < dropped.sum() < 140
