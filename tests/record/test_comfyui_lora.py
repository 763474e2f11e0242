"""Layers under ComfyUI's names: the original checkpoints' names, which diffusers converts itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers as d
import pytest
import torch
from diffusers.loaders import single_file_utils as single
from made_adapters import made_adapters
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import ALL
from torch import Tensor, nn

from evenkeel.cli import main
from evenkeel.errors import RecordError
from evenkeel.hosts.actuators.beside import shape_of
from evenkeel.record import save
from evenkeel.record.comfyui_lora import in_comfyui
from evenkeel.record.comfyui_names import ARCHITECTURES, place_of
from evenkeel.record.lora_file import write_lora

SD = {
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
}
SDXL = {
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
#: Pipeline class -> denoiser at its real widths with few blocks, and diffusers' conversion.
CONVERTED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], str]] = {
    "FluxPipeline": (
        lambda: d.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True),
        single.convert_flux_transformer_checkpoint_to_diffusers,
        "",
    ),
    "Flux2Pipeline": (
        lambda: d.Flux2Transformer2DModel(num_layers=2, num_single_layers=2),
        single.convert_flux2_transformer_checkpoint_to_diffusers,
        "",
    ),
    "StableDiffusion3Pipeline": (
        lambda: d.SD3Transformer2DModel(num_layers=3, dual_attention_layers=(0, 1)),
        single.convert_sd3_transformer_checkpoint_to_diffusers,
        "",
    ),
    "ZImagePipeline": (
        lambda: d.ZImageTransformer2DModel(n_layers=2),
        single.convert_z_image_transformer_checkpoint_to_diffusers,
        "",
    ),
    "WanImageToVideoPipeline": (
        lambda: d.WanTransformer3DModel(num_layers=2, image_dim=1280, added_kv_proj_dim=5120),
        single.convert_wan_transformer_to_diffusers,
        "",
    ),
    "StableDiffusionXLPipeline": (
        lambda: d.UNet2DConditionModel(**SDXL),
        lambda checkpoint: single.convert_ldm_unet_checkpoint(checkpoint, SDXL),
        "model.diffusion_model.",
    ),
    "StableDiffusionPipeline": (
        lambda: d.UNet2DConditionModel(**SD),
        lambda checkpoint: single.convert_ldm_unet_checkpoint(checkpoint, SD),
        "model.diffusion_model.",
    ),
}


class Checkpoint(dict):
    """Whatever else a checkpoint holds (biases, norms) is there when it is asked for."""

    def pop(self, key: str) -> Any:
        return super().pop(key) if key in self else torch.zeros(7 * 3072)


def factors(build: Callable[[], nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random ones beside every layer that can have an adapter, of unequal ranks."""
    with torch.device("meta"):
        model = build()
    generator = torch.Generator().manual_seed(0)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in model.named_modules():
        shape = shape_of(layer) if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
        if shape is not None:
            rank = 1 + len(found) % 3
            found[name] = drawn(generator, rank, shape[1]), drawn(generator, shape[0], rank)
    return found


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def answer(pair: tuple[Tensor, Tensor]) -> Tensor:
    """(O, 1): what a pair adds, always for the same input of a width."""
    down, up = pair
    x = drawn(torch.Generator().manual_seed(1), down.shape[1], 1)
    return up @ (down @ x)


@pytest.mark.parametrize("pipeline_class", CONVERTED)
def test_what_comfyui_adds_is_what_diffusers_adds(pipeline_class):
    build, convert, prefix = CONVERTED[pipeline_class]
    pairs = factors(build)
    fused = in_comfyui(pairs.items(), pipeline_class)
    checkpoint = {f"{prefix}{layer}.weight": answer(pair) for layer, pair in fused.items()}
    if prefix:
        checkpoint |= {f"{prefix}{layer}.bias": torch.zeros(1) for layer in fused}
    converted = convert(Checkpoint(checkpoint))
    answers = {k.removesuffix(".weight"): v for k, v in converted.items() if k.endswith(".weight")}
    assert set(pairs) <= set(answers)
    for name, pair in pairs.items():
        torch.testing.assert_close(answers[name], answer(pair), msg=name)


PIXART = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "transformer_blocks.3.attn1.to_v": "blocks.3.attn.qkv",
    "transformer_blocks.3.attn1.to_out.0": "blocks.3.attn.proj",
    "transformer_blocks.3.attn2.to_q": "blocks.3.cross_attn.q_linear",
    "transformer_blocks.3.attn2.to_v": "blocks.3.cross_attn.kv_linear",
    "transformer_blocks.3.attn2.to_out.0": "blocks.3.cross_attn.proj",
    "transformer_blocks.3.ff.net.0.proj": "blocks.3.mlp.fc1",
    "transformer_blocks.3.ff.net.2": "blocks.3.mlp.fc2",
    "proj_out": "final_layer.linear",
}  # of the original checkpoints; diffusers has no conversion of them in the package


def test_every_layer_of_pixart_and_qwen_image_has_a_place():
    namer = place_of("PixArtSigmaPipeline")
    assert {name: namer(name).layer for name in PIXART} == PIXART
    sizes = {"use_additional_conditions": True, "caption_channels": 4096}
    pairs = factors(lambda: d.PixArtTransformer2DModel(num_layers=2, **sizes))
    fused = in_comfyui(pairs.items(), "PixArtAlphaPipeline")
    for i in range(2):
        q, k, v = answer(fused[f"blocks.{i}.attn.qkv"]).chunk(3)
        kv = answer(fused[f"blocks.{i}.cross_attn.kv_linear"]).chunk(2)
        expected = [f"attn1.to_{c}" for c in "qkv"] + [f"attn2.to_{c}" for c in "kv"]
        for name, found in zip(expected, (q, k, v, *kv), strict=True):
            torch.testing.assert_close(found, answer(pairs[f"transformer_blocks.{i}.{name}"]))
    qwen = factors(lambda: d.QwenImageTransformer2DModel(num_layers=2))
    assert set(in_comfyui(qwen.items(), "QwenImagePipeline")) == set(qwen)


def test_parts_without_an_adapter_get_rows_of_zeros():
    pairs = factors(CONVERTED["FluxPipeline"][0])
    only = "single_transformer_blocks.1.attn.to_v"
    ((layer, fused),) = in_comfyui([(only, pairs[only])], "FluxPipeline").items()
    assert layer == "single_blocks.1.linear1"
    y = answer(fused)
    assert len(y) == 7 * 3072
    assert torch.equal(y[2 * 3072 : 3 * 3072], answer(pairs[only]))
    assert int((y != 0).sum()) <= 3072
    narrow = (pairs[only][0], pairs[only][1][:100])
    with pytest.raises(RecordError, match="not known"):
        in_comfyui([(only, narrow)], "FluxPipeline")


def test_what_is_not_known_is_refused_by_name():
    pair = torch.zeros(1, 4), torch.zeros(4, 1)
    with pytest.raises(RecordError, match="SanaPipeline is not known; expected one of FLUX"):
        in_comfyui([("x", pair)], "SanaPipeline")
    with pytest.raises(RecordError, match=re.escape("keeps extra.layer of a FluxPipeline")):
        in_comfyui([("extra.layer", pair)], "FluxPipeline")
    with pytest.raises(RecordError, match="upsamplers"):  # SDXL's refiner has four levels
        in_comfyui([("up_blocks.3.upsamplers.0.conv", pair)], "StableDiffusionXLImg2ImgPipeline")
    for other in ("Flux3Pipeline", "StableDiffusionCascade", "HunyuanVideoPipeline"):
        assert place_of(other) is None
    named = {"FluxKontextPipeline", "WanPipeline", "PixArtAlphaPipeline", "ZImageImg2ImgPipeline"}
    assert all(place_of(name) for name in named)
    assert len(ARCHITECTURES) == 9


def contents(path: Any) -> tuple[dict[str, str], list[str]]:
    with safe_open(path, "pt") as file:
        tensors = [f"{k} {file.get_tensor(k).flatten().tolist()}" for k in sorted(file.keys())]
        return file.metadata(), tensors


def test_the_command_writes_every_layout_from_a_restored_folder(tmp_path, capsys):
    tiny = ALL["flux"]()
    adapters = made_adapters(tiny.model)
    path = save(adapters, tmp_path / "adapters.safetensors")
    for layout in ("peft", "kohya", "comfyui"):
        out = tmp_path / f"{layout}.safetensors"
        assert main(["export", str(path), "--layout", layout, "--out", str(out)]) == 0
        again = write_lora(adapters, tmp_path / "same", layout)
        assert contents(out) == contents(again)
    said = capsys.readouterr().out
    assert "beside" in said
    tensors = load_file(tmp_path / "comfyui.safetensors")
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    down, up = (tensors[f"{name}.lora_{s}.weight"] for s in ("down", "up"))
    assert float(tensors[f"{name}.alpha"]) == len(down) == up.shape[1]
    changes = {a.name: a.change for a in adapters.layers}
    expected = [changes[f"transformer_blocks.0.attn.to_{c}"] for c in "qkv"]
    torch.testing.assert_close(up.float() @ down.float(), torch.cat(expected))
    other = replace(
        adapters, provenance=replace(adapters.provenance, pipeline_class="SanaPipeline")
    )
    save(other, path)
    assert main(["export", str(path), "--layout", "comfyui", "--out", str(tmp_path / "no")]) == 1
    assert "SanaPipeline is not known" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
