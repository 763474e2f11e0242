"""A specification: its text and JSON, its patterns, and which layers of real denoisers those leave out."""

from __future__ import annotations

import json
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_denoisers import (
    cogvideox,
    dit,
    flux,
    pixart,
    sana,
    sd3,
    sdxl,
    wan,
)
from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers import (
    DEFAULT_SKIP,
    QuantizerSpec,
    quantize_module,
)
from evenkeel.quantizers.layers.patterns import first_match

law = settings(derandomize=True, max_examples=60, deadline=None)
BITS = st.integers(2, 8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)  # the layers and denoisers below start from random weights


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("w3a4-g32-r16", QuantizerSpec(3, 4, group=32, rank=16)),
        ("w4a8", QuantizerSpec(4, 8)),
        ("w4a8-gnone", QuantizerSpec(4, 8, group=None)),
        ("w4a8-token", QuantizerSpec(4, 8, activation="token")),
        ("w16a16", QuantizerSpec(16)),
        ("w2a16-gnone-r1-token", QuantizerSpec(2, 16, None, 1, "token")),
    ],
)
def test_text_form(text: str, spec: QuantizerSpec) -> None:
    assert QuantizerSpec.parse(text) == spec
    assert str(spec) == text


SPECS = st.builds(
    QuantizerSpec,
    weight_bits=BITS,
    activation_bits=st.integers(4, 8) | st.just(16),
    group=st.none() | st.integers(2, 512),
    rank=st.integers(0, 64),
    activation=st.sampled_from(["group", "token"]),
)


@law
@given(SPECS, st.lists(st.text("ab.*", min_size=1), max_size=2).map(tuple))
def test_text_and_json_come_back(spec: QuantizerSpec, only: tuple[str, ...]) -> None:
    assert QuantizerSpec.parse(str(spec)) == spec
    patterned = QuantizerSpec(spec.weight_bits, skip=("x",), only=only)
    assert QuantizerSpec.from_dict(json.loads(json.dumps(patterned.as_dict()))) == patterned


@pytest.mark.parametrize(
    "text",
    [
        *("", "w4", "a8w4", "W4A8", "w4a8-", "w4a8-g", "w4a8-r4-g32", "w4a8 ", "w4a8-tokens"),
        *("w1a8", "w9a8", "w4a3", "w4a9", "w4a8-g1", "w4a8-g0", "w16a8-r4"),
    ],
)
def test_bad_text_shows_the_grammar(text: str) -> None:
    with pytest.raises(QuantizationError, match=r"w<2\.\.8\|16>a<4\.\.8\|16>") as caught:
        QuantizerSpec.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_bits": 4.0},
        {"weight_bits": True},
        {"weight_bits": 4, "activation_bits": 2},
        {"weight_bits": 4, "group": 1},
        {"weight_bits": 4, "rank": -1},
        {"weight_bits": 16, "rank": 1},
        {"weight_bits": 4, "activation": "tensor"},
        {"weight_bits": 4, "skip": "proj_out"},
        {"weight_bits": 4, "only": ("",)},
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(QuantizationError):
        QuantizerSpec(**fields)  # type: ignore[arg-type]


def test_unknown_and_missing_fields_are_named() -> None:
    found = QuantizerSpec(4).as_dict()
    del found["rank"]
    with pytest.raises(QuantizationError, match=r"missing \['rank'\], unknown \['ranks'\]"):
        QuantizerSpec.from_dict({**found, "ranks": 2})


def test_patterns_tell_the_head_from_inner_layers() -> None:
    assert first_match("proj_out", DEFAULT_SKIP) == "proj_out"
    assert first_match("single_transformer_blocks.0.proj_out", DEFAULT_SKIP) is None
    assert first_match("transformer_blocks.3.attn.to_out.0", DEFAULT_SKIP) is None
    assert first_match("a.b.norm1.linear", DEFAULT_SKIP) == "*.norm*"
    assert first_match("time_text_embed.guidance_embedder.linear_1", ("time_text_embed",))
    assert first_match("time_text_embedding", ("time_text_embed",)) is None


BLOCK = r"(\w*blocks)\.\d+\.(attn\d?|ff|ff_context|ffn)\..*"
# What the papers quantize, written down without the patterns; and a layer that must be in it.
DENOISERS = {
    pixart: (BLOCK, "transformer_blocks.1.ff.net.2", "proj_out"),
    flux: (
        BLOCK + r"|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)",
        "single_transformer_blocks.0.proj_out",
        "proj_out",
    ),
    sd3: (BLOCK, "transformer_blocks.0.attn2.to_q", "context_embedder"),
    sana: (BLOCK, "transformer_blocks.0.ff.conv_depth", "patch_embed.proj"),
    dit: (BLOCK, "transformer_blocks.0.attn1.to_out.0", "proj_out_2"),
    sdxl: (
        r".*\.(attentions\.\d+\..*|resnets\.\d+\.conv[12])",
        "mid_block.resnets.1.conv2",
        "up_blocks.0.resnets.0.conv_shortcut",
    ),
    wan: (BLOCK, "blocks.0.attn2.add_k_proj", "condition_embedder.image_embedder.ff.net.2"),
    cogvideox: (BLOCK, "transformer_blocks.0.attn1.to_k", "transformer_blocks.0.norm2.linear"),
}


@pytest.mark.parametrize("build", DENOISERS, ids=lambda f: f.__name__)
def test_default_patterns_on_real_denoisers(build) -> None:
    pattern, inside, outside = DENOISERS[build]
    net = build()
    new, report = quantize_module(net, QuantizerSpec(4, 8))
    every = {n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    assert {layer.name for layer in report.layers} == every
    expected = {name for name in every if re.fullmatch(pattern, name)}
    assert {layer.name for layer in report.quantized} == expected
    assert inside in expected
    assert outside in every - expected
    assert type(new) is type(net)
    assert new.config == net.config
    assert new.dtype == torch.float32


# Layers of further families, as diffusers 0.42 names them.
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("transformer_blocks.0.img_mod.1", True),  # Qwen-Image
        ("transformer_blocks.0.img_mlp.net.2", False),
        ("txt_in", True),
        ("time_step_proj.linear_1", True),  # AuraFlow
        ("joint_transformer_blocks.0.ff.out_projection", False),
        ("proj_in", True),  # LTX-Video
        ("double_stream_modulation_img.linear", True),  # FLUX.2
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", False),
        ("distilled_guidance_layer.layers.0.linear_1", True),  # Chroma
        ("encoder_hid_proj", True),  # Kolors
        ("time_extra_emb.pooler.k_proj", True),  # Hunyuan-DiT
        ("down_blocks.1.attentions.0.proj_in", False),  # Stable Diffusion
        ("down_blocks.0.downsamplers.0.conv", True),
    ],
)
def test_default_patterns_on_names_of_other_families(name: str, kept: bool) -> None:
    assert (first_match(name, DEFAULT_SKIP) is not None) == kept
