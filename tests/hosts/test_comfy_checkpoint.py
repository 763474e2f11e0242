"""ComfyUI's quantized checkpoints: read into diffusers' layers, codes and scales as they are."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

from evenkeel.cli.sources import load_denoiser
from evenkeel.errors import EvenkeelError, UnsupportedPipeline
from evenkeel.fitting.adapters.effective_weight import effective_weight
from evenkeel.hosts.backends.catalogue import backend_text
from evenkeel.hosts.comfy_checkpoint import is_comfy_checkpoint, load_comfy, write_comfy
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.record.comfyui_names import place_of

tensor = pytest.importorskip("comfy_kitchen.tensor", reason="pip install 'evenkeel[comfy-kitchen]'")
PREFIX = "model.diffusion_model."

#: Format -> layout, options, and what the library says.
FORMATS = {
    "int8_tensorwise": ("TensorWiseINT8Layout", {}, "int8_tensorwise-a8"),
    "int8 of rows, rotated": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 16},
        "int8_tensorwise-rotated-a8",
    ),
    "float8_e4m3fn": ("TensorCoreFP8Layout", {}, "float8_e4m3fn"),
    "float8_e5m2": ("TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}, "float8_e5m2"),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, "nvfp4"),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, "mxfp8"),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", {"convrot_groupsize": 16}, "asym_w4a8_int8-g16-a8"),
}


def in_their_names(model: nn.Module, pipeline_class: str) -> dict[str, Tensor]:
    """Weights and biases as the original checkpoint has them, fused where it fuses."""
    namer = place_of(pipeline_class)
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        place = namer(name)
        for key in ("weight", "bias"):
            value = getattr(layer, key)
            if value is not None:
                value = value.detach()
                if place.halves and len(layer.weight) == 2 * layer.weight.shape[1]:
                    value = torch.cat(value.chunk(2)[::-1])
                parts[f"{place.layer}.{key}"][place.part] = value
    return {name: torch.cat([v for _, v in sorted(found.items())]) for name, found in parts.items()}


def quantized(
    weights: dict[str, Tensor], layout: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The layers of attention and feed-forward."""
    chosen = ("qkv", "linear1", "proj.weight", "mlp")
    return {
        name: tensor.QuantizedTensor.from_float(value, layout, **options)
        if any(part in name for part in chosen) and name.endswith("weight")
        else value
        for name, value in weights.items()
    }


@pytest.fixture(scope="module")
def flux() -> TinyPipeline:
    return ALL["flux"]()


@pytest.mark.parametrize("name", FORMATS)
def test_every_part_of_a_fused_layer_gets_its_own_codes(flux, tmp_path, name):
    layout, options, said = FORMATS[name]
    theirs = quantized(in_their_names(flux.model, "FluxPipeline"), layout, options)
    path = write_comfy(theirs, tmp_path / "model.safetensors", PREFIX)
    assert is_comfy_checkpoint(path)
    model = load_comfy(path, flux.model, "FluxPipeline")
    assert f"comfy-kitchen:{said} x " in backend_text(model)
    for block in ("transformer_blocks.0", "single_transformer_blocks.1"):
        q, k, v = (model.get_submodule(f"{block}.attn.to_{c}").weight for c in "qkv")
        theirs_name = {"t": "double_blocks.0.img_attn.qkv", "s": "single_blocks.1.linear1"}[
            block[0]
        ]
        whole = theirs[f"{theirs_name}.weight"].dequantize()
        mine = [q, k, v]
        if block[0] == "s":
            mine.append(model.get_submodule(f"{block}.proj_mlp").weight)
        assert torch.equal(torch.cat([w.dequantize() for w in mine]), whole)
    layer = model.get_submodule("transformer_blocks.1.attn.to_k")
    assert torch.allclose(effective_weight(layer), layer.weight.dequantize(), atol=2e-2)
    full, rounded = generate(flux, steps=1), None
    plain = flux.pipe.transformer
    try:
        flux.pipe.transformer = model
        rounded = generate(flux, steps=1)
    finally:
        flux.pipe.transformer = plain
    assert 1e-4 < (rounded - full).norm() / full.norm() < 0.3


def test_what_is_not_quantized_and_what_is_no_layer_is_as_it_was(flux, tmp_path):
    weights = in_their_names(flux.model, "FluxPipeline")
    path = write_comfy(quantized(weights, "TensorCoreFP8Layout", {}), tmp_path / "m.safetensors")
    model = load_comfy(path, flux.model, "FluxPipeline")
    before, after = dict(flux.model.named_parameters()), dict(model.named_parameters())
    assert set(before) == set(after)
    for name in ("norm_out.linear.weight", "norm_out.linear.bias", "x_embedder.weight"):
        assert torch.equal(before[name], after[name])  # halves exchanged, and back
    norms = [name for name in before if "norm_q" in name]
    assert norms and all(torch.equal(before[name], after[name]) for name in norms)


def test_diffusers_own_names_and_a_file_written_from_them(flux, tmp_path):
    layout, options, _ = FORMATS["nvfp4"]
    parameters = quantized(dict(flux.model.named_parameters()), layout, options)
    assert sum(hasattr(p, "layout_cls") for p in parameters.values()) >= 2
    path = write_comfy(parameters, tmp_path / "m.safetensors")
    model = load_comfy(path, flux.model, "FluxPipeline")
    again = write_comfy(dict(model.named_parameters()), tmp_path / "again.safetensors")
    first, second = load_file(path), load_file(again)
    assert {k: v.tolist() for k, v in first.items()} == {k: v.tolist() for k, v in second.items()}
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert {conf["format"] for conf in layers.values()} == {"nvfp4"}
    loaded = load_comfy(again, flux.model, "FluxPipeline")
    assert fingerprint(loaded) == fingerprint(model) != fingerprint(flux.model)


def test_metadata_or_marks_alone_are_enough(flux, tmp_path):
    theirs = quantized(in_their_names(flux.model, "FluxPipeline"), "TensorWiseINT8Layout", {})
    path = write_comfy(theirs, tmp_path / "both.safetensors", PREFIX)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    marks = {k: v for k, v in tensors.items() if not k.endswith("comfy_quant")}
    save_file(marks, tmp_path / "metadata.safetensors", metadata)
    save_file(tensors, tmp_path / "marks.safetensors", {"format": "pt"})
    texts = {
        fingerprint(load_comfy(tmp_path / f"{name}.safetensors", flux.model, "FluxPipeline"))
        for name in ("both", "metadata", "marks")
    }
    assert len(texts) == 1


def test_the_command_takes_such_a_file_and_says_what_is_wrong_with_another(flux, tmp_path):
    theirs = quantized(in_their_names(flux.model, "FluxPipeline"), "TensorCoreMXFP8Layout", {})
    path = write_comfy(theirs, tmp_path / "m.safetensors", PREFIX)
    model = load_denoiser(str(path), flux.pipe)
    assert "comfy-kitchen:mxfp8" in backend_text(model)
    with pytest.raises(EvenkeelError, match=r"no layer in .* is one of a SanaTransformer2DModel"):
        load_denoiser(str(path), ALL["sana"]().pipe)
    changed(path, lambda conf: conf | {"format": "int2_secret"})
    with pytest.raises(UnsupportedPipeline, match="int2_secret"):
        load_denoiser(str(path), flux.pipe)
    plain = save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    assert plain is None and not is_comfy_checkpoint(tmp_path / "plain.safetensors")


def changed(path: Path, change: Any) -> None:
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith("comfy_quant"):
            conf = change(json.loads(value.numpy().tobytes()))
            tensors[name] = torch.frombuffer(
                bytearray(json.dumps(conf).encode()), dtype=torch.uint8
            )
    save_file(tensors, path)
