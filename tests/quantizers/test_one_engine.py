"""Plain rounding by its two engines: a specification, and a method on a workspace, to the bit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evenkeel.quantizers import (
    DEFAULT_SKIP,
    QuantizerSpec,
    RoundToNearest,
    SVDQuant,
    quantize_module,
    save_quantized,
)
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.saved.layer_files import write_layer
from evenkeel.quantizers.saved.report import QuantizationReport
from evenkeel.quantizers.workspace.calibration_set import kept
from evenkeel.quantizers.workspace.workspace import Workspace

DTYPES = (torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float64)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values over several orders of magnitude, ties among them, by whole-number arithmetic alone."""
    count = torch.Size(shape).numel()
    whole = (torch.arange(count) * 1117 + 389 * seed) % 2039 - 1019
    return (whole**3).double().div(2.0**24).reshape(shape).to(dtype)


class Net(nn.Module):
    """One of each: groups that divide the width and do not, every kind of convolution, a head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj_out = nn.Linear(8, 4)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"a": nn.Linear(21, 12), "b": nn.Linear(12, 8)})]
        )
        self.wide = nn.Linear(70, 6, bias=False)
        self.conv = nn.Conv2d(6, 5, 3, padding=1)
        self.point = nn.Conv2d(12, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        for seed, tensor in enumerate(self.parameters()):
            tensor.data = numbers(*tensor.shape, seed=seed, dtype=dtype)
        weight = self.blocks[0]["a"].weight.data
        weight[0] = 0
        weight[1] *= 1e-40  # below every normal number of float32
        weight[2, :4] = torch.tensor([3.0, 1.5, -0.5, 2.5])

    def forward(self, x: Tensor, wide: Tensor, image: Tensor) -> Tensor:
        x = self.proj_out(self.blocks[0]["b"](torch.relu(self.blocks[0]["a"](x))))
        image = self.depthwise(self.point(image))
        return x.sum() + self.wide(wide).sum() + self.conv(image).sum()


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        numbers(3, 21, seed=50, dtype=dtype),
        numbers(2, 3, 70, seed=51, dtype=dtype),
        numbers(2, 12, 5, 4, seed=52, dtype=dtype),
    )


def catalogue() -> list[tuple[QuantizerSpec, torch.dtype]]:
    """Every width of weights with every kind of group, and beside them all else that can be said."""
    found = []
    pairs = itertools.product((2, 3, 4, 5, 6, 7, 8, 16), (64, None, 4, 5))
    for place, (bits, group) in enumerate(pairs):
        rank = 0 if bits == 16 else (0, 1, 0, 3, 2)[place % 5]
        # SVDQuant has one size of groups for both operands, so it cannot say rank and token.
        token = place % 3 == 1 and not rank
        spec = QuantizerSpec(
            bits,
            activation_bits=(16, 4, 8, 5, 6, 7)[place % 6],
            group=group,
            rank=rank,
            activation="token" if token else "group",
        )
        found.append((spec, DTYPES[place % len(DTYPES)]))
    skipping = (
        QuantizerSpec(3, 8, skip=("blocks", "*wise")),
        QuantizerSpec(4, 16, skip=(), only=("blocks.*.a", "conv", "proj_out")),
        QuantizerSpec(4, 4, group=2, rank=1, skip=("conv",), only=("*conv", "blocks")),
    )
    return [*found, *((spec, torch.float32) for spec in skipping)]


def as_method(spec: QuantizerSpec, skip: tuple[str, ...]) -> RoundToNearest | SVDQuant:
    """The same, said of the other engine."""
    if not spec.rank:
        return RoundToNearest(
            spec.weight_bits,
            spec.activation_bits,
            group=spec.group,
            activation=spec.activation,
            skip=skip,
        )
    return SVDQuant(
        spec.weight_bits,
        spec.activation_bits,
        group=spec.group,
        rank=spec.rank,
        iterations=1,
        smoothing=False,
        shared=False,
        unsigned=False,
        skip=skip,
        branch_skip=(),
        activation_skip=(),
    )


def by_method(spec: QuantizerSpec, net: nn.Module) -> tuple[nn.Module, QuantizationReport]:
    _, reported = quantize_module(net, spec)
    skip = tuple(layer.name for layer in reported.kept)  # methods know no `only`
    asked = [kept([(inputs(torch.float32), {})])] if isinstance(net, Net) else [None]
    method = as_method(spec, skip)
    workspace = Workspace(net, asked[0] if method.calibrated else None)
    method.quantize(workspace)
    return workspace.result(method)


def bits(x: Tensor) -> tuple[Any, ...]:
    """Dtype, shape and bytes: two zeros of different sign differ."""
    flat = x.detach().contiguous().flatten().view(torch.uint8)
    return str(x.dtype), tuple(x.shape), flat.numpy().tobytes()


def entering(layer: QuantizedLayer) -> Tensor:
    """An input for a layer, in its dtype."""
    count = getattr(layer, "in_features", None)
    dtype = layer.weight.dtype
    if count is not None:
        return numbers(2, 3, count, seed=60, dtype=dtype)
    return numbers(2, layer.in_channels, 4, 5, seed=61, dtype=dtype)


def contents(layer: QuantizedLayer) -> dict[str, Any]:
    """All that is to be the same of a layer: its state, how files hold it, and what it computes."""
    tensors, description = write_layer(layer)
    x = entering(layer)
    grid, scales = layer.stored or (None, None)
    return {
        "state": {name: bits(t) for name, t in layer.state_dict().items()},
        "file": {name: bits(t) for name, t in tensors.items()},
        "description": description,
        "grid": str(grid),
        "scale": scales and bits(scales.scale),
        "rounded": bits(layer.rounded(x)),
        "output": bits(layer(x)),
        "text": repr(layer),
    }


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLayer)}


@pytest.mark.parametrize(("spec", "dtype"), catalogue(), ids=str)
def test_both_engines_make_the_same_layers(spec: QuantizerSpec, dtype: torch.dtype) -> None:
    net = Net(torch.float32)
    if not spec.rank:
        net = Net(dtype)  # what methods calibrate on is float32
    ours, told = quantize_module(net, spec)
    others, told_other = by_method(spec, net)
    found, expected = quantized_layers(ours), quantized_layers(others)
    assert list(found) == list(expected)
    assert found
    for name, layer in found.items():
        one, other = contents(layer), contents(expected[name])
        if name == "point" and spec.group == 5:
            # Groups that do not divide the width leave the strides of a 1 x 1 filter in another
            # order, and with them the convolution may sum in another order.
            del one["output"], other["output"]
        assert one == other, name
    assert told.stored_bytes == told_other.stored_bytes
    for one, other in zip(told.layers, told_other.layers, strict=True):
        assert replace(one, note="", reason="", output_error=None) == replace(
            other, note="", reason="", output_error=None
        )


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    net: nn.Module = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=16, sample_size=8, guidance_embeds=True,
    ).eval()  # fmt: skip
    for seed, tensor in enumerate(net.parameters()):
        tensor.data = numbers(*tensor.shape, seed=seed)
    return net


@pytest.mark.parametrize("text", ["w3a4-g16", "w4a8-gnone-token", "w2a16-g5"])
def test_both_engines_save_the_same_tensors(text: str, tmp_path: Path) -> None:
    net, spec = sana(), QuantizerSpec.parse(text, skip=(*DEFAULT_SKIP, "*.attn2.to_v"))
    one = load_file(
        save_quantized(*quantize_module(net, spec), tmp_path / "a") / "quantized.safetensors"
    )
    other = load_file(
        save_quantized(*by_method(spec, net), tmp_path / "b") / "quantized.safetensors"
    )
    assert {k: bits(t) for k, t in one.items()} == {k: bits(t) for k, t in other.items()}
    assert any(name.endswith("weight.codes") for name in one)
