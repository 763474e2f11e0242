"""Denoisers quantized by real backends: recognised, recorded, corrected, given back bit for bit."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from quantized_by import BACKENDS, bitsandbytes_4bit, modelopt_w3a4
from tiny_pipelines import ALL, generate
from torch import Tensor, nn

import evenkeel
from evenkeel import Arm, ExactDrift, QDrift, Record, calibrate, compare, fit_readout, zoo
from evenkeel.cli.sources import load_denoiser
from evenkeel.errors import Incompatible, UnsupportedPipeline
from evenkeel.hosts.actuators.heads import find_head, is_plain, layer_of
from evenkeel.hosts.backends.catalogue import backend_layers, backend_settings, stored_tensors
from evenkeel.hosts.pipeline.fingerprint import fingerprint, quantizer_text
from evenkeel.hosts.pipeline.pipelines import denoiser_swapped, run_pipeline
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.zoo.evaluation import HandwritingEvaluator, sample_prompts

pytestmark = [  # what the backends themselves still use
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:transformers .* is not tested:UserWarning"),  # ModelOpt
    pytest.mark.filterwarnings("ignore:.*Quanto.*deprecated:FutureWarning"),
]

STEPS, GUIDANCE = 3, 4.5
PROMPTS = sample_prompts(4, 0)
COARSE = ("torchao int4", "torchao fake w3a4", "bitsandbytes nf4", "bitsandbytes fp4", "gguf Q4_0")
COARSE += ("quanto qint4", "sdnq int4", "sdnq uint4 svd", "modelopt w3a4")

logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")  # a line per layer and call


@functools.cache
def pipeline() -> Any:
    pipe = zoo.load("pixart-sigma")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def called(model: nn.Module) -> Tensor:
    """One call of the embedded pipeline's denoiser, always with the same input."""
    g = torch.Generator().manual_seed(5)
    states = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor([9, 7]),
    }
    text = {"encoder_hidden_states": torch.randn(2, 8, 96, generator=g)}
    with torch.no_grad():
        out: Tensor = model(**states, **text, added_cond_kwargs={}, return_dict=False)[0]
    return out


def quantized(name: str, **options: Any) -> nn.Module:
    """The embedded pipeline's denoiser; the test is skipped where the backend is missing."""
    package, build = BACKENDS[name]
    needs(package)
    if package == "modelopt":
        options["run"] = called
    return build(pipeline().transformer, **options)


def needs(package: str) -> Any:
    return pytest.importorskip(
        package, reason=f"{package} is not installed: pip install 'evenkeel[backends]'"
    )


def is_installed(package: str) -> bool:
    top = package.split(".")[0]
    return all(importlib.util.find_spec(part) is not None for part in (top, package))


shared = functools.cache(quantized)
every = pytest.mark.parametrize("name", BACKENDS)


def sampled(model: nn.Module, seeds: range = range(2)) -> Tensor:
    """Latents of calibrated prompts, from the noise they were calibrated with."""
    with denoiser_swapped(pipeline(), model):
        out: Tensor = run_pipeline(
            pipeline(),
            PROMPTS[: len(seeds)],
            seeds,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
            call={},
        )
    return out


def measured(model: nn.Module, **options: Any) -> Record:
    settings: dict[str, Any] = {"prompts": PROMPTS, "num_inference_steps": STEPS, "batch_size": 4}
    settings |= {"guidance_scale": GUIDANCE, "progress": False, **options}
    return calibrate(pipeline(), quantized=model, **settings)


def fitted(model: nn.Module, **options: Any) -> Any:
    settings: dict[str, Any] = {"prompts": PROMPTS, "num_inference_steps": STEPS, "batch_size": 4}
    settings |= {"guidance_scale": GUIDANCE, "progress": False, **options}
    return fit_readout(pipeline(), quantized=model, **settings)


# ---- recognising

TEXTS = {
    "torchao int8": "torchao:int8 x 86, plain x 1",
    "torchao int8 dynamic": "torchao:int8-a8 x 86, plain x 1",
    "torchao int4": "torchao:int4-g16 x 86, plain x 1",
    "torchao fake w3a4": "torchao:fake-int3-g16-a4 x 86, plain x 1",
    "bitsandbytes int8": "bitsandbytes:int8 x 86, plain x 1",
    "bitsandbytes nf4": "bitsandbytes:nf4-g32 x 86, plain x 1",
    "bitsandbytes fp4": "bitsandbytes:fp4-g32 x 86, plain x 1",
    "gguf Q8_0": "gguf:Q8_0 x 86, plain x 1",
    "gguf Q5_0": "gguf:Q5_0 x 86, plain x 1",
    "gguf Q4_0": "gguf:Q4_0 x 86, plain x 1",
    "quanto qint8": "quanto:qint8 x 87",
    "quanto qint4": "quanto:qint4 x 78, quanto:qint4-g128 x 9",
    "sdnq int8": "sdnq:int8 x 86, plain x 1",
    "sdnq int4": "sdnq:int4-g16 x 86, plain x 1",
    "sdnq uint4 svd": "sdnq:uint4-g16-r4 x 86, plain x 1",
    "modelopt w3a4": "modelopt:int3-g16-a4 x 87",
}


@every
def test_the_text_names_backend_format_and_counts(name: str) -> None:
    assert quantizer_text(shared(name)) == TEXTS[name]


@every
def test_layers_say_what_they_store(name: str) -> None:
    model = shared(name)
    layers = {layer.name: layer for layer in backend_layers(model)}
    dense = {layer.name: layer for layer in backend_layers(pipeline().transformer)}
    assert layers.keys() == dense.keys()
    inside = layers["transformer_blocks.3.ff.net.2"]
    assert inside.bits == int(next(c for c in TEXTS[name] if c.isdigit()))
    weights, biases = 96 * 384, 4 * 96
    assert dense[inside.name].stored_bytes == 4 * weights + biases
    simulated = "fake" in name or "modelopt" in name
    held = 32 if simulated else 8 if name == "torchao int4" else inside.bits  # bits per weight
    codes = weights * held // 8 + biases
    assert codes < inside.stored_bytes + simulated <= codes + 0.8 * weights  # with scales, factors


def test_a_plain_denoiser_has_no_backend() -> None:
    assert quantizer_text(pipeline().transformer) == "none"
    assert backend_settings(pipeline().transformer) == {}
    assert {layer.backend for layer in backend_layers(pipeline().transformer)} == {"plain"}


def test_own_quantizers_keep_their_specification() -> None:
    model = quantize_module(pipeline().transformer, QuantizerSpec.parse("w3a4-g32-r16"))[0]
    assert quantizer_text(model) == model.evenkeel_quantizer
    assert "evenkeel" in {layer.backend for layer in backend_layers(model)}


def test_layers_that_stay_plain_are_counted() -> None:
    model = quantized("torchao int8", skip=("proj_out", "adaln"))
    assert quantizer_text(model) == "torchao:int8 x 82, plain x 5"


def test_what_a_backend_or_adapter_keeps_inside_a_layer_is_not_another_layer() -> None:
    adapter: Any = nn.Module()
    adapter.in_features, adapter.out_features = 8, 4
    adapter.base_layer, adapter.weight = nn.Linear(8, 4), nn.Parameter(torch.zeros(4, 8))
    layers = backend_layers(nn.ModuleDict({"proj": adapter}))
    assert [layer.name for layer in layers] == ["proj.base_layer"]


# ---- fingerprints


def published(module: nn.Module) -> str:
    """What the fingerprint of a plain module was before backends were known, written down again."""
    digest = hashlib.sha256(type(module).__name__.encode())
    config = {k: v for k, v in dict(module.config).items() if k[:1] != "_"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode() + b"none")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        part = flat[:: max(1, flat.numel() // 65_536)][:65_536].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(part.view(torch.uint8).numpy().tobytes() if part.numel() else b"")
    return digest.hexdigest()[:32]


@pytest.mark.parametrize("name", ["embedded", *ALL])
def test_plain_denoisers_keep_their_fingerprint(name: str) -> None:
    model = pipeline().transformer if name == "embedded" else ALL[name]().model
    assert fingerprint(model) == published(model)


@every
def test_the_fingerprint_is_that_of_the_network(name: str) -> None:
    one, two = shared(name), quantized(name)
    assert fingerprint(one) == fingerprint(two)
    called(one)  # some backends move or repack their tensors at the first call
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(torch.compile(one, backend="eager")) == fingerprint(two)


@every
def test_any_stored_tensor_changes_the_fingerprint(name: str) -> None:
    model = quantized(name)
    before = fingerprint(model)
    block = model.transformer_blocks[0].attn1.to_q
    for part, tensor in list(stored_tensors(block)):
        if part in ("input_scale", "output_scale", "weight.code", "weight.absmax"):
            continue  # not used, or shown in another precision than it is kept in
        data = tensor.view(torch.uint8) if tensor.numel() else tensor
        data.reshape(-1)[0] ^= 1
        assert fingerprint(model) != before, part
        data.reshape(-1)[0] ^= 1
    assert fingerprint(model) == before


def test_all_fingerprints_differ() -> None:
    installed = [name for name, (package, _) in BACKENDS.items() if is_installed(package)]
    found = {fingerprint(shared(name)) for name in installed} | {
        fingerprint(pipeline().transformer)
    }
    assert len(found) == len(installed) + 1


def test_bitsandbytes_scales_count() -> None:
    model = quantized("bitsandbytes nf4")
    before = fingerprint(model)
    model.proj_out.weight.quant_state.offset += 1
    assert fingerprint(model) != before


def test_bitsandbytes_repacking_is_seen_through() -> None:
    """What the first call does on CPUs with AVX512-BF16 (here by hand: it is torch alone)."""
    functional = needs("bitsandbytes.functional")
    torch.manual_seed(0)
    model = bitsandbytes_4bit(nn.Sequential(nn.Linear(128, 64)), kind="nf4")
    before = fingerprint(model)
    weight: Any = model[0].weight
    packed = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert not torch.equal(packed[0].flatten(), weight.data.flatten())
    weight.data, weight.quant_state = packed
    assert fingerprint(model) == before


def test_low_rank_factors_count_although_no_state_dict_has_them() -> None:
    """ModelOpt's SVDQuant keeps them as plain attributes."""
    needs("modelopt")
    model = modelopt_w3a4(pipeline().transformer, run=called, rank=4)
    assert quantizer_text(model) == "modelopt:int3-g16-a4 x 1, modelopt:int3-g16-r4-a4 x 86"
    before = fingerprint(model)
    called(model)
    assert fingerprint(model) == before
    model.proj_out.weight_quantizer.svdquant_lora_a[0, 0] += 1
    assert fingerprint(model) != before


def test_a_tensor_class_that_shows_nothing_is_refused() -> None:
    class Opaque(Tensor):
        pass

    layer = nn.Linear(4, 4)
    layer.weight = None
    layer.register_buffer("codes", torch.zeros(4).as_subclass(Opaque))
    with pytest.raises(UnsupportedPipeline, match="__tensor_flatten__"):
        fingerprint(layer)


# ---- from calibration to comparison


@every
def test_calibrate_save_apply_sample_remove(name: str, tmp_path: Path) -> None:
    model = shared(name)
    record = measured(model)
    assert record.provenance.quantizer == TEXTS[name]
    record.save(tmp_path / "record.safetensors")
    correction = ExactDrift(Record.load(tmp_path / "record.safetensors").evidence)
    pipe, before = pipeline(), fingerprint(model)
    plain = sampled(model)
    with denoiser_swapped(pipe, model):
        evenkeel.apply(pipe, correction, guidance_scale=GUIDANCE)
        corrected = sampled(model)
        evenkeel.remove(pipe)
    assert not torch.equal(corrected, plain)
    assert bool(torch.isfinite(corrected).all())
    assert torch.equal(sampled(model), plain)
    assert fingerprint(model) == before


@every
def test_a_readout_corrects_a_head_that_the_backend_holds(name: str) -> None:
    model = shared(name)
    assert not is_plain(layer_of(model, find_head(model)))
    readout = fitted(model)
    pipe, plain, before = pipeline(), sampled(model), fingerprint(model)
    with denoiser_swapped(pipe, model):
        evenkeel.apply(pipe, readout)
        corrected = sampled(model)
        evenkeel.remove(pipe)
    assert torch.equal(sampled(model), plain)
    assert fingerprint(model) == before
    wanted = sampled(pipe.transformer)
    limit = 1 if name in COARSE else 1.3  # at 8 bits next to nothing is left to correct
    assert squared(corrected, wanted) < limit * squared(plain, wanted)


def pictures(model: nn.Module) -> Tensor:
    """What ``compare`` should have sampled, by hand."""
    pipe = pipeline()
    seeds = range(1_000_000, 1_000_000 + len(PROMPTS))
    given = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "call": {}}
    with denoiser_swapped(pipe, model):
        images = run_pipeline(pipe, PROMPTS, seeds, output_type="np", **given)
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def squared(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean())


def test_a_record_is_refused_on_another_backends_denoiser() -> None:
    record = measured(shared("torchao int8"))
    other = shared("gguf Q8_0")
    with denoiser_swapped(pipeline(), other):
        with pytest.raises(Incompatible, match=r"torchao:int8 x 86.*Calibrate with this one"):
            evenkeel.apply(pipeline(), ExactDrift(record.evidence))
        evenkeel.apply(pipeline(), ExactDrift(record.evidence), allow=("denoiser",))
        evenkeel.remove(pipeline())


ONE_EACH = list({package: name for name, (package, _) in BACKENDS.items()}.values())


@pytest.mark.parametrize("name", ONE_EACH)
def test_compare_shows_what_the_backend_costs(name: str, tmp_path: Path) -> None:
    model, pipe = shared(name), pipeline()
    readout = fitted(model)
    found = compare(
        pipe,
        [
            Arm("full-precision", pipe.transformer),
            Arm("quantized", model),
            Arm("readout", model, readout),
        ],
        prompts=PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        evaluator=HandwritingEvaluator(zoo.path_of("pixart-sigma")),
        folder=tmp_path,
        progress=False,
    )
    plain, corrected = (found[arm].measures for arm in ("quantized", "readout"))
    assert 0 < plain["psnr"].value < 60
    assert plain["frechet_full_precision"].value > 0
    assert corrected["psnr"].value != plain["psnr"].value
    assert found["readout"].difference_to_quantized["psnr"].n == len(PROMPTS)
    assert torch.equal(found.images["full-precision"], pictures(pipe.transformer))
    assert torch.equal(found.images["quantized"], pictures(model))


# ---- the tiny pipelines: every architecture, convolutional heads among them

TINY = [
    ("flux", "torchao int4"),
    ("sd3", "torchao fake w3a4"),
    ("wan", "bitsandbytes nf4"),
    ("cogvideox", "bitsandbytes fp4"),
    ("sana", "sdnq int4"),
    ("sdxl", "quanto qint4"),
    ("pixart_sigma", "gguf Q4_0"),
]


@pytest.mark.parametrize(("kind", "name"), TINY)
def test_tiny_pipelines_are_calibrated_and_corrected(kind: str, name: str) -> None:
    package, build = BACKENDS[name]
    needs(package)
    tiny = ALL[kind]()
    # Wan reads the dtype of a weight there to cast its input to it; a packed weight is of bytes.
    model = build(tiny.model, skip=("time_embedder",))
    shape: dict[str, Any] = {
        "prompts": [f"prompt number {i}" for i in range(8)],
        "num_inference_steps": 3,
        "guidance_scale": tiny.guidance_scale,
        "call": {k: v for k, v in tiny.call.items() if k != "output_type"},
        "progress": False,
    }
    record = calibrate(tiny.pipe, quantized=model, **shape)
    readout = fit_readout(tiny.pipe, quantized=model, **shape)
    assert record.provenance.quantizer == quantizer_text(model) != "none"
    assert readout.provenance.quantized == record.provenance.quantized == fingerprint(model)
    assert not is_plain(layer_of(model, find_head(model)))
    setattr(tiny.pipe, tiny.denoiser, model)
    plain = generated(tiny)
    for correction in (QDrift(record.evidence), readout):
        evenkeel.apply(tiny.pipe, correction, guidance_scale=tiny.guidance_scale)
        corrected = generated(tiny)
        evenkeel.remove(tiny.pipe)
        assert torch.equal(generated(tiny), plain)
    assert not torch.equal(corrected, plain)  # with the readout; drift has no say in UniPC (Wan)
    assert fingerprint(model) == record.provenance.quantized


def generated(tiny: Any) -> Tensor:
    return generate(tiny, steps=3, seeds=(7, 8))


# ---- saved by diffusers, loaded by the command line's loader


def diffusers_configs() -> dict[str, Any]:
    """Package and configuration by the name of the same format in ``BACKENDS``."""

    def torchao(kind: str) -> Any:
        quantization = needs("torchao.quantization")
        return diffusers.TorchAoConfig(getattr(quantization, kind)())

    def quanto() -> Any:
        needs("optimum.quanto")
        return diffusers.QuantoConfig(weights_dtype="int4")

    def sdnq(**options: Any) -> Any:
        return needs("sdnq").SDNQConfig(minimum_allowed_numel=0, **options)

    return {
        "torchao:int8 x 86": lambda: torchao("Int8WeightOnlyConfig"),
        "torchao:int8-a8 x 86": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        "quanto:qint4 x 77": quanto,
        "sdnq:int8 x 82": lambda: sdnq(weights_dtype="int8"),
        "sdnq:uint4-g16-r4 x 82": lambda: sdnq(
            weights_dtype="uint4", group_size=16, use_svd=True, svd_rank=4
        ),
    }


@pytest.mark.filterwarnings("ignore:.*Quanto.*deprecated:FutureWarning")
@pytest.mark.parametrize("text", diffusers_configs())
def test_a_saved_denoiser_is_recognised_again(text: str, tmp_path: Path) -> None:
    config = diffusers_configs()[text]()
    pipe = pipeline()
    pipe.transformer.save_pretrained(tmp_path / "plain")
    kind: Any = type(pipe.transformer)
    options = {"quantization_config": config, "torch_dtype": torch.float32}
    model = kind.from_pretrained(tmp_path / "plain", **options).eval()
    model.save_pretrained(tmp_path / "quantized")
    again = load_denoiser(str(tmp_path / "quantized"), pipe)
    assert quantizer_text(again).startswith(text)
    assert fingerprint(again) == fingerprint(model)
    assert torch.equal(called(again), called(model))
    record = measured(model, prompts=PROMPTS[:2])
    with denoiser_swapped(pipe, again):
        evenkeel.apply(pipe, ExactDrift(record.evidence))
        evenkeel.remove(pipe)


def test_quantized_in_memory_or_by_diffusers_is_the_same_denoiser(tmp_path: Path) -> None:
    """The configuration that diffusers notes does not count, the layers do."""
    direct = shared("torchao int8")
    pipe = pipeline()
    pipe.transformer.save_pretrained(tmp_path)
    kind: Any = type(pipe.transformer)
    config = diffusers_configs()["torchao:int8 x 86"]()
    model = kind.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.float32)
    assert fingerprint(model.eval()) == fingerprint(direct)


def gguf_file(model: nn.Module, path: Path, kind: str) -> None:
    """As tools for GGUF write it: matrices in blocks of 32, the rest in float32."""
    gguf = needs("gguf")
    writer = gguf.GGUFWriter(path, "flux")
    what = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        blocks = data.ndim == 2 and data.shape[1] % 32 == 0 and name.endswith("weight")
        coded = gguf.quants.quantize(data, what) if blocks else data
        writer.add_tensor(name, coded, raw_dtype=what if blocks else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded_calibrated_and_corrected(tmp_path: Path) -> None:
    needs("gguf")
    tiny = ALL["flux"]()
    gguf_file(tiny.model, tmp_path / "flux.gguf", "Q4_0")
    model, again = (load_denoiser(str(tmp_path / "flux.gguf"), tiny.pipe) for _ in range(2))
    assert quantizer_text(model).startswith("gguf:Q4_0 x ")
    assert fingerprint(model) == fingerprint(again)
    gguf_file(tiny.model, tmp_path / "finer.gguf", "Q8_0")
    assert fingerprint(load_denoiser(str(tmp_path / "finer.gguf"), tiny.pipe)) != fingerprint(model)
    shape: dict[str, Any] = {"prompts": list(tiny.prompts), "num_inference_steps": 3}
    shape |= {"call": {k: v for k, v in tiny.call.items() if k != "output_type"}}
    readout = fit_readout(tiny.pipe, quantized=model, progress=False, **shape)
    wanted = generated(tiny)
    tiny.pipe.transformer = again
    plain = generated(tiny)
    evenkeel.apply(tiny.pipe, readout)
    corrected = generated(tiny)
    evenkeel.remove(tiny.pipe)
    assert torch.equal(generated(tiny), plain)
    assert squared(corrected, wanted) < squared(plain, wanted)


def test_what_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedPipeline, match="no such file"):
        load_denoiser(str(tmp_path / "none.gguf"), pipeline())
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedPipeline, match="no single files into a PixArt"):
        load_denoiser(str(tmp_path / "some.gguf"), pipeline())
    config = json.loads(pipeline().transformer.to_json_string())
    config["quantization_config"] = {"quant_method": "quanto", "weights_dtype": "int8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        "diffusers.quantizers.quanto.quanto_quantizer.is_optimum_quanto_available", lambda: False
    )
    with pytest.raises(UnsupportedPipeline, match=r"not installed.*evenkeel\[backends\]"):
        load_denoiser(str(tmp_path), pipeline())
    config["quantization_config"] = {"quant_method": "modelopt"}  # as broken as it is in diffusers
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedPipeline, match="not a PixArtTransformer2DModel that diffusers"):
        load_denoiser(str(tmp_path), pipeline())


# ---- compiled, offloaded


@pytest.mark.parametrize("name", ["torchao int8 dynamic", "bitsandbytes nf4"])
def test_a_compiled_denoiser_is_calibrated_and_corrected(name: str) -> None:
    package, build = BACKENDS[name]
    needs(package)
    tiny = ALL["pixart_sigma"]()
    model = build(tiny.model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    shape: dict[str, Any] = {"num_inference_steps": 3, "progress": False, "prompts": ["a", "b"]}
    shape |= {"call": {k: v for k, v in tiny.call.items() if k != "output_type"}}
    record = calibrate(tiny.pipe, quantized=compiled, guidance_scale=4.5, **shape)
    assert record.provenance.quantized == fingerprint(model)
    assert record.provenance.quantizer == quantizer_text(model)
    found = []
    for denoiser in (model, compiled):
        tiny.pipe.transformer = denoiser
        plain = generated(tiny)
        evenkeel.apply(tiny.pipe, ExactDrift(record.evidence), guidance_scale=4.5)
        found.append(generated(tiny))
        evenkeel.remove(tiny.pipe)
        assert not torch.equal(found[-1], plain)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_weights_that_sequential_offload_took_away_are_refused() -> None:
    model = quantized("torchao int8 dynamic", skip=("transformer_blocks",))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedPipeline, match="meta device"):
        fingerprint(model)


@pytest.mark.parametrize("name", ["torchao int8", "gguf Q4_0", "bitsandbytes nf4"])
def test_a_correction_survives_hooks_that_move_the_denoiser(name: str) -> None:
    """Model offload without an accelerator: the same hooks, from the CPU to the CPU."""
    model = quantized(name)
    readout = fitted(model)
    pipe = pipeline()
    expected = []
    with denoiser_swapped(pipe, model):
        evenkeel.apply(pipe, readout)
        expected.append(sampled(model))
        _, hook = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
        expected.append(sampled(model))
        hook.offload()
        expected.append(sampled(model))
        evenkeel.remove(pipe)
    assert torch.equal(expected[0], expected[1]) and torch.equal(expected[0], expected[2])
    assert fingerprint(model) == readout.provenance.quantized


def test_layerwise_casting_is_named() -> None:
    model = copy.deepcopy(pipeline().transformer)
    before = fingerprint(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert quantizer_text(model).startswith("casting:float8_e4m3fn x 8")
    assert fingerprint(model) != before


# ---- nunchaku: its layers as its source lays them out; its kernels need CUDA and were not run


def nunchaku_layer(place: str, *, precision: str = "int4", scale: float = 1.0) -> nn.Module:
    """Packed weights (out, in / 2), group scales (in / group, out), factors (., rank)."""
    kind = type("SVDQW4A4Linear", (nn.Module,), {"__module__": place})
    layer: Any = kind()
    layer.in_features, layer.out_features, layer.rank = 128, 64, 16
    layer.precision, layer.act_unsigned = precision, False
    layer.group_size = 16 if precision == "nvfp4" else 64
    layer.wtscale = scale if precision == "nvfp4" else None
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (64, 64), generator=g, dtype=torch.int8)
    layer.qweight = nn.Parameter(codes, requires_grad=False)
    for key, shape in {"wscales": (2, 64), "proj_down": (128, 16), "proj_up": (64, 16)}.items():
        setattr(layer, key, nn.Parameter(torch.randn(shape, generator=g).bfloat16()))
    layer.bias = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    return layer


PLACES = ("nunchaku.models.linear", "diffusers.quantizers.nunchaku.utils")


@pytest.mark.parametrize("place", PLACES)
def test_nunchaku_layers_are_recognised(place: str) -> None:
    model = nn.ModuleDict({"body": nunchaku_layer(place), "proj_out": nn.Linear(8, 4)})
    assert quantizer_text(model) == "nunchaku:svdq-int4-g64-r16-a4 x 1, plain x 1"
    body = backend_layers(model)[0]
    assert body.bits == 4
    assert body.stored_bytes == 64 * 64 + 2 * (2 * 64 + (128 + 64) * 16 + 64)
    assert find_head(model).name == "proj_out"


def test_nunchaku_settings_and_codes_count() -> None:
    def digest(**options: Any) -> str:
        return fingerprint(nn.ModuleDict({"body": nunchaku_layer(PLACES[0], **options)}))

    found = {digest(), digest(precision="nvfp4"), digest(precision="nvfp4", scale=0.5)}
    assert len(found) == 3
    changed: Any = nn.ModuleDict({"body": nunchaku_layer(PLACES[0])})
    changed.body.qweight[3, 3] ^= 1
    assert fingerprint(changed) not in found


def test_weights_inside_a_foreign_object_are_refused() -> None:
    inner = type("QuantizedFluxModel", (), {"__module__": "nunchaku._C"})
    blocks: Any = nn.Module()
    blocks.m = inner()
    with pytest.raises(UnsupportedPipeline, match="NunchakuFluxTransformer2DModelV2"):
        fingerprint(nn.ModuleDict({"transformer_blocks": blocks}))
