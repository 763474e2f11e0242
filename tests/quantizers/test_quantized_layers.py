"""Quantized layers as integer arithmetic."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_denoisers import (
    gaussian,
)
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.quantizers import (
    QuantizerSpec,
    fake_quantize,
    quantize_module,
)
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import fit


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)  # the layers and denoisers below start from random weights


def scale_of(x: Tensor, bits: int, group: int | None) -> Tensor:
    return fit(x, Grid(Integer(bits), group)).scale


def integer_linear(layer: nn.Linear, x: Tensor, spec: QuantizerSpec) -> Tensor:
    """What an integer kernel computes: per group, integer dot products times two scales."""
    assert spec.group is not None
    total = layer.bias.detach().clone()
    for start in range(0, layer.in_features, spec.group):
        stop = start + spec.group
        w, a = layer.weight.detach()[:, start:stop], x[..., start:stop]
        w_scale, a_scale = (
            scale_of(w, spec.weight_bits, None),
            scale_of(a, spec.activation_bits, None),
        )
        w_codes, a_codes = (w / w_scale).round().long(), (a / a_scale).round().long()
        total = total + (a_codes @ w_codes.T).double() * a_scale * w_scale.T
    return total


@pytest.mark.parametrize("text", ["w4a4-g8", "w2a8-g10", "w8a5-g64"])
def test_the_simulation_equals_integer_arithmetic(text: str) -> None:
    spec = QuantizerSpec.parse(text)
    layer = nn.Linear(24, 7).double()
    x = gaussian(2, 5, 24, dtype=torch.float64)
    found = spec.layer(layer)(x)
    torch.testing.assert_close(found, integer_linear(layer, x, spec), rtol=1e-12, atol=1e-12)
    assert (found - layer(x)).abs().max() > 1e-3


def test_the_branch_sees_the_activation_before_rounding() -> None:
    layer, x = nn.Linear(24, 7).double(), gaussian(5, 24, dtype=torch.float64)
    new = QuantizerSpec(3, 4, group=8, rank=2).layer(layer)
    assert new.rank == 2
    expected = F.linear(fake_quantize(x, 4, 8), new.weight, layer.bias) + x @ new.down.T @ new.up.T
    torch.testing.assert_close(new(x), expected)
    residual = layer.weight.detach() - new.up @ new.down
    torch.testing.assert_close(new.weight, fake_quantize(residual, 3, 8))


def test_rank_lowers_the_weight_error() -> None:
    net = nn.Sequential(nn.Linear(48, 40))
    errors = [
        quantize_module(net, QuantizerSpec(3, group=16, rank=r))[1].layers[0].weight_error
        for r in (0, 4, 16, 36)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_activation_groups_per_token() -> None:
    layer, x = nn.Linear(24, 7), gaussian(5, 24)
    token = QuantizerSpec(16, 4, group=8, activation="token").layer(layer)
    grouped = QuantizerSpec(16, 4, group=8).layer(layer)
    assert torch.equal(token(x), F.linear(fake_quantize(x, 4, None), layer.weight, layer.bias))
    assert torch.equal(grouped(x), F.linear(fake_quantize(x, 4, 8), layer.weight, layer.bias))
    # one token's values never change another's result
    assert torch.equal(token(x)[0], token(torch.cat([x[:1], 100 * x[1:]]))[0])


@pytest.mark.parametrize("activation", ["group", "token"])
def test_a_pointwise_convolution_is_a_linear_layer_per_pixel(activation: str) -> None:
    spec = QuantizerSpec(4, 4, group=4, activation=activation)
    conv = nn.Conv2d(10, 6, 1).double()
    linear = nn.Linear(10, 6).double()
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    x = gaussian(2, 10, 3, 4, dtype=torch.float64)
    expected = spec.layer(linear)(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(spec.layer(conv)(x), expected)


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": (1, 2), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "bias": False},
        {"groups": 2},
    ],
)
def test_convolution_geometry_is_kept(geometry: dict[str, object]) -> None:
    conv = nn.Conv2d(4, 6, 3, **geometry)  # type: ignore[arg-type]
    x = gaussian(2, 4, 7, 8)
    assert torch.equal(QuantizerSpec(16).layer(conv)(x), conv(x))
    rounded = QuantizerSpec(16, 8).layer(conv)(x)
    assert rounded.shape == conv(x).shape
    assert 0 < (rounded - conv(x)).abs().max() < 0.1


def small_layers(spec: QuantizerSpec) -> list[tuple[nn.Module, Tensor]]:
    conv_spec = QuantizerSpec(spec.weight_bits, spec.activation_bits, spec.group)
    return [
        (spec.layer(nn.Linear(12, 8)), gaussian(3, 12)),
        (conv_spec.layer(nn.Conv2d(4, 6, 3)), gaussian(2, 4, 5, 5)),
    ]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layers_follow_the_dtype(which: int, dtype: torch.dtype) -> None:
    layer, x = small_layers(QuantizerSpec(4, 8, group=4, rank=2))[which]
    exact = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    assert {t.dtype for t in layer.state_dict().values()} == {dtype}


@pytest.mark.parametrize("which", [0, 1])
def test_layers_can_be_copied_pickled_and_stored(which: int) -> None:
    layer, x = small_layers(QuantizerSpec(4, 8, group=4, rank=2))[which]
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    other, _ = small_layers(QuantizerSpec(4, 8, group=4, rank=2))[which]
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert list(layer.parameters()) == []
    assert "int8/4" in repr(layer)


@pytest.mark.parametrize("which", [0, 1])
def test_layers_trace_without_a_graph_break(which: int) -> None:
    layer, x = small_layers(QuantizerSpec(4, 8, group=5, rank=2))[which]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
