"""Plain rounding gives the bits that it gave when it was written in two places.

``one_engine.json`` holds digests of layers, reports and files as the engine of specifications made them
before it and that of methods became one (``test_both_engines_make_the_same_layers`` at commit 1d8e9a5
compared the two). It was written there by

    python tests/quantizers/test_one_engine.py > tests/quantizers/one_engine.json

Numbers are made without any library's random generator or singular values, and no sums over many
numbers enter, so the digests are those of every machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evenkeel.quantizers import DEFAULT_SKIP, QuantizerSpec, quantize_module, save_quantized
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.saved.layer_files import write_layer
from evenkeel.quantizers.saved.report import QuantizationReport

FROZEN = Path(__file__).with_name("one_engine.json")
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


def catalogue() -> list[tuple[QuantizerSpec, torch.dtype]]:
    """Every width of weights with every kind of group, and beside them all else that can be said."""
    found = []
    pairs = itertools.product((2, 3, 4, 5, 6, 7, 8, 16), (64, None, 4, 5))
    for place, (bits, group) in enumerate(pairs):
        rank = 0 if bits == 16 else (0, 1, 0, 3, 2)[place % 5]
        spec = QuantizerSpec(
            bits,
            activation_bits=(16, 4, 8, 5, 6, 7)[place % 6],
            group=group,
            rank=rank,
            activation="token" if place % 3 == 1 else "group",
        )
        found.append((spec, DTYPES[place % len(DTYPES)]))
    skipping = (
        QuantizerSpec(3, 8, skip=("blocks", "*wise")),
        QuantizerSpec(4, 16, skip=(), only=("blocks.*.a", "conv", "proj_out")),
        QuantizerSpec(4, 4, group=2, rank=1, skip=("conv",), only=("*conv", "blocks")),
    )
    return [*found, *((spec, torch.float32) for spec in skipping)]


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
    """All that is to stay of a layer: its state, how files hold it, and what it multiplies."""
    tensors, description = write_layer(layer)
    grid, scales = layer.stored or (None, None)
    return {
        "state": {name: bits(t) for name, t in layer.state_dict().items()},
        "strides": layer.weight.stride(),  # a convolution sums in an order that depends on them
        "file": {name: bits(t) for name, t in sorted(tensors.items())},
        "description": description,
        "grid": str(grid),
        "scale": scales and bits(scales.scale),
        "rounded": bits(layer.rounded(entering(layer))),
        "text": repr(layer),
    }


def told(report: QuantizationReport) -> list[Any]:
    """What the report says; errors to six digits, for they are sums."""
    found = report.as_dict()
    layers = [{**one, "weight_error": f"{one['weight_error']:.6g}"} for one in found["layers"]]
    return [found["spec"], layers, found["stored_bytes"], found["full_precision_bytes"]]


def digest(*found: object) -> str:
    return hashlib.sha256(repr(found).encode()).hexdigest()


@contextmanager
def singular_values_of_nothing() -> Iterator[None]:
    """Factors of few binary digits in place of LAPACK's, whose last bits depend on the machine."""

    def svd(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = matrix.shape
        count = min(rows, columns)
        left = (torch.arange(rows * count) * 7 % 17 - 8).reshape(rows, count)
        right = (torch.arange(count * columns) * 5 % 13 - 6).reshape(count, columns)
        sizes = 4.0 ** -torch.arange(count, dtype=torch.float64)
        return left.double() / 16, sizes, right.double() / 8

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", svd)
        yield


def made(spec: QuantizerSpec, dtype: torch.dtype) -> str:
    with singular_values_of_nothing():
        new, report = quantize_module(Net(dtype), spec)
    layers = {n: contents(m) for n, m in new.named_modules() if isinstance(m, QuantizedLayer)}
    assert layers
    return digest(layers, told(report), str(report), new.evenkeel_quantizer)


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


def saved(text: str) -> str:
    """Of a folder's tensors, and of what it says of every layer."""
    spec = QuantizerSpec.parse(text, skip=(*DEFAULT_SKIP, "*.attn2.to_v"))
    with singular_values_of_nothing(), tempfile.TemporaryDirectory() as place:
        new, _ = quantize_module(sana(), spec)
        folder = save_quantized(new, Path(place))
        tensors = load_file(folder / "quantized.safetensors")
        layers = json.loads((folder / "quantized.json").read_text())["layers"]
    return digest({name: bits(tensors[name]) for name in sorted(tensors)}, layers)


CATALOGUE = {
    f"{spec} {dtype} skip={spec.skip != DEFAULT_SKIP} only={spec.only}": (spec, dtype)
    for spec, dtype in catalogue()
}
SAVED = ("w3a4-g16-r2", "w4a8-gnone-token", "w2a16-g5")


@pytest.mark.parametrize("name", CATALOGUE)
def test_layers_and_reports_are_those_of_the_engine_of_specifications(name: str) -> None:
    assert made(*CATALOGUE[name]) == json.loads(FROZEN.read_text())[name]


@pytest.mark.parametrize("text", SAVED)
def test_folders_hold_the_tensors_that_they_held(text: str) -> None:
    assert saved(text) == json.loads(FROZEN.read_text())[text]


def test_a_digest_tells_one_bit_and_one_word_apart() -> None:
    x = torch.zeros(3)
    assert digest(bits(x)) == digest(bits(x.clone())) != digest(bits(-x))
    name = next(iter(CATALOGUE))
    spec, dtype = CATALOGUE[name]
    assert made(QuantizerSpec(spec.weight_bits, 8, spec.group), dtype) != made(spec, dtype)


if __name__ == "__main__":
    found = {name: made(*one) for name, one in CATALOGUE.items()}
    print(json.dumps(found | {text: saved(text) for text in SAVED}, indent=1))
