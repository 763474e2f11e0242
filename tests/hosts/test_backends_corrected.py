"""Denoisers quantized by real backends: calibrated, corrected, given back bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from backend_denoisers import (
    COARSE,
    GUIDANCE,
    PROMPTS,
    STEPS,
    TEXTS,
    called,
    every,
    fitted,
    measured,
    needs,
    pipeline,
    quantized,
    sampled,
    shared,
)
from quantized_by import BACKENDS
from tiny_pipelines import ALL, generate
from torch import Tensor, nn

import evenkeel
from evenkeel import Arm, ExactDrift, QDrift, Record, calibrate, compare, fit_readout, zoo
from evenkeel.cli.sources import load_denoiser
from evenkeel.errors import Incompatible, UnsupportedPipeline
from evenkeel.hosts.actuators.heads import find_head, is_plain, layer_of
from evenkeel.hosts.pipeline.fingerprint import fingerprint, quantizer_text
from evenkeel.hosts.pipeline.pipelines import denoiser_swapped, run_pipeline
from evenkeel.zoo.evaluation import HandwritingEvaluator

pytestmark = [  # what the backends themselves still use
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:transformers .* is not tested:UserWarning"),  # ModelOpt
    pytest.mark.filterwarnings("ignore:.*Quanto.*deprecated:FutureWarning"),
]

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


def test_weights_that_sequential_offload_took_away_are_read_or_refused(tmp_path) -> None:
    plain = copy.deepcopy(pipeline().transformer)
    before = fingerprint(plain)
    accelerate.disk_offload(plain, tmp_path, execution_device=torch.device("cpu"))
    assert next(plain.parameters()).is_meta
    assert fingerprint(plain) == before
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
