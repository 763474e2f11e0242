"""Denoisers quantized by real backends: recognised, described, told apart."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_denoisers import (
    TEXTS,
    called,
    every,
    is_installed,
    needs,
    pipeline,
    quantized,
    shared,
)
from quantized_by import BACKENDS, bitsandbytes_4bit, modelopt_w3a4, quanto_unpacked
from tiny_pipelines import ALL
from torch import Tensor, nn

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.actuators.heads import find_head
from evenkeel.hosts.backends import catalogue
from evenkeel.hosts.backends.catalogue import backend_layers, backend_settings, stored_tensors
from evenkeel.hosts.pipeline.fingerprint import fingerprint, quantizer_text
from evenkeel.quantizers import QuantizerSpec, quantize_module

pytestmark = [  # what the backends themselves still use
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:transformers .* is not tested:UserWarning"),  # ModelOpt
    pytest.mark.filterwarnings("ignore:.*Quanto.*deprecated:FutureWarning"),
]

# ---- recognising


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


def test_every_backend_is_one_file_and_on_the_page() -> None:
    folder = Path(catalogue.__file__).parent
    files = {p.stem for p in folder.glob("*.py")} - {"__init__", "base", "catalogue"}
    assert {type(b).__module__.rpartition(".")[2] for b in catalogue.BACKENDS} == files
    assert len(catalogue.BACKENDS) == len(files)
    page = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
    rows = " ".join(line.split("|")[1].lower() for line in page.splitlines() if line[:1] == "|")
    assert [b.name for b in catalogue.BACKENDS if b.name not in rows] == ["evenkeel"]


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
        data = tensor.reshape(-1).view(torch.uint8)
        data[0] ^= 1
        assert fingerprint(model) != before, part
        data[0] ^= 1
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


# ---- what tests use in place of a compiler


@pytest.mark.rarely
@pytest.mark.parametrize("bits", [2, 4])
def test_quantos_extension_unpacks_as_its_substitute_here(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import get_extension

    extension = get_extension("quanto_cpp")
    monkeypatch.setattr(extension, "_lib", None)
    packed = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    assert torch.equal(extension.lib.unpack(packed, bits), quanto_unpacked(packed, bits))
