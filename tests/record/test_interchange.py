"""Adapters beside the layers of every backend: whoever loads them gives base + B A x."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_denoisers
import torch
from backend_denoisers import needs
from made_adapters import made_adapters
from quantized_by import BACKENDS, WIDE
from safetensors.torch import load_file
from torch import Tensor, nn

from evenkeel.cli.sources import load_denoiser
from evenkeel.corrections import RecoveryAdapters
from evenkeel.fitting.adapters.effective_weight import effective_weight
from evenkeel.hosts.actuators.beside import with_adapters
from evenkeel.low_rank.factors import LayerAdapter, fit_factors
from evenkeel.low_rank.metric import OutputMetric
from evenkeel.record.lora_file import FILE, peft_files, write_lora

WIDTH = 64
logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")


def flux(width: int = WIDTH) -> nn.Module:
    """Wide enough for every backend: the width divides the inputs of all layers in its blocks."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=width // 16, joint_attention_dim=width, pooled_projection_dim=width,
            axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ).eval()  # fmt: skip


def called(model: nn.Module) -> Any:
    g = small_denoisers.gaussian
    with torch.no_grad():
        return model(
            hidden_states=g(1, 4, 16), encoder_hidden_states=g(1, 3, WIDTH, seed=1),
            pooled_projections=g(1, WIDTH, seed=2), timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3), guidance=torch.tensor([3.5]),
        )  # fmt: skip


SKIPPED = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")


@pytest.fixture(params=[*BACKENDS, *WIDE], scope="module")
def quantized(request: pytest.FixtureRequest) -> nn.Module:
    package, build = {**BACKENDS, **WIDE}[request.param]
    needs(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = {"run": called} if package == "modelopt" else {}
        return build(flux(), SKIPPED, **extra)


@pytest.fixture(scope="module")
def adapters() -> RecoveryAdapters:
    return made_adapters(flux())


def answers(model: nn.Module, adapters: RecoveryAdapters) -> dict[str, Tensor]:
    """Of every layer with an adapter, to the same input in every model."""
    found = {}
    for index, adapter in enumerate(adapters.layers):
        x = small_denoisers.gaussian(5, adapter.down.width, seed=index)
        with torch.no_grad():
            found[adapter.name] = model.get_submodule(adapter.name)(x).float()
    return found


def changes(adapters: RecoveryAdapters) -> dict[str, Tensor]:
    def change(index: int, adapter: LayerAdapter) -> Tensor:
        x = small_denoisers.gaussian(5, adapter.down.width, seed=index)
        return (x @ adapter.down.dense().T) @ adapter.up.dense()

    return {a.name: change(i, a) for i, a in enumerate(adapters.layers)}


@contextmanager
def loaded_by_us(model: Any, adapters: RecoveryAdapters, folder: Path) -> Iterator[None]:
    with with_adapters(model, adapters):
        yield


@contextmanager
def loaded_by_diffusers(model: Any, adapters: RecoveryAdapters, folder: Path) -> Iterator[None]:
    write_lora(adapters, folder / FILE)
    model.load_lora_adapter(folder / FILE, prefix="transformer")
    yield
    model.unload_lora()


@contextmanager
def loaded_by_peft(model: Any, adapters: RecoveryAdapters, folder: Path) -> Iterator[None]:
    from peft import PeftModel

    for name, content in peft_files(adapters).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    beside = PeftModel.from_pretrained(model, folder)
    yield
    beside.unload()


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("loaded", [loaded_by_us, loaded_by_diffusers, loaded_by_peft])
def test_a_loader_adds_exactly_the_adapter(quantized, adapters, tmp_path, loaded):
    before = answers(quantized, adapters)
    with loaded(quantized, adapters, tmp_path):
        after = answers(quantized, adapters)
    for name, change in changes(adapters).items():
        assert (after[name] - before[name] - change).norm() < 2e-3 * change.norm(), name
    again = answers(quantized, adapters)
    assert all(torch.equal(again[name], value) for name, value in before.items())


@pytest.mark.filterwarnings("ignore")
def test_fusing_it_into_a_quantized_weight_is_refused_or_wrong(quantized, adapters, tmp_path):
    """Why the card says: never. The last test of every backend, as some of them are changed by it."""
    write_lora(adapters, tmp_path / FILE)
    quantized.load_lora_adapter(tmp_path / FILE, prefix="transformer")
    beside = answers(quantized, adapters)
    changed = changes(adapters)
    for name in changed:
        layer = quantized.get_submodule(name)
        if name.startswith(("transformer_blocks", "single")) and "norm" not in name:
            with contextlib.suppress(RuntimeError, ValueError):  # theirs, for want of a way
                layer.merge()
                error = answers(quantized, adapters)[name] - beside[name]
                assert error.norm() > 0.1 * changed[name].norm(), name
                return
            return


def test_comfyuis_layout_is_the_same_for_its_fused_layers(adapters, tmp_path):
    """ComfyUI adds alpha / rank times up (down x) beside the fused layer, or to its weight."""
    tensors = load_file(write_lora(adapters, tmp_path / "comfyui.safetensors", "comfyui"))
    added = {a.name: a.change for a in adapters.layers}
    for layer, parts in {
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{c}_proj" for c in "qkv"],
        "single_blocks.0.linear1": [
            *(f"single_transformer_blocks.0.attn.to_{c}" for c in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    }.items():
        up, down, alpha = (
            tensors[f"diffusion_model.{layer}.{key}"].float()
            for key in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        found = alpha / len(down) * up @ down
        torch.testing.assert_close(found, torch.cat([added[name] for name in parts]))


# ---- blocks of GGUF: any bytes are weights, so that no writer of K-quants is needed

GGUF = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def blocks(kind: Any, rows: int, columns: int, seed: int) -> Tensor:
    """(rows, bytes) drawn at random; without those whose scales say infinity, or are out of hand."""
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions

    size, stored = GGML_QUANT_SIZES[kind]
    count = rows * columns // size
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 256, (16 * count, stored), dtype=torch.uint8, generator=generator)
    largest = dequantize_functions[kind](drawn, size, stored).float().abs().nan_to_num(1e9).amax(1)
    return drawn[(largest > 0.01) & (largest < 10)][:count].reshape(rows, -1)


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A file with all kinds of blocks in turn, loaded as users load it."""
    gguf = needs("gguf")
    reference = flux(256)
    path = tmp_path_factory.mktemp("gguf") / "flux.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    count = 0
    for name, tensor in reference.state_dict().items():
        if tensor.ndim == 2 and tensor.shape[1] % 256 == 0 and "blocks" in name:
            kind = gguf.GGMLQuantizationType[GGUF[count % len(GGUF)]]
            writer.add_tensor(name, blocks(kind, *tensor.shape, count).numpy(), raw_dtype=kind)
            count += 1
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_denoiser(str(path), SimpleNamespace(transformer=reference))


@pytest.mark.parametrize("kind", GGUF)
def test_a_layer_of_any_gguf_block_is_recovered(gguf_model, kind):
    name, layer = next(
        (name, layer)
        for name, layer in gguf_model.named_modules()
        if getattr(getattr(layer, "weight", None), "quant_type", None) is not None
        and layer.weight.quant_type.name == kind
    )
    weight = effective_weight(layer)
    outputs, features = weight.shape
    assert weight.isfinite().all() and weight.std() > 1e-3
    up, down = (small_denoisers.gaussian(n, 3, seed=i) for i, n in enumerate((outputs, features)))
    full = weight + 0.1 * weight.std() * up @ down.T  # what the blocks are the rounding of
    x = small_denoisers.gaussian(200, features, seed=2)
    metric = OutputMetric(x.T @ x / len(x) + 1e-3 * torch.eye(features), None)
    change = full - weight
    adapter = fit_factors(name, metric, change, metric.components(change, 3), 3, 16)
    found = replace(made_adapters(flux()), layers=(adapter,), bits=16)
    with torch.no_grad(), with_adapters(gguf_model, found):
        answered = layer(x)
    with torch.no_grad():
        plain = layer(x)
    wanted = x @ full.T + (0 if layer.bias is None else layer.bias)
    assert (answered - wanted).norm() < 2e-3 * (plain - wanted).norm()


def test_nf4_of_the_tests_above_is_quantized_twice():
    """Its scales are of 8 bits themselves: what everybody loads, and what ``nf4`` is here."""
    _, build = BACKENDS["bitsandbytes nf4"]
    needs("bitsandbytes")
    layer = build(nn.Sequential(nn.Linear(WIDTH, 32)))[0]
    assert layer.weight.quant_state.nested
    assert layer.weight.quant_state.absmax.dtype == torch.uint8
