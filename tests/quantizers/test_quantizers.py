"""The reference quantizer: laws of rounding, layers as integer arithmetic, reports, files."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import QuantizationError
from evenkeel.quantizers import (
    DEFAULT_SKIP,
    QuantizationReport,
    QuantizedLinear,
    QuantizerSpec,
    best_low_rank,
    fake_quantize,
    load_quantized,
    quantize_module,
    save_quantized,
)
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid, fit, snap_weight

law = settings(derandomize=True, max_examples=60, deadline=None)
BITS = st.integers(2, 8)
GROUPS = st.none() | st.integers(2, 40)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """(rows, width) float32 with ties, zeros, zero rows and outliers, but nothing near 1e-38."""
    width = draw(st.integers(1, 33))
    # Few distinct values give ties and repeated maxima; floats give the rest.
    value = st.integers(-8, 8).map(float) | st.floats(-1e6, 1e6, width=32).map(
        lambda v: v if abs(v) > 1e-20 else 0.0
    )
    row = st.lists(value, min_size=width, max_size=width) | st.just([0.0] * width)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)), dtype=torch.float32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)  # the layers and denoisers below start from random weights


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def scale_of(x: Tensor, bits: int, group: int | None) -> Tensor:
    return fit(x, Grid(Integer(bits), group)).scale


def per_value(scale: Tensor, width: int, group: int | None) -> Tensor:
    return scale.repeat_interleave(group or width, -1)[..., :width]


# ---------------------------------------------------------------- uniform.py


@law
@given(rows(), BITS, GROUPS)
def test_error_is_at_most_half_a_step(x: Tensor, bits: int, group: int | None) -> None:
    error = (fake_quantize(x, bits, group) - x).abs()
    step = per_value(scale_of(x, bits, group), x.shape[-1], group)
    # float32 carries codes up to 127 with 24 bits: 127 * 2**-23 of a step is rounding
    assert (error <= step * (0.5 + 2e-5)).all()


def test_half_a_step_is_reached() -> None:
    x = gaussian(64, 64)
    error = (fake_quantize(x, 4, None) - x).abs() / scale_of(x, 4, None)
    assert 0.49 < error.max() <= 0.5 + 1e-6


@law
@given(rows(), BITS, GROUPS)
def test_same_as_a_loop_over_groups_in_numpy(x: Tensor, bits: int, group: int | None) -> None:
    wide = x.double().numpy()
    expected = np.zeros_like(wide)
    size = group or wide.shape[1]
    for start in range(0, wide.shape[1], size):
        part = wide[:, start : start + size]
        scale = np.abs(part).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        safe = np.where(scale == 0, 1.0, scale)
        expected[:, start : start + size] = np.rint(part / safe) * scale
    found = fake_quantize(x.double(), bits, group)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_same_as_torch_per_channel_fake_quantize(bits: int) -> None:
    x = gaussian(16, 50)
    top = 2 ** (bits - 1) - 1
    expected = torch.fake_quantize_per_channel_affine(
        x, x.abs().amax(1) / top, torch.zeros(16, dtype=torch.int32), 0, -top, top
    )
    torch.testing.assert_close(fake_quantize(x, bits, None), expected, rtol=1e-6, atol=1e-7)


@law
@given(rows(), BITS, GROUPS)
def test_quantizing_twice_changes_nothing(x: Tensor, bits: int, group: int | None) -> None:
    once = fake_quantize(x, bits, group)
    torch.testing.assert_close(fake_quantize(once, bits, group), once, rtol=1e-6, atol=0)


@law
@given(rows(), BITS, GROUPS)
def test_odd_symmetry(x: Tensor, bits: int, group: int | None) -> None:
    assert torch.equal(fake_quantize(-x, bits, group), -fake_quantize(x, bits, group))


@law
@given(rows(), BITS, GROUPS, st.integers(-12, 12))
def test_powers_of_two_pass_through(x: Tensor, bits: int, group: int | None, power: int) -> None:
    scaled = fake_quantize(x * 2.0**power, bits, group)
    assert torch.equal(scaled, fake_quantize(x, bits, group) * 2.0**power)


@law
@given(rows(), BITS, GROUPS)
def test_no_more_levels_than_the_bits_allow(x: Tensor, bits: int, group: int | None) -> None:
    step = per_value(scale_of(x, bits, group), x.shape[-1], group)
    codes = fake_quantize(x, bits, group) / step
    torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=0)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1 + 1e-4


def test_every_level_is_used() -> None:
    codes = fake_quantize(torch.linspace(-7, 7, 1001), 4, None).round().unique()
    assert codes.tolist() == list(range(-7, 8))


def test_each_bit_quarters_the_squared_error() -> None:
    x = gaussian(256, 64)
    errors = [(fake_quantize(x, bits, 64) - x).square().mean().item() for bits in range(2, 9)]
    steps = [2 ** (bits - 1) - 1 for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    # uniform noise theory, error ~ 1 / q_max**2, holds once the step is small
    assert errors[-2] / errors[-1] == pytest.approx((steps[-1] / steps[-2]) ** 2, rel=0.03)


def test_finer_groups_lower_the_error() -> None:
    x = gaussian(64, 128)
    errors = [(fake_quantize(x, 4, g) - x).square().mean().item() for g in (8, 32, 128)]
    assert errors == sorted(errors)


def test_a_group_that_does_not_divide_the_width_ends_in_a_smaller_one() -> None:
    x = gaussian(3, 10)
    parts = [fake_quantize(x[:, a:b].contiguous(), 3, None) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert torch.equal(fake_quantize(x, 3, 4), torch.cat(parts, 1))
    assert scale_of(x, 3, 4).shape == (3, 3)


def test_a_group_wider_than_the_tensor_is_the_whole_row() -> None:
    x = gaussian(3, 10)
    assert torch.equal(fake_quantize(x, 4, 1000), fake_quantize(x, 4, None))
    assert not torch.equal(fake_quantize(x, 4, 5), fake_quantize(x, 4, None))


def test_zero_groups_are_zero_and_have_scale_one() -> None:
    x = torch.tensor([[0.0, 0.0, 3.0, -1.0]])
    assert scale_of(x, 3, 2).tolist() == [[1.0, 1.0]]
    assert fake_quantize(x, 3, 2).tolist() == [[0.0, 0.0, 3.0, -1.0]]


def test_values_too_small_for_a_normal_step_become_zero_not_nan() -> None:
    x = torch.tensor([1e-40, -1e-45, 0.0])
    assert fake_quantize(x, 8, None).tolist() == [0.0, 0.0, 0.0]


def test_an_outlier_hurts_its_own_group_only() -> None:
    x = gaussian(1, 32)
    spoilt = x.clone()
    spoilt[0, 20] = 1000.0
    clean, hurt = fake_quantize(x, 4, 8), fake_quantize(spoilt, 4, 8)
    inside = torch.arange(32) // 8 == 20 // 8
    assert torch.equal(clean[:, ~inside], hurt[:, ~inside])
    others = inside & (torch.arange(32) != 20)
    assert (clean[:, others] != 0).any()
    assert (hurt[:, others] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_the_arithmetic_is_wide(dtype: torch.dtype) -> None:
    x = gaussian(4, 24, dtype=dtype)
    found = fake_quantize(x, 5, 8)
    assert found.dtype == dtype
    wide = fake_quantize(x.to(torch.promote_types(dtype, torch.float32)), 5, 8)
    assert torch.equal(found, wide.to(dtype))


def test_the_largest_half_precision_value_survives() -> None:
    x = torch.tensor([65504.0, -65504.0, 6e-8], dtype=torch.float16)
    assert fake_quantize(x, 8, None).tolist() == [65504.0, -65504.0, 0.0]


def test_empty_batches_pass() -> None:
    assert fake_quantize(torch.zeros(0, 6), 4, 4).shape == (0, 6)


def test_activations_are_not_inspected_but_nan_does_not_hide() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0, 1.0], [1.0, float("inf"), 2.0, 1.0]])
    found = fake_quantize(x, 4, 2)
    assert found[:, :2].isnan().all()
    assert found[:, 2:].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [4, 16])
def test_weights_that_are_not_finite_are_refused(bad: float, bits: int) -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data[1, 2] = bad
    with pytest.raises(QuantizationError, match="1 of 12 values that are NaN or infinite"):
        quantize_module(nn.Sequential(layer), QuantizerSpec(bits))


@pytest.mark.parametrize(
    ("x", "bits", "group", "says"),
    [
        (torch.ones(4), 1, None, "2 to 8 bits, got 1"),
        (torch.ones(4), 9, None, "2 to 8 bits, got 9"),
        (torch.ones(4), 4, 0, "at least 1"),
        (torch.ones(4, dtype=torch.int64), 4, None, "floating point"),
        (torch.tensor(1.0), 4, None, "last dimension"),
        (torch.ones(2, 0), 4, None, "last dimension"),
    ],
)
def test_misuse_is_refused(x: Tensor, bits: int, group: int | None, says: str) -> None:
    with pytest.raises(QuantizationError, match=says):
        fake_quantize(x, bits, group)


def test_kernel_positions_of_a_convolution_are_quantized_apart() -> None:
    weight = gaussian(5, 12, 2, 3)
    grid = Grid(Integer(3), 8)
    whole = snap_weight(weight, grid)[0]
    for i in range(2):
        for j in range(3):
            assert torch.equal(whole[:, :, i, j], snap_weight(weight[:, :, i, j], grid)[0])


# ---------------------------------------------------------------- low_rank.py


@law
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99), st.data())
def test_low_rank_error_is_the_tail_of_the_spectrum(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = gaussian(rows, columns, seed=seed)
    left, right = best_low_rank(weight, rank)
    assert (left.shape, right.shape) == ((rows, rank), (rank, columns))
    assert left.is_contiguous()
    assert right.is_contiguous()
    tail = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt().item()
    error = torch.linalg.norm(weight.double() - left.double() @ right.double()).item()
    assert error == pytest.approx(tail, rel=1e-5, abs=3e-6)


def test_another_matrix_of_that_rank_is_worse() -> None:
    weight = gaussian(8, 6)
    left, right = best_low_rank(weight, 2)
    best = torch.linalg.norm(weight - left @ right)
    moved = [
        torch.linalg.norm(weight - (left + 0.05 * gaussian(8, 2, seed=s)) @ right) for s in (1, 2)
    ]
    assert min(moved) > best * (1 + 1e-4)


@pytest.mark.parametrize("rank", [0, 4, -1])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(QuantizationError, match="from 1 to 3"):
        best_low_rank(torch.ones(3, 5), rank)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.full((3, 3), float("nan"))])
def test_low_rank_needs_a_finite_matrix(weight: Tensor) -> None:
    with pytest.raises(QuantizationError, match="finite matrix"):
        best_low_rank(weight, 1)


# ---------------------------------------------------------------- spec.py


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


# ---------------------------------------------------------------- layers.py


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


# ---------------------------------------------------------------- apply.py, report.py


class Small(nn.Module):
    """One of each: linear, convolution, depthwise, 3-D convolution, a subclass, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(6, 4)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 4), "proj_out": nn.Linear(4, 6, bias=False)})
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.volume = nn.Conv3d(2, 2, 1)
        self.special = nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.shared = self.block["fc"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(x)).mean((-1, -2))
        return (
            self.proj_out(x)
            + self.shared(x)
            + self.block["fc"](self.block["proj_out"](self.norm(x[:, :4])))
        )


def test_every_layer_is_reported_once_with_a_reason_or_an_error() -> None:
    net = Small().eval()
    new, report = quantize_module(net, QuantizerSpec(3, 8, group=4, rank=1))
    by_name = {layer.name: layer for layer in report.layers}
    assert len(by_name) == len(report.layers)
    assert {name: layer.reason for name, layer in by_name.items()} == {
        "proj_out": "skip pattern 'proj_out'",
        "block.fc": "",
        "block.proj_out": "",
        "conv": "",
        "depthwise": "",
        "volume": "type Conv3d is not quantized",
        "special": "type NonDynamicallyQuantizableLinear is not quantized",
    }
    assert all(layer.weight_error > 0.01 for layer in report.quantized)
    assert all(layer.weight_error == 0 for layer in report.kept)
    assert (by_name["block.fc"].rank, by_name["block.fc"].note) == (1, "")
    assert (by_name["conv"].rank, by_name["conv"].note) == (0, "convolution: no low-rank branch")
    assert by_name["depthwise"].group is None
    assert "one weight scale per output channel" in by_name["depthwise"].note
    # the copy's own weights, independently of the report
    expected = torch.linalg.norm(net.conv.weight - new.conv.weight) / torch.linalg.norm(
        net.conv.weight
    )
    assert by_name["conv"].weight_error == pytest.approx(expected.item(), rel=1e-4)


def test_the_original_is_untouched_and_shared_layers_stay_shared() -> None:
    net = Small()
    before = copy.deepcopy(net.state_dict())
    new, report = quantize_module(net, QuantizerSpec(3, 8, group=4, rank=1))
    assert isinstance(new.shared, QuantizedLinear)
    assert new.shared is new.block["fc"]
    assert isinstance(new.proj_out, nn.Linear)
    assert new.proj_out is not net.proj_out
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert not new.training
    assert not any(p.requires_grad for p in new.parameters())
    old_memory = {t.data_ptr() for t in net.state_dict().values()}
    assert not old_memory & {t.data_ptr() for t in new.state_dict().values()}
    assert (new.evenkeel_quantizer, report.spec["rank"]) == ("w3a8-g4-r1", 1)


def test_sixteen_bits_change_nothing() -> None:
    net, x = Small().eval(), gaussian(2, 6, 5, 5)
    new, report = quantize_module(net, QuantizerSpec(16))
    assert torch.equal(new(x), net(x))
    assert report.stored_bytes == report.full_precision_bytes
    rounded, _ = quantize_module(net, QuantizerSpec(8))
    assert not torch.equal(rounded(x), net(x))


def test_sizes_by_hand() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    _, report = quantize_module(net, QuantizerSpec(3, group=4, rank=1, only=("0",)))
    norm = 4 * 4 * 2 + 8  # four vectors, and one 64-bit counter
    assert report.full_precision_bytes == (24 + 4 + 8) * 2 + norm
    codes, scales, factors = 24 * 3 // 8, 4 * 2 * 2, (6 + 4) * 2
    assert report.stored_bytes == codes + scales + factors + 4 * 2 + 8 * 2 + norm


def test_sizes_by_hand_of_a_convolution_whose_codes_do_not_fill_a_byte() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 3, bias=False))
    _, report = quantize_module(net, QuantizerSpec(3, group=2))
    assert report.full_precision_bytes == 54
    assert report.stored_bytes == 11 + 9 * 2 * 2  # 81 bits; nine positions of two groups


def test_only_restricts_and_skip_wins() -> None:
    net = Small()
    _, report = quantize_module(net, QuantizerSpec(4, only=("block", "proj_out")))
    assert [layer.name for layer in report.quantized] == ["block.fc", "block.proj_out"]
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert reasons["conv"] == "matched by no `only` pattern"
    assert reasons["proj_out"] == "skip pattern 'proj_out'"
    _, report = quantize_module(net, QuantizerSpec(4, skip=("conv*", "*fc")))
    assert [layer.name for layer in report.quantized] == ["proj_out", "block.proj_out", "depthwise"]


@pytest.mark.parametrize("patterns", [{"only": ("attn",)}, {"skip": ("*",)}])
def test_nothing_to_quantize_is_an_error(patterns: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(QuantizationError, match="No layer is left to quantize") as caught:
        quantize_module(Small(), QuantizerSpec(4, **patterns))
    assert "'block.fc'" in str(caught.value)
    with pytest.raises(QuantizationError, match="none at all"):
        quantize_module(nn.ReLU(), QuantizerSpec(4))


def test_bad_weights_are_named() -> None:
    net = Small()
    net.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="'conv' holds 1 of 324"):
        quantize_module(net, QuantizerSpec(4))
    with pytest.raises(QuantizationError, match=r"'block\.fc' is \(4, 6\): a branch of rank 4"):
        quantize_module(Small(), QuantizerSpec(4, rank=4))
    net = Small()
    net.block["fc"].weight.data[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match=r"'block\.fc'"):
        quantize_module(net, QuantizerSpec(4, rank=1))


def test_layers_that_would_lose_something_are_refused() -> None:
    hooked = Small()
    hooked.conv.register_forward_hook(lambda *_: None)
    with pytest.raises(QuantizationError, match="'conv' has hooks"):
        quantize_module(hooked, QuantizerSpec(4))
    with pytest.raises(QuantizationError, match="'meta'"):
        quantize_module(Small().to("meta"), QuantizerSpec(4))
    new, _ = quantize_module(Small(), QuantizerSpec(4))
    with pytest.raises(QuantizationError, match=r"'block\.fc' is quantized already"):
        quantize_module(new, QuantizerSpec(4))


def test_progress_counts_every_unit() -> None:
    seen: list[tuple[int, int, str]] = []
    _, report = quantize_module(Small(), QuantizerSpec(4), lambda *step: seen.append(step))
    names = [layer.name for layer in report.quantized]
    assert seen == [(i, len(names), name) for i, name in enumerate(names, start=1)]


def test_reports_come_back_from_json_and_print_shortly() -> None:
    _, report = quantize_module(Small(), QuantizerSpec(3, group=None, only=("*block*", "*conv")))
    assert QuantizationReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    text = str(report)
    assert text.startswith("w3a16-gnone: 3 of 7 layers quantized")
    assert "kept    2  matched by no `only` pattern" in text
    assert len(text.splitlines()) < 10
    broken = report.as_dict()
    broken["layers"][0].pop("kind")
    with pytest.raises(QuantizationError, match="not a quantization report"):
        QuantizationReport.from_dict(broken)


# ---------------------------------------------------------------- real denoisers


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=16, in_channels=4, cross_attention_dim=24, out_channels=8,
        norm_type="ada_norm_single", use_additional_conditions=True,
    ).eval()  # fmt: skip


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64,
        pooled_projection_dim=64, out_channels=4, dual_attention_layers=(0,),
    ).eval()  # fmt: skip


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=16, sample_size=8, guidance_embeds=True,
    ).eval()  # fmt: skip


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80, cross_attention_dim=16, norm_num_groups=1,
    ).eval()  # fmt: skip


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1, image_dim=16,
        added_kv_proj_dim=24,
    ).eval()  # fmt: skip


def cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=8,
    ).eval()  # fmt: skip


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


def run_pixart(net: nn.Module) -> Tensor:
    size = torch.tensor([[64.0, 64.0]]), torch.tensor([[1.0]])
    dtype = net.dtype
    with torch.no_grad():
        return net(
            gaussian(1, 4, 8, 8, dtype=dtype),
            encoder_hidden_states=gaussian(1, 5, 16, seed=1, dtype=dtype),
            timestep=torch.tensor([500]),
            added_cond_kwargs={"resolution": size[0].to(dtype), "aspect_ratio": size[1].to(dtype)},
        ).sample


def run_sana(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(
            gaussian(1, 4, 8, 8, dtype=net.dtype),
            encoder_hidden_states=gaussian(1, 5, 16, seed=1, dtype=net.dtype),
            timestep=torch.tensor([500]),
            guidance=torch.tensor([4.5], dtype=net.dtype),
        ).sample


def run_sdxl(net: nn.Module) -> Tensor:
    added = {"text_embeds": gaussian(1, 32, seed=2), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        return net(
            gaussian(1, 4, 8, 8), 500, gaussian(1, 5, 16, seed=1), added_cond_kwargs=added
        ).sample


@pytest.mark.parametrize(("build", "run"), [(pixart, run_pixart), (sdxl, run_sdxl)])
def test_a_real_denoiser_at_sixteen_bits_is_bit_identical(build, run) -> None:
    net = build()
    exact, _ = quantize_module(net, QuantizerSpec(16))
    rounded, _ = quantize_module(net, QuantizerSpec(4, 8))
    assert torch.equal(run(exact), run(net))
    error = (run(rounded) - run(net)).norm() / run(net).norm()
    assert 1e-4 < error < 0.5


# ---------------------------------------------------------------- files.py


@pytest.mark.parametrize(
    ("build", "run", "text", "dtype"),
    [
        (pixart, run_pixart, "w3a4-g16-r2", torch.float32),
        (pixart, run_pixart, "w4a8-token", torch.bfloat16),
        (sana, run_sana, "w4a8-gnone", torch.float32),
    ],
)
def test_saved_and_loaded_models_compute_the_same_bits(
    build, run, text: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    spec = QuantizerSpec.parse(text, skip=(*DEFAULT_SKIP, "*.attn2.to_v"))
    net = build().to(dtype)
    new, report = quantize_module(net, spec)
    folder = save_quantized(new, tmp_path / "deep" / "er")
    state = torch.random.get_rng_state()
    loaded, loaded_report = load_quantized(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(run(loaded), run(new))
    assert not torch.equal(run(loaded), run(net))
    assert loaded_report == report
    assert QuantizerSpec.from_dict(loaded_report.spec) == spec
    assert loaded.evenkeel_quantizer == str(spec) == new.evenkeel_quantizer
    assert (type(loaded), loaded.dtype, loaded.training) == (type(net), dtype, False)
    # private entries say who wrote the configuration, not what is built
    public = {k: v for k, v in net.config.items() if not k.startswith("_")}
    assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == public


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(
        quantize_module(dit(), QuantizerSpec(4))[0], tmp_path_factory.mktemp("dit")
    )


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_two_files_are_written(saved: Path) -> None:
    assert {f.name for f in saved.iterdir()} == {"quantized.safetensors", "quantized.json"}
    description = json.loads((saved / "quantized.json").read_text())
    assert description["class"] == "DiTTransformer2DModel"
    assert description["report"]["spec"]["skip"] == list(DEFAULT_SKIP)


@pytest.mark.parametrize("name", ["quantized.json", "quantized.safetensors"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    load_quantized(folder)
    (folder / name).unlink()
    with pytest.raises(QuantizationError, match=f"{name} is missing"):
        load_quantized(folder)
    with pytest.raises(QuantizationError, match="not a folder"):
        load_quantized(folder / "nowhere")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "does not describe a quantized model"),
        ('{"_class_name": "DiTTransformer2DModel"}', "does not describe a quantized model"),
        ('{"format": "evenkeel-quantized", "version": 99}', "format version 99"),
        (
            '{"format": "evenkeel-quantized", "version": 3}',
            r"lacks \['class', 'config', 'layers', 'report'\]",
        ),
    ],
)
def test_foreign_descriptions_are_refused(folder: Path, content: str, says: str) -> None:
    (folder / "quantized.json").write_text(content)
    with pytest.raises(QuantizationError, match=says):
        load_quantized(folder)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "quantized.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["os", "DiTPipeline", "NoSuchModel"])
def test_only_model_classes_are_rebuilt(folder: Path, name: str) -> None:
    edit(folder, **{"class": name})
    with pytest.raises(QuantizationError, match=f"'{name}' is not a model class"):
        load_quantized(folder)


def test_tensors_that_do_not_fit_are_refused(folder: Path) -> None:
    config = json.loads((folder / "quantized.json").read_text())["config"]
    edit(folder, config={**config, "num_layers": 2})
    with pytest.raises(QuantizationError, match=r"missing \['transformer_blocks\.1\."):
        load_quantized(folder)
    edit(folder, config={**config, "out_channels": 4})
    with pytest.raises(QuantizationError, match=r"of another shape \['proj_out_2\.bias'"):
        load_quantized(folder)
    edit(folder, config=config)
    (folder / "quantized.safetensors").write_bytes(b"not tensors")
    with pytest.raises(QuantizationError, match="is damaged"):
        load_quantized(folder)


def test_saving_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="'Small' is not a model class"):
        save_quantized(quantize_module(Small(), QuantizerSpec(4))[0], tmp_path)
    net = dit()
    with pytest.raises(QuantizationError, match="carries no report"):
        save_quantized(net, tmp_path)
    new, _ = quantize_module(net, QuantizerSpec(4))
    assert save_quantized(copy.deepcopy(new), tmp_path / "copy")
    assert set(new.state_dict()) == set(load_quantized(tmp_path / "copy")[0].state_dict())
    new.transformer_blocks[0].ff = net.transformer_blocks[0].ff
    with pytest.raises(QuantizationError, match=r"of other layers: \['transformer_blocks.0.ff"):
        save_quantized(new, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantizationError, match="is a file"):
        save_quantized(quantize_module(net, QuantizerSpec(4))[0], tmp_path / "file")
