"""The rounding of inputs in groups, by its laws."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from small_denoisers import (
    gaussian,
)
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers import (
    QuantizerSpec,
    fake_quantize,
    quantize_module,
)
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import fit, snap_weight

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


def scale_of(x: Tensor, bits: int, group: int | None) -> Tensor:
    return fit(x, Grid(Integer(bits), group)).scale


def per_value(scale: Tensor, width: int, group: int | None) -> Tensor:
    return scale.repeat_interleave(group or width, -1)[..., :width]


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
