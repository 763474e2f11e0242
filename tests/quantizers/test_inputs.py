"""Rounding of what enters a layer: dynamic and static scales, running ranges, methods that use them."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import (
    DynamicInput,
    StaticInput,
    fake_quantize,
    input_from,
)
from evenkeel.quantizers.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.layers.static_ranges import RunningRange, searched
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.numbers.formats import Integer, format_named
from evenkeel.quantizers.workspace.calibration_set import kept
from evenkeel.quantizers.workspace.workspace import Workspace

law = settings(derandomize=True, max_examples=40, deadline=None)
UNSIGNED = {b: Integer(b, signed=False) for b in range(2, 9)}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- dynamic


@law
@given(st.integers(2, 8), st.none() | st.integers(1, 20), st.integers(1, 30))
def test_signed_integers_are_the_reference_rounding(bits: int, group: int | None, width: int):
    x = gaussian(3, 5, width, seed=bits)
    assert torch.equal(DynamicInput(Integer(bits), group)(x), fake_quantize(x, bits, group))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4"])
@pytest.mark.parametrize("group", [None, 4, 7])
def test_floating_formats_round_each_group_on_its_own_scale(name: str, group: int | None):
    x, form = gaussian(2, 3, 10), format_named(name)
    found = DynamicInput(form, group)(x)
    for start in range(0, 10, group or 10):
        part = x[..., start : start + (group or 10)]
        scale = part.abs().amax(-1, keepdim=True) / form.largest
        assert torch.equal(
            found[..., start : start + (group or 10)], form.round(part / scale) * scale
        )
    assert not torch.equal(found, x)


@law
@given(st.integers(3, 8), st.floats(-5, 5))
def test_zero_points_keep_zero_and_stay_within_half_a_step(bits: int, offset: float):
    x = gaussian(4, 12, seed=bits) + offset
    x[:, 0] = 0
    found = DynamicInput(UNSIGNED[bits], zero_point=True)(x)
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / (2**bits - 1)
    assert (found[:, 0] == 0).all()
    # half a step for the value, half for the zero point at the ends of the range
    assert ((found - x).abs() <= step[:, None] * 1.0001).all()


def test_a_zero_point_beats_symmetric_codes_on_one_sided_inputs():
    x = gaussian(50, 64).relu()
    asymmetric = (DynamicInput(UNSIGNED[4], zero_point=True)(x) - x).square().mean()
    symmetric = (DynamicInput(Integer(4))(x) - x).square().mean()
    assert asymmetric < symmetric / 3


def test_a_shift_is_the_folded_bias_of_the_paper():
    torch.manual_seed(0)
    layer, shift = nn.Linear(16, 8), 0.171875
    x = F.gelu(gaussian(6, 16))
    own = QuantizedLinear(
        layer.weight.detach(),
        layer.bias.detach(),
        activation=DynamicInput(UNSIGNED[4], 8, shift=shift),
    )
    parts = [(x[:, i : i + 8] + shift).clamp(min=0) for i in (0, 8)]
    steps = [p.amax(1, keepdim=True) / 15 for p in parts]
    rounded = torch.cat([(p / s).round() * s for p, s in zip(parts, steps, strict=True)], 1)
    folded = F.linear(rounded, layer.weight, layer.bias - shift * layer.weight.sum(1))
    torch.testing.assert_close(own(x), folded, rtol=1e-5, atol=1e-5)
    plain = QuantizedLinear(
        layer.weight.detach(), layer.bias.detach(), activation=DynamicInput(Integer(4), 8)
    )
    exact = layer(x)
    assert (own(x) - exact).norm() < 0.7 * (plain(x) - exact).norm()


def test_a_padded_pixel_is_exactly_zero_under_a_shift():
    conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)
    conv.weight.data.fill_(1.0)
    own = QuantizedConv2d(
        conv, conv.weight.detach(), activation=DynamicInput(UNSIGNED[8], shift=0.5)
    )
    assert own(torch.zeros(1, 2, 4, 4)).abs().max() < 1e-6


def test_rows_do_not_depend_on_the_batch_unless_asked_for():
    x = gaussian(4, 3, 8) * torch.tensor([1.0, 10.0, 0.1, 5.0])[:, None, None]
    own = DynamicInput(UNSIGNED[4], zero_point=True)
    pooled = DynamicInput(UNSIGNED[4], zero_point=True, across_batch=True)
    assert torch.equal(own(x)[:1], own(x[:1]))
    assert not torch.equal(pooled(x)[:1], pooled(x[:1]))
    assert torch.equal(pooled(x[:1]), own(x[:1]))


@pytest.mark.parametrize(
    "options",
    [
        {"format": Integer(4), "zero_point": True},
        {"format": Integer(4), "shift": 0.1},
        {"format": Integer(4, signed=False), "shift": 0.1, "zero_point": True},
        {"format": Integer(4), "group": 0},
    ],
)
def test_dynamic_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(QuantizationError):
        DynamicInput(**options)


def test_zero_rows_stay_zero_in_every_format():
    x = torch.zeros(2, 9)
    for form in (Integer(4), format_named("fp8_e4m3"), format_named("nf4")):
        assert torch.equal(DynamicInput(form, 4)(x), x)
    assert torch.equal(DynamicInput(UNSIGNED[4], zero_point=True)(x), x)


# ---------------------------------------------------------------- static


@law
@given(st.integers(2, 8), st.floats(-3, 3))
def test_static_rounding_is_torchs_own(bits: int, offset: float):
    x = gaussian(100, 6, seed=bits) + offset
    ranges = RunningRange(0.0)
    ranges.add(x)
    own = ranges.quantizer(bits)
    expected = torch.fake_quantize_per_tensor_affine(
        x * 1.5, own.scale.item(), int(own.zero.item()), 0, 2**bits - 1
    )
    torch.testing.assert_close(own(x * 1.5), expected, rtol=1e-6, atol=1e-6)


def test_the_two_halves_of_a_split_have_scales_of_their_own():
    x = torch.cat([gaussian(50, 4), 100 * gaussian(50, 6, seed=1)], 1)
    own = searched(x, 8, "absmax", split=4)
    left, right = (searched(part, 8, "absmax") for part in (x[:, :4], x[:, 4:]))
    assert torch.equal(own(x), torch.cat([left(x[:, :4]), right(x[:, 4:])], 1))
    one = searched(x, 8, "absmax")
    assert (own(x) - x)[:, :4].norm() < 0.05 * (one(x) - x)[:, :4].norm()


def test_a_searched_range_beats_the_extremes_under_outliers():
    x = gaussian(2000, 8)
    x[0, 0] = 12.0  # the search shrinks the range to a fifth at most
    errors = {
        s: (searched(x, 4, s)(x) - x).square().mean() for s in ("absmax", "mse", "percentile")
    }
    assert errors["mse"] < 0.5 * errors["absmax"]
    assert errors["percentile"] < errors["absmax"]


def test_running_ranges_average_and_merge():
    x, y = gaussian(30, 4), 3 * gaussian(20, 4, seed=1)
    widest, mean = RunningRange(0.0), RunningRange(0.9)
    for ranges in (widest, mean):
        ranges.add(x)
        ranges.add(y)
    assert widest.high.item() == torch.cat([x, y]).max()
    assert mean.low.item() == pytest.approx(0.9 * x.min().item() + 0.1 * y.min().item())
    with pytest.raises(QuantizationError, match="NaN"):
        mean.add(torch.tensor([[float("nan")]]))
    with pytest.raises(QuantizationError, match="no batch"):
        RunningRange().quantizer(8)
    with pytest.raises(QuantizationError, match="momentum"):
        RunningRange(1.0)


def test_bad_static_scales_are_refused():
    with pytest.raises(QuantizationError, match="shape"):
        StaticInput(8, torch.ones(2), torch.zeros(2))
    with pytest.raises(QuantizationError, match="positive"):
        StaticInput(8, torch.zeros(1), torch.zeros(1))


# ---------------------------------------------------------------- descriptions


@pytest.mark.parametrize(
    "own",
    [
        DynamicInput(Integer(4), 16),
        DynamicInput(UNSIGNED[4], 16, shift=0.25),
        DynamicInput(UNSIGNED[8], zero_point=True, across_batch=True),
        DynamicInput(format_named("fp8_e4m3")),
        StaticInput(6, torch.tensor([0.1, 0.2]), torch.tensor([3.0, 4.0]), split=5),
    ],
    ids=str,
)
def test_descriptions_give_back_the_same_rounding(own):
    tensors = {name: buffer.clone() for name, buffer in own.named_buffers()}
    again = input_from(json.loads(json.dumps(own.as_dict())), tensors)
    x = gaussian(3, 2, 33)
    assert torch.equal(again(x), own(x))
    assert repr(again) == repr(own)


@pytest.mark.parametrize(
    "found", [{"kind": "magic"}, {"kind": "dynamic"}, {"kind": "static", "bits": 8}]
)
def test_unknown_descriptions_are_refused(found):
    with pytest.raises(QuantizationError):
        input_from(found, {})


# ---------------------------------------------------------------- layers


def test_smoothing_folds_exactly():
    torch.manual_seed(0)
    s = torch.rand(12) + 0.5
    layer, x = nn.Linear(12, 7), gaussian(5, 12)
    own = QuantizedLinear(layer.weight.detach() * s, layer.bias.detach(), smoothing=s)
    torch.testing.assert_close(own(x), layer(x))
    conv, y = nn.Conv2d(12, 3, 3, padding=1, padding_mode="reflect"), gaussian(2, 12, 6, 6)
    folded = QuantizedConv2d(
        conv, conv.weight.detach() * s[:, None, None], conv.bias.detach(), smoothing=s
    )
    torch.testing.assert_close(folded(y), conv(y))


def test_the_first_token_gets_what_it_is_given():
    layer = QuantizedLinear(torch.eye(3), first_token=torch.tensor([7.0, 8.0, 9.0]))
    x = gaussian(2, 4, 3)
    found = layer(x)
    assert (found[:, 0] == torch.tensor([7.0, 8.0, 9.0])).all()
    assert torch.equal(found[:, 1:], x[:, 1:])


# ---------------------------------------------------------------- round to nearest


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.conv = nn.Linear(24, 24), nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.fc(x).mT[..., None])[..., 0].mT


def error(method: RoundToNearest) -> float:
    torch.manual_seed(0)
    net = Pair()
    mix = gaussian(24, 24, seed=9)  # correlated inputs, some of them large
    calls = [((gaussian(4, 40, 24, seed=i) @ mix,), {}) for i in range(4)]
    space = Workspace(net, kept(calls[:3]))
    method.quantize(space)
    x = calls[3][0][0]
    with torch.no_grad():
        exact = net(x)
        return float((space.quantized(x) - exact).norm() / exact.norm())


def test_errors_are_in_the_order_that_bits_and_methods_promise():
    plain = {bits: error(RoundToNearest(bits, 16, group=None)) for bits in (3, 4, 8)}
    assert plain[8] < plain[4] < plain[3]
    assert error(RoundToNearest(3, 16, group=8)) < plain[3]
    assert error(RoundToNearest(3, 16, group=None, rounding="gptq")) < plain[3]
    assert error(RoundToNearest(3, 16, group=None, zero_point=True)) < plain[3]
    dynamic = error(RoundToNearest(8, 4))
    assert error(RoundToNearest(8, 4, activation="group", group=8)) < dynamic
    assert dynamic < error(RoundToNearest(8, 4, activation="static"))
    for name in ("nvfp4", "mxfp4", "nf4", "fp4_e2m1"):
        assert error(RoundToNearest(4, 16, weight_format=name)) < 0.3
    assert error(RoundToNearest(8, 16, weight_format="fp8_e4m3")) < 0.05
    assert error(RoundToNearest(16, 16)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 9},
        {"activation": "row"},
        {"rounding": "stochastic"},
        {"range": "kl"},
        {"activation": "static", "activation_bits": 8, "activation_format": "fp8_e4m3"},
        {"weight_format": "fp8_e4m3"},
        {"weight_format": "nf4", "zero_point": True},
    ],
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(QuantizationError):
        RoundToNearest(**options)
