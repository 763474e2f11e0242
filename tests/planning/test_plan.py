"""Plans against what the real pipelines hold, are called with, and write."""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import quantized_by
import torch

import evenkeel
from evenkeel import zoo
from evenkeel.cli import main
from evenkeel.errors import QuantizationError, UnsupportedPipeline
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.planning.blueprint import read_blueprint
from evenkeel.planning.denoiser_inputs import Shapes, Size
from evenkeel.planning.live_memory import peak_bytes
from evenkeel.planning.storage_formats import bytes_of, quantized_bytes
from evenkeel.quantizers import QuantizerSpec, quantize_module, save_quantized

TWINS = ("pixart-sigma", "sdxl", "flux-dev")
STEPS, PROMPTS, BATCH = 3, 3, 2
PLANS = Path(__file__).parents[2] / "docs" / "plans"


@pytest.fixture(scope="module", params=TWINS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(name):
    return zoo.load(name)


def planned(name, **options):
    asked = {"num_inference_steps": STEPS, "prompts": PROMPTS, "batch_size": BATCH}
    return evenkeel.plan(
        f"zoo:{name}", **{"quantized": "w4a16-g64", "dtype": "float32", **asked, **options}
    )


def held(module):
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values())


@contextmanager
def calls_of(module):
    """Keywords, or positional arguments too, of every call."""
    seen = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def settings(name):
    twin = zoo.twin(name)
    return {
        "prompts": [f"a blue digit {i}" for i in range(PROMPTS)],
        "num_inference_steps": STEPS,
        "guidance_scale": twin.guidance_scale,
        "batch_size": BATCH,
        "progress": False,
    }


def test_weights_are_those_of_the_loaded_networks(name, pipeline):
    found = planned(name).weights
    networks = {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
    assert found == {n: held(m) for n, m in networks.items()}


def test_the_denoiser_is_called_with_the_planned_shapes(name, pipeline):
    denoiser, asked = denoiser_of(pipeline), settings(name)
    with calls_of(denoiser) as calls:
        run = Run(
            pipeline,
            asked["prompts"],
            STEPS,
            guidance_scale=asked["guidance_scale"],
            batch_size=BATCH,
        )
        run.sample(run.batches()[0])
    plan = planned(name)
    shapes = Shapes(read_blueprint(zoo.path_of(name)), plan.size, torch.float32)
    expected = {k: v for k, v in shapes.inputs(plan.rows).items() if isinstance(v, torch.Tensor)}
    args, kwargs = calls[0]
    real = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
    if name == "pixart-sigma":
        real["hidden_states"] = args[0]
    timeless = {k: v.shape for k, v in expected.items() if k != "timestep"}
    assert timeless == {k: real[k].shape for k in timeless}


def test_activations_are_what_a_real_call_holds(name, pipeline):
    plan = planned(name)
    shapes = Shapes(read_blueprint(zoo.path_of(name)), plan.size, torch.float32)
    real = {
        k: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
        for k, v in shapes.inputs(plan.rows).items()
    }
    if "added_cond_kwargs" in real:
        real["added_cond_kwargs"] = {
            k: None if v is None else torch.zeros(v.shape)
            for k, v in real["added_cond_kwargs"].items()
        }
    measured = peak_bytes(lambda: denoiser_of(pipeline)(**real, return_dict=False))
    assert plan.denoising == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("text", ["w4a16-g64", "w3a4-g32-r16", "w4a8-gnone-token"])
def test_a_quantized_denoiser_is_stored_in_the_planned_bytes(name, pipeline, text, tmp_path):
    quantized, _ = quantize_module(denoiser_of(pipeline), QuantizerSpec.parse(text))
    save_quantized(quantized, tmp_path)
    found = planned(name, quantized=text).quantized
    file = (tmp_path / "quantized.safetensors").stat().st_size
    assert found.stored == pytest.approx(file, rel=0.05)
    assert found.memory == held(quantized)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("int8", "bitsandbytes int8"), ("q8_0", "gguf Q8_0"), ("q4_0", "gguf Q4_0")],
)
def test_backends_hold_the_planned_bytes(name, pipeline, text, kind):
    if name == "sdxl" and text.startswith("q"):
        pytest.skip("its widths are no multiples of ggml's blocks")
    package, build = quantized_by.BACKENDS[kind]
    pytest.importorskip(package)
    denoiser = denoiser_of(pipeline)
    real = build(denoiser)
    measured = held(real)
    if text == "int8":  # its scales lie beside the parameters
        measured += sum(
            4 * m.out_features for m in denoiser.modules() if isinstance(m, torch.nn.Linear)
        )
    found = quantized_bytes(denoiser, text, torch.float32)
    assert found.memory == pytest.approx(measured, rel=0.01)
    assert found.memory < 0.8 * bytes_of(denoiser, torch.float32)


def test_calls_and_files_are_those_of_the_jobs(name, pipeline, tmp_path):
    reference = denoiser_of(pipeline)
    quantized, _ = quantize_module(reference, QuantizerSpec.parse("w4a16-g64"))
    plan, asked = planned(name), {"quantized": quantized, **settings(name)}

    with calls_of(reference) as full, calls_of(quantized) as few:
        record = evenkeel.calibrate(pipeline, **asked)
    assert (len(full), len(few)) == (
        plan["calibrate"].full_calls,
        plan["calibrate"].quantized_calls,
    )
    record.save(tmp_path / "record")
    size = (tmp_path / "record").stat().st_size
    assert plan["calibrate"].file_bytes == pytest.approx(size, rel=0.02)

    with calls_of(reference) as full, calls_of(quantized) as few:
        readout = evenkeel.fit_readout(pipeline, **asked)
    job = plan["readout"]
    assert (len(full), len(few)) == (job.full_calls, job.quantized_calls)
    if name == "pixart-sigma":  # no room for the inputs of the head but the first batch's
        room = 2 * BATCH * 16 * 96 * 4
        # A call that runs again does so below its own hooks.
        with calls_of(reference) as full, calls_of(quantized.proj_out) as few:
            evenkeel.fit_readout(pipeline, feature_memory=room, **asked)
        tight = planned(name, feature_memory=room)["readout"]
        assert tight.quantized_calls > job.quantized_calls
        assert (len(full), len(few)) == (tight.full_calls, tight.quantized_calls)
    evenkeel.save(readout, tmp_path / "readout")
    size = (tmp_path / "readout").stat().st_size
    assert job.file_bytes == pytest.approx(size, rel=0.05)


def test_nothing_but_configurations_is_read(tmp_path):
    source = zoo.path_of("pixart-sigma")
    for path in (*source.rglob("*config.json"), source / "model_index.json"):
        target = tmp_path / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    there = evenkeel.plan(tmp_path, quantized="nf4", num_inference_steps=STEPS)
    assert there.weights == planned("pixart-sigma", quantized="nf4", dtype="bfloat16").weights


def test_processes_share_the_calls_and_not_the_memory():
    one, two = planned("sdxl", prompts=16), planned("sdxl", prompts=16, processes=2)
    assert two["sample"].quantized_calls * 2 == one["sample"].quantized_calls
    assert two["sample"].memory == one["sample"].memory
    assert two["calibrate"].file_bytes == one["calibrate"].file_bytes


def test_parameters_of_large_models_are_the_published_ones():
    billions = {"flux.1-dev": 11.90, "sdxl-base-1.0": 2.567, "wan2.1-1.3b": 1.42}
    for model, expected in billions.items():
        denoiser = read_blueprint(PLANS / model).denoiser
        assert sum(p.numel() for p in denoiser.parameters()) / 1e9 == pytest.approx(
            expected, rel=3e-3
        )


def test_the_size_asked_for_decides(name):
    small, large = planned(name, height=32, width=32), planned(name, height=64, width=64)
    assert large.denoising > 2 * small.denoising
    assert large.size == Size(64, 64)


def test_what_cannot_be_planned_is_said(tmp_path):
    with pytest.raises(UnsupportedPipeline, match=r"cache holds no model_index\.json"):
        evenkeel.plan("nobody/nothing", quantized="nf4")
    with pytest.raises(UnsupportedPipeline, match=r"holds no model_index\.json"):
        evenkeel.plan(tmp_path, quantized="nf4")
    with pytest.raises(QuantizationError, match="Formats of backends: nf4"):
        evenkeel.plan(quantized="w99")
    index = {"_class_name": "DiTPipeline", "scheduler": ["antigravity", "geohash"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedPipeline, match="expected one of diffusers or transformers"):
        evenkeel.plan(tmp_path, quantized="nf4")
    assert "antigravity" not in sys.modules  # a file does not choose what is imported


def test_the_command_says_the_same(capsys):
    words = ["zoo:sdxl", "--quantized", "nf4", "--num-inference-steps", "3", "--prompts", "3"]
    assert main(["plan", *words, "--batch-size", "2", "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(planned("sdxl", quantized="nf4").as_dict()))
    assert main(["plan", *words]) == 0
    assert "calls, quantized" in capsys.readouterr().out
