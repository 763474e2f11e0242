"""Quantized networks in the hands of diffusers: saved and loaded to the bit, never taken for plain."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

from evenkeel.errors import EvenkeelError, QuantizationError
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.quantizers import QuantizerSpec, load_quantized, quantize_module, save_quantized
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer, QuantizedLinear
from evenkeel.quantizers.saved.report import report_on


def quantized(tiny: TinyPipeline, spec: str = "w4a4-g16-r4") -> nn.Module:
    return quantize_module(tiny.model, QuantizerSpec.parse(spec))[0].eval()


def same_layers(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def sd3() -> TinyPipeline:
    return ALL["sd3"]()


@pytest.mark.parametrize(
    ("name", "spec"), [("sd3", "w4a4-g16-r4"), ("sdxl", "w3a4-g8"), ("pixart_sigma", "w4a8-g16")]
)
def test_a_saved_pipeline_gives_the_same_bits(name: str, spec: str, tmp_path: Path) -> None:
    tiny = ALL[name]()
    network = quantized(tiny, spec)
    setattr(tiny.pipe, tiny.denoiser, network)
    wanted, config = generate(tiny), dict(network.config)
    tiny.pipe.save_pretrained(tmp_path)
    pipe = d.DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(generate(dataclasses.replace(tiny, pipe=pipe)), wanted)
    found = getattr(pipe, tiny.denoiser)
    assert same_layers(found, network) and fingerprint(found) == fingerprint(network)
    assert report_on(found) == report_on(network)
    assert {k for k in network.config if k[:1] != "_"} - {*config} == {"quantization_config"}
    # Our own folder holds the same of either, packed.
    for module in (found, network):
        save_quantized(module, tmp_path / "packed")
        again = load_quantized(tmp_path / "packed")[0]
        assert same_layers(again, network) and "quantization_config" not in again.config


def test_a_network_that_changed_is_saved_as_it_is(sd3: TinyPipeline, tmp_path: Path) -> None:
    network: Any = quantized(sd3)
    network.save_pretrained(tmp_path)
    changed: Any = copy.deepcopy(network)
    layer = next(m for m in changed.modules() if isinstance(m, QuantizedLinear))
    layer.down, layer.up = None, None
    layer.weight = layer.weight * 2
    changed.save_pretrained(tmp_path)
    found = type(changed).from_pretrained(tmp_path)
    assert same_layers(found, changed) and not same_layers(found, network)
    half = type(changed).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kept = [m for m in half.modules() if isinstance(m, QuantizedLayer)]
    assert kept and {m.weight.dtype for m in kept} == {torch.bfloat16}


def test_there_is_no_way_back(sd3: TinyPipeline) -> None:
    network: Any = quantized(sd3)
    with pytest.raises(QuantizationError, match="rounding has no inverse"):
        network.dequantize()


def test_saving_beside_adapters_is_refused(sd3: TinyPipeline, tmp_path: Path) -> None:
    from peft import LoraConfig

    network: Any = quantized(sd3)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="a")
    with pytest.raises(QuantizationError, match=r"adapters.*save_lora"):
        network.save_pretrained(tmp_path)


def test_folders_that_do_not_fit_are_refused(sd3: TinyPipeline, tmp_path: Path) -> None:
    network: Any = quantized(sd3)
    network.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    name = next(iter(said["quantization_config"]["layers"]))
    for change in (
        {"version": 2},
        {"layers": {"no.such": said["quantization_config"]["layers"][name]}},
    ):
        file.write_text(
            json.dumps(said | {"quantization_config": said["quantization_config"] | change})
        )
        with pytest.raises(EvenkeelError, match="version"):
            type(network).from_pretrained(tmp_path)


@pytest.mark.parametrize("first", ["evenkeel", "diffusers"])
def test_a_fresh_process_loads_it_whatever_is_imported_first(
    sd3: TinyPipeline, first: str, tmp_path: Path
) -> None:
    network: Any = quantized(sd3)
    network.save_pretrained(tmp_path)
    second = {"evenkeel": "diffusers", "diffusers": "evenkeel"}[first]
    code = (
        f"import {first}, {second}, sys\n"
        f"m = diffusers.SD3Transformer2DModel.from_pretrained({str(tmp_path)!r})\n"
        "from evenkeel.hosts.pipeline.fingerprint import fingerprint\n"
        "print(fingerprint(m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == fingerprint(network)


def test_without_this_library_diffusers_refuses_the_folder(
    sd3: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.quantizers import auto

    network: Any = quantized(sd3)
    network.save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "evenkeel")
    with pytest.raises(ValueError, match="Unknown quantization type, got evenkeel"):
        type(network).from_pretrained(tmp_path)


# ---- others who take a layer for a plain one


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "pixart_sigma", "wan"])
def test_fusing_projections_is_refused_and_changes_nothing(name: str) -> None:
    tiny = ALL[name]()
    network: Any = quantized(tiny, "w3a4-g8")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(QuantizationError, match="fuse_qkv_projections"):
        fuse(network)
    after = network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def fuse(network: Any) -> None:
    """As diffusers does, where it has the method; as it does by hand where it has not."""
    if hasattr(network, "fuse_qkv_projections"):
        network.fuse_qkv_projections()
        return
    for module in network.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()


JOINING = {
    "cat": lambda w: torch.cat([w, w]),
    "cat of plain and quantized": lambda w: torch.cat([torch.zeros_like(w), w]),
    "data": lambda w: torch.cat([w.data, w.data]),
    "stack": lambda w: torch.stack((w, w)),
    "copy": lambda w: torch.zeros(w.shape).copy_(w.data),
    "plain layer": lambda w: nn.Linear(8, 3).weight.data.copy_(w),
}


@pytest.mark.parametrize("how", JOINING)
def test_weights_are_not_joined_or_copied_elsewhere(how: str) -> None:
    layer = QuantizedLinear(torch.ones(3, 8))
    with pytest.raises(QuantizationError, match="joined or copied"):
        JOINING[how](layer.weight)
    assert (
        type(layer.weight + 1)
        is type(layer.weight.double())
        is type(layer.weight.T @ layer.weight)
        is Tensor
    )
    assert torch.equal(layer.weight.data.clone(), torch.ones(3, 8))


def test_plain_networks_do_not_take_over_a_quantized_state(sd3: TinyPipeline) -> None:
    network = quantized(sd3, "w4a8-g16")
    plain = copy.deepcopy(sd3.model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_extra_state"):
        plain.load_state_dict(network.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        network.load_state_dict(plain.state_dict())
    other = quantized(sd3, "w4a4-g16")
    with pytest.raises(QuantizationError, match="rounds its input"):
        other.load_state_dict(network.state_dict())
    same = quantized(sd3, "w3a8-g16")
    same.load_state_dict(network.state_dict())
    assert same_layers(same, network)
    first = next(m for m in same.modules() if isinstance(m, QuantizedLayer))
    assert first.stored is not None and first.stored[0].format.bits == 4


def test_a_motion_network_is_not_made_of_a_quantized_one() -> None:
    tiny = ALL["sdxl"]()
    with pytest.raises((RuntimeError, QuantizationError)):
        d.UNetMotionModel.from_unet2d(quantized(tiny, "w4a8-g16"))


def test_another_backend_does_not_quantize_again() -> None:
    layer = QuantizedLinear(torch.ones(4, 8))
    with pytest.raises(QuantizationError, match="on its grid already"):
        layer.weight = nn.Parameter(torch.zeros(4, 8))
    torchao = pytest.importorskip("torchao.quantization")
    with pytest.raises(QuantizationError, match="on its grid already"):
        torchao.quantize_(nn.Sequential(layer), torchao.Int8WeightOnlyConfig())
    assert torch.equal(layer.weight, torch.ones(4, 8))


def test_layerwise_casting_leaves_the_grid_alone(sd3: TinyPipeline) -> None:
    network: Any = quantized(sd3)
    before = {
        n: m.weight.clone() for n, m in network.named_modules() if isinstance(m, QuantizedLayer)
    }
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLayer):
            assert torch.equal(module.weight, before[name])
    assert quantized(sd3).to(torch.bfloat16).dtype == torch.bfloat16


def test_a_text_encoder_is_not_saved_as_if_it_were_plain(sd3: TinyPipeline, tmp_path: Path) -> None:
    encoder: Any = quantize_module(sd3.pipe.text_encoder_3, QuantizerSpec.parse("w4a8-g16"))[0]
    with pytest.raises(ValueError, match=r"quantized with evenkeel and is not serializable"):
        encoder.save_pretrained(tmp_path)
