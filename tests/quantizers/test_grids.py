"""Grids: laws of scaled rounding, what is stored comes back, and who shares a scale."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from grid_texts import GRIDS, every
from hypothesis import given, settings
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.input_quantizers import fake_quantize
from evenkeel.quantizers.numbers.formats import NF4, Float, Integer
from evenkeel.quantizers.numbers.grids import MXFP4, NVFP4, Grid
from evenkeel.quantizers.numbers.scales import (
    CLIPS,
    SHRINK_FACTORS,
    Scales,
    codes_of,
    fit,
    last,
    snap,
    snap_weight,
    spread,
    to_codes_space,
    unlast,
    values_of,
)

law = settings(derandomize=True, max_examples=60, deadline=None)

ODD = [g for g in GRIDS if g.format.lowest < 0 and g.format != NF4]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(seed: int = 0) -> Tensor:
    """Three rows of different size, of a width that few groups divide, with an outlier, a zero
    group for every group size up to 8, and a zero row.
    """
    x = gaussian(4, 83, seed=seed) * torch.tensor([1.0, 1e-4, 300.0, 0.0])[:, None]
    x[0, 20] = 50.0
    x[1, 32:48] = 0.0
    return x


def snapped(x: Tensor, grid: Grid) -> Tensor:
    return snap(x, grid, fit(x, grid))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)


# ---------------------------------------------------------------- laws, for every format


@every
def test_snapping_twice_changes_nothing(grid: Grid) -> None:
    x = sample()
    scales = fit(x, grid)
    once = snap(x, grid, scales)
    assert torch.equal(bits(snap(once, grid, scales)), bits(once))


@every
def test_codes_and_back_bit_for_bit(grid: Grid) -> None:
    scales = fit(sample(), grid)
    found = snap(sample(), grid, scales)
    codes = codes_of(found, grid, scales)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 1 << grid.format.bits
    assert torch.equal(bits(values_of(codes, grid, scales)), bits(found))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_stored_without_loss(grid: Grid, dtype: torch.dtype) -> None:
    x = sample()
    scales = fit(x, grid)
    narrow = snap(x, grid, scales).to(dtype)
    back = values_of(codes_of(narrow, grid, scales), grid, scales).to(dtype)
    assert torch.equal(back.view(torch.int16), narrow.view(torch.int16))


@pytest.mark.parametrize(
    "grid", [g for g in GRIDS if g.format != Integer(8, signed=False)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_found_again_in_half_precision(grid: Grid, dtype: torch.dtype) -> None:
    # All codes, at awkward scales; values below the normal range of float16 have lost theirs.
    for seed in range(20):
        scales = fit(gaussian(9, 83, seed=seed), grid)
        found = snap(gaussian(9, 83, seed=seed + 100), grid, scales)
        kept = found.abs() >= torch.finfo(torch.float16).tiny
        codes = codes_of(found, grid, scales)
        assert torch.equal(codes_of(found.to(dtype), grid, scales)[kept], codes[kept])


def test_eight_bits_without_sign_are_more_than_bfloat16_can_tell_apart() -> None:
    """Its neighbours are 1/128 apart just above a power of two, where codes may be 1/255 apart."""
    grid = Grid(Integer(8, signed=False))
    codes = torch.arange(256, dtype=torch.uint8)
    scales = Scales(torch.tensor([1.02 / 254]))
    values = values_of(codes, grid, scales)
    assert not torch.equal(codes_of(values.bfloat16(), grid, scales), codes)
    assert torch.equal(codes_of(values.half(), grid, scales), codes)


@pytest.mark.parametrize("grid", ODD, ids=str)
def test_odd_symmetry(grid: Grid) -> None:
    assert torch.equal(snapped(-sample(), grid), -snapped(sample(), grid))


@every
@pytest.mark.parametrize("power", [-6, 1, 9])
def test_powers_of_two_pass_through(grid: Grid, power: int) -> None:
    x = sample()
    assert torch.equal(snapped(x * 2.0**power, grid), snapped(x, grid) * 2.0**power)


@every
def test_nearest_of_all_values_of_the_group(grid: Grid) -> None:
    x = sample().double()
    scales = fit(x, grid)
    scale, zero = spread(scales, grid, x.shape)
    found = []
    for code in range(1 << grid.format.bits):
        try:
            value = grid.format.decode(torch.tensor(code, dtype=torch.uint8)).double()
        except QuantizationError:
            continue
        found.append((value - (0 if zero is None else zero)) * scale * torch.ones_like(x))
    nearest = (torch.stack(found) - x).abs().amin(0)
    error = (snap(x, grid, scales) - x).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-9, atol=1e-12)


@every
def test_zero_is_zero(grid: Grid) -> None:
    x = sample()
    assert (snapped(x, grid)[x == 0] == 0).all()
    assert snapped(torch.zeros(2, 9), grid).tolist() == torch.zeros(2, 9).tolist()


@every
def test_float64_stays_float64_and_half_becomes_float32(grid: Grid) -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        x = gaussian(2, 40).to(dtype)
        scales = fit(x, grid)
        assert scales.scale.dtype == snap(x, grid, scales).dtype == expected
        assert torch.equal(snapped(x, grid), snapped(x.to(expected), grid))


@law
@given(st.integers(1, 40), st.none() | st.integers(1, 45), st.integers(0, 3), st.integers(2, 8))
def test_same_as_a_loop_over_groups_in_numpy(
    width: int, group: int | None, seed: int, width_bits: int
) -> None:
    x = gaussian(3, width, seed=seed).double()
    grid = Grid(Integer(width_bits, signed=False), group=group, zero_point=True)
    levels = 2**width_bits - 1
    expected = np.zeros((3, width))
    for i in range(3):
        for start in range(0, width, group or width):
            part = x[i, start : start + (group or width)].numpy()
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) / levels
            zero = np.rint(-low / scale)
            codes = np.clip(np.rint(part / scale) + zero, 0, levels)
            expected[i, start : start + (group or width)] = (codes - zero) * scale
    np.testing.assert_allclose(snapped(x, grid).numpy(), expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("width_bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 1, 7, 32, 1000])
def test_absmax_integers_are_the_reference_quantizer(width_bits: int, group: int | None) -> None:
    x, grid = sample(), Grid(Integer(width_bits), group=group)
    found, scales = snap_weight(x, grid)
    assert torch.equal(found, fake_quantize(x, width_bits, group))
    assert scales.scale.numel() == len(x) * -(-x.shape[1] // min(group or 10**6, x.shape[1]))
    conv = gaussian(5, 10, 3, 2)
    rows = conv.flatten(1) if group is None else conv.movedim(1, -1)
    expected = fake_quantize(rows, width_bits, group)
    expected = expected.reshape(conv.shape) if group is None else expected.movedim(-1, 1)
    assert torch.equal(snap_weight(conv, grid)[0], expected)
    assert not torch.signbit(found[found == 0]).any()  # the only difference: there is one zero


@pytest.mark.parametrize("width_bits", [2, 4, 8])
def test_absmax_error_is_at_most_half_a_step(width_bits: int) -> None:
    x = sample()
    for grid in (
        Grid(Integer(width_bits), group=16),
        Grid(Integer(width_bits, signed=False), group=16, zero_point=True),
    ):
        scales = fit(x, grid)
        error = (snap(x, grid, scales) - x).abs() / spread(scales, grid, x.shape)[0]
        # With a zero point the end of the range is off by what the zero point was rounded by.
        assert 0.4 < error.max() <= 0.5 + 1e-4


def test_a_zero_point_uses_the_range_that_there_is() -> None:
    x = gaussian(4, 64).abs() + 0.1
    wasted = Grid(Integer(4), group=16)
    used = Grid(Integer(4), group=16, zero_point=True)
    assert (snapped(x, used) - x).norm() < 0.6 * (snapped(x, wasted) - x).norm()


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_the_range_is_widened_to_contain_zero(shift: float) -> None:
    x = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) + shift
    scales = fit(x, Grid(Integer(4), zero_point=True))
    assert scales.zero is not None
    assert scales.zero.tolist() == ([[0.0]] * 2 if shift > 0 else [[15.0]] * 2)
    torch.testing.assert_close(scales.scale, x.abs().amax(1, keepdim=True) / 15)


def test_a_tie_does_not_depend_on_the_zero_point() -> None:
    """Round, then shift: 0.5 + 1 would go up to 2 where 0.5 goes down to 0."""
    grid = Grid(Integer(4), zero_point=True)
    scales = Scales(torch.ones(1), torch.ones(1))
    assert snap(torch.tensor([0.5, 1.5, 2.5]), grid, scales).tolist() == [0.0, 2.0, 2.0]


def test_unsigned_without_zero_point_is_one_sided() -> None:
    x = torch.tensor([[-3.0, 15.0, 7.6]])
    grid = Grid(Integer(4, signed=False))
    assert fit(x, grid).scale.item() == 1.0
    assert snapped(x, grid).tolist() == [[0.0, 15.0, 8.0]]


def test_ranges_near_the_largest_float_do_not_overflow() -> None:
    x = torch.tensor([[3e38, -3e38]])
    for grid in (Grid(Integer(8)), Grid(Integer(8), zero_point=True), Grid(Float(4, 3))):
        torch.testing.assert_close(snapped(x, grid), x, rtol=0.01, atol=0)


# ---------------------------------------------------------------- sharing of scales


@every
def test_groups_are_independent(grid: Grid) -> None:
    x = sample()
    spoilt = x.clone()
    spoilt[0, 20] = -7e4
    size = grid.group or 83
    same = torch.arange(83) // size != 20 // size
    clean, hurt = snapped(x, grid), snapped(spoilt, grid)
    apart = torch.equal(clean[:, same], hurt[:, same]) and torch.equal(clean[1:], hurt[1:])
    assert apart == (not grid.per_tensor and grid.scale != "fp8_e4m3")


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.group and g.scale != "fp8_e4m3"], ids=str)
def test_a_ragged_last_group_is_fitted_on_what_it_has(grid: Grid) -> None:
    assert grid.group is not None
    x = sample()
    cuts = range(0, 83, grid.group)
    whole = replace(grid, group=None)
    parts = [snapped(x[:, a : a + grid.group].contiguous(), whole) for a in cuts]
    assert torch.equal(bits(snapped(x, grid)), bits(torch.cat(parts, 1)))
    assert fit(x, grid).scale.shape == (4, len(cuts))


@every
def test_shapes_of_scales(grid: Grid) -> None:
    x = gaussian(2, 3, 5, 64)
    groups = -(-64 // grid.group) if grid.group else 1
    scales = fit(x, grid)
    assert scales.scale.shape == ((1, 1, 1, 1) if grid.per_tensor else (2, 3, 5, groups))
    assert (scales.zero is not None) == grid.zero_point
    assert (scales.unit is not None) == (grid.scale == "fp8_e4m3")
    rows = snap(x.reshape(-1, 64), grid, fit(x.reshape(-1, 64), grid))
    assert torch.equal(snap(x, grid, scales), rows.reshape(x.shape))


def test_one_value_one_group_one_dimension() -> None:
    for grid in GRIDS:
        x = torch.tensor([3.0])
        torch.testing.assert_close(snapped(x, grid), x, rtol=0.34, atol=0)


def test_a_zero_group_has_scale_one() -> None:
    x = torch.tensor([[0.0, 0.0, 3.0, -1.0]])
    for text in ("int3-g2", "uint3-g2-zero", "fp4_e2m1-g2-scale_e8m0", "int3-g2-mse"):
        assert fit(x, Grid.parse(text)).scale[0, 0] == 1.0
    found = fit(x, Grid(Float(2, 1), group=2, scale="fp8_e4m3"))
    assert found.scale[0, 0] == found.unit


def test_steps_too_small_for_a_normal_float_become_zero() -> None:
    for grid in GRIDS:
        assert snapped(torch.tensor([1e-40, -1e-45, 0.0]), grid).abs().sum() == 0


def test_per_tensor_is_one_group_of_everything() -> None:
    x = gaussian(4, 8)
    tensor = snapped(x, Grid(Integer(4), per_tensor=True))
    assert torch.equal(tensor, fake_quantize(x.reshape(1, 32), 4, None).reshape(4, 8))


def test_scales_of_another_shape_or_kind_are_refused() -> None:
    x, grid = gaussian(4, 8), Grid(Integer(4), group=4)
    scales = fit(x, grid)
    with pytest.raises(QuantizationError, match=r"scales of shape \(4, 2\)"):
        snap(x, grid, Scales(scales.scale[:2]))
    with pytest.raises(QuantizationError, match="with zero points"):
        snap(x, replace(grid, zero_point=True), scales)
    with pytest.raises(QuantizationError, match="without zero points"):
        snap(x, grid, Scales(scales.scale, torch.zeros_like(scales.scale)))


# ---------------------------------------------------------------- searches


def score(x: Tensor, found: Tensor, exponent: float) -> float:
    return float((x - found).abs().double().pow(exponent).sum())


@pytest.mark.parametrize("text", ["int3", "uint3-zero", "fp4_e2m1", "nf4", "int2-tensor"])
@pytest.mark.parametrize("exponent", [1.0, 2.0, 2.4])
def test_mse_finds_the_best_of_all_factors(text: str, exponent: float) -> None:
    plain = Grid.parse(text)
    grid = replace(plain, range="mse", exponent=exponent)
    x = gaussian(1, 200).double() ** 3
    scores = []
    for factor in SHRINK_FACTORS:
        # A tensor with a shrunk range has the scales of the candidate.
        scales = fit(x * factor, plain)
        scores.append(score(x, snap(x, plain, scales), exponent))
    found = score(x, snapped(x, grid), exponent)
    assert found == pytest.approx(min(scores), rel=1e-9)
    assert found < scores[0]


def test_eighty_factors_as_in_q_diffusion() -> None:
    np.testing.assert_allclose(SHRINK_FACTORS, [1.0 - i * 0.01 for i in range(80)], rtol=1e-14)


@pytest.mark.parametrize("text", ["int4-g16", "uint8-zero", "nvfp4", "mxfp4", "nf4", "fp6_e3m2"])
def test_mse_is_never_worse_than_absmax_in_any_row(text: str) -> None:
    plain = Grid.parse(text)
    x = sample()
    error = (snapped(x, plain) - x).double().square().sum(1)
    searched = (snapped(x, replace(plain, range="mse")) - x).double().square().sum(1)
    assert (searched <= error * (1 + 1e-5)).all()


@pytest.mark.parametrize("power", [-80, 60])
def test_the_search_neither_overflows_nor_underflows(power: int) -> None:
    x, grid = gaussian(1, 200) ** 3, Grid(Integer(3), range="mse", exponent=2.4)
    assert fit(x, grid).scale < fit(x, Grid(Integer(3))).scale
    assert torch.equal(fit(x * 2.0**power, grid).scale, fit(x, grid).scale * 2.0**power)


@pytest.mark.parametrize("sign", [1, -1])
def test_percentile_ranges_contain_zero(sign: int) -> None:
    x = sign * (gaussian(1, 4000).abs() + 5)
    scales = fit(x, Grid(Integer(4), zero_point=True, range="percentile"))
    assert scales.zero is not None
    assert scales.zero.item() == (0 if sign > 0 else 15)
    assert scales.scale > 5 / 15


@pytest.mark.parametrize("zero_point", [False, True])
def test_percentile_is_the_best_of_three_quantiles(zero_point: bool) -> None:
    x = gaussian(1, 4000).double() ** 3
    plain = Grid(Integer(6), zero_point=zero_point)
    scores = []
    for clip in CLIPS:
        high = torch.quantile(x if zero_point else x.abs(), clip)
        low = torch.quantile(x, 1 - clip) if zero_point else -high
        scales = fit(torch.stack([low, high])[None], plain)
        scores.append(score(x, snap(x, plain, scales), 2.0))
    found = score(x, snapped(x, replace(plain, range="percentile")), 2.0)
    assert found == pytest.approx(min(scores), rel=1e-9)
    assert found < score(x, snapped(x, plain), 2.0)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.range == "absmax"], ids=str)
def test_absmax_keeps_a_single_outlier(grid: Grid) -> None:
    x = gaussian(1, 64)
    x[0, 7] = 1000.0
    scales = fit(x, grid)
    # A zero point is a whole number, so the ends of the range are off by up to half a step;
    # e8m0 may clip 1.99 * 2^n to 1.5 * 2^n.
    off = scales.scale.max().item() / 2 if grid.zero_point else 1e-3
    off = 333.0 if grid.scale != "float32" else off
    assert snap(x, grid, scales)[0, 7] == pytest.approx(1000.0, abs=off)


# ---------------------------------------------------------------- stored scales


def test_mxfp4_scales_follow_the_ocp_rule() -> None:
    x = gaussian(8, 64) * 10
    expected = 2.0 ** (np.floor(np.log2(np.abs(x.numpy().reshape(8, 2, 32)).max(-1))) - 2)
    assert torch.equal(fit(x, MXFP4).scale, torch.from_numpy(expected.astype(np.float32)))
    eight = fit(x, Grid(Float(4, 3), group=32, scale="e8m0")).scale
    assert torch.equal(eight, fit(x, MXFP4).scale * 2.0 ** (2 - 8))
    # MXINT8 of the specification counts in 1/64
    assert torch.equal(fit(x, Grid(Integer(8), 32, scale="e8m0")).scale, eight * 2.0 ** (8 - 6))


def test_nvfp4_scales_are_e4m3_times_one_number() -> None:
    x = sample() * 7
    scales = fit(x, NVFP4)
    assert scales.unit is not None
    assert scales.unit == x.abs().amax() / (448 * 6)
    relative = scales.scale / scales.unit
    stored = relative.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(relative, stored, rtol=1e-6, atol=0)
    assert torch.equal(stored * scales.unit, scales.scale)
    assert relative.max() == pytest.approx(448)
    assert relative.min() >= 2.0**-9


def test_nvfp4_blocks_far_below_the_largest_keep_a_scale() -> None:
    x = torch.cat([torch.full((1, 16), 1e6), torch.full((1, 16), 1e-6)], 1)
    found = snapped(x, NVFP4)
    assert torch.isfinite(found).all()
    assert (found[:, 16:] == 0).all()


def test_parts_of_a_tensor_share_its_unit() -> None:
    x = gaussian(4, 64)
    scales = fit(x, NVFP4)
    part = fit(x[:, 16:32], NVFP4, unit=scales.unit)
    assert torch.equal(part.scale, scales.scale[:, 1:2])
    assert not torch.equal(fit(x[:, 16:32], NVFP4).scale, scales.scale[:, 1:2])


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 3), (6, 10, 3, 2), (6, 10, 1, 1)])
@pytest.mark.parametrize("group", [None, 4])
def test_last_and_back(shape: tuple[int, ...], group: int | None) -> None:
    w, grid = gaussian(*shape), Grid(Integer(4), group=group)
    assert torch.equal(unlast(last(w, grid), w.shape, grid), w)
    assert last(w, grid).shape[-1] == (10 if group else w[0].numel())


@every
def test_snap_weight_is_snap_on_the_last_dimension(grid: Grid) -> None:
    w = gaussian(6, 10, 3, 2)
    values, scales = snap_weight(w, grid)
    x = last(w, grid)
    assert values.shape == w.shape and values.is_contiguous()
    assert torch.equal(last(values, grid), snap(x, grid, scales))
    codes = codes_of(last(values, grid), grid, scales)
    assert torch.equal(unlast(values_of(codes, grid, scales), w.shape, grid), values)


def test_code_units_undo_the_scale() -> None:
    x = sample()[:3]
    for grid in (Grid(Integer(4), group=8), Grid(Integer(4), group=8, zero_point=True)):
        scales = fit(x, grid)
        codes = codes_of(x, grid, scales)
        units = to_codes_space(x, grid, scales)
        torch.testing.assert_close(grid.format.decode(codes), units, rtol=0, atol=0.5001)


def test_fitting_and_snapping_leave_the_input_and_its_graph_alone() -> None:
    x = sample().requires_grad_()
    before = x.detach().clone()
    for grid in GRIDS:
        assert not snap_weight(x, grid)[0].requires_grad
    assert torch.equal(x.detach(), before)
