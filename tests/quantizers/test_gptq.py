"""GPTQ: against a brute-force elimination, nearest rounding where nothing correlates, and gains."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, codes_of, fit, snap, values_of
from evenkeel.quantizers.rounding.gptq import gptq, hessian_of

TEXTS = [
    "int3",
    "int4-g8",
    "uint3-g8-zero",
    "fp4_e2m1-g8",
    "nf4-g5",
    "nvfp4",
    "mxfp4",
    "int4-tensor",
]
every = pytest.mark.parametrize("grid", [Grid.parse(t) for t in TEXTS], ids=str)
INT3 = Grid(Integer(3))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs that share a few directions, as activations do, of very different size."""
    mixing = gaussian(4, width, seed=seed + 1)
    size = torch.logspace(-1, 1, width)[torch.randperm(width, generator=torch.Generator())]
    return (
        gaussian(rows, 4, seed=seed) @ mixing + 0.3 * gaussian(rows, width, seed=seed + 2)
    ) * size


def cost(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    error = (weight - values).double()
    return float(((error @ hessian) * error).sum())


def damped(hessian: Tensor, damp: float = 0.01) -> Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian)).double()


def eliminate(
    weight: Tensor, hessian: Tensor, grid: Grid, scales: Scales, sequence: list[int]
) -> Tensor:
    """Round one input after another; after each the others move to their conditional optimum.

    Written from the definition: with what is fixed so far, minimise the quadratic cost over the
    inputs that are left by solving the normal equations. No factorization, no update formula.
    """
    values, now = weight.double().clone(), weight.double().clone()
    for i, j in enumerate(sequence):
        values[:, j] = snap(now.float(), grid, scales)[:, j].double()
        fixed, free = sequence[: i + 1], sequence[i + 1 :]
        if free:
            error = weight.double()[:, fixed] - values[:, fixed]
            move = torch.linalg.solve(hessian[free][:, free], hessian[free][:, fixed] @ error.T)
            now[:, free] = weight.double()[:, free] + move.T
    return values.float()


# ---------------------------------------------------------------- the Hessian


def test_hessian_is_the_curvature_of_the_output_error() -> None:
    x = correlated(50, 6).double()
    row = torch.zeros(6, dtype=torch.float64)
    curvature = torch.autograd.functional.hessian(lambda w: (x @ w).square().mean(), row)
    torch.testing.assert_close(hessian_of(x), curvature)


def test_hessians_merge_by_number_of_rows() -> None:
    x = correlated(60, 5)
    merged = (20 * hessian_of(x[:20]) + 40 * hessian_of(x[20:])) / 60
    torch.testing.assert_close(merged, hessian_of(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(hessian_of(x[:20]) / 2 + hessian_of(x[20:]) / 2, hessian_of(x))


def test_hessian_of_tokens_and_of_half_precision() -> None:
    x = correlated(24, 5).bfloat16()
    found = hessian_of(x.reshape(2, 3, 4, 5))
    assert found.dtype == torch.float64
    assert torch.equal(found, hessian_of(x.double()))


# ---------------------------------------------------------------- laws


@every
@pytest.mark.parametrize("order", ["given", "descending"])
def test_without_correlation_it_is_the_nearest(grid: Grid, order: str) -> None:
    weight = gaussian(6, 37)
    scales = fit(weight, grid)
    hessian = torch.diag(gaussian(37).square() + 0.01)
    found, fitted = gptq(weight, hessian, grid, order=order)
    assert torch.equal(found, snap(weight, grid, scales))
    torch.testing.assert_close(fitted.scale, scales.scale.expand_as(fitted.scale), rtol=0, atol=0)


@pytest.mark.parametrize("text", ["int3", "int4-g4", "uint3-g4-zero", "fp4_e2m1", "nf4-g4"])
@pytest.mark.parametrize("order", ["given", "descending"])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_same_as_brute_force_elimination(text: str, order: str, block: int) -> None:
    grid = Grid.parse(text)
    for seed in range(3):
        weight, hessian = gaussian(5, 12, seed=seed), hessian_of(correlated(100, 12, seed=seed))
        scales = fit(weight, grid)
        sequence = list(range(12))
        if order == "descending":
            sequence.sort(key=lambda j: -float(hessian[j, j]))
        expected = eliminate(weight, damped(hessian), grid, scales, sequence)
        found, kept = gptq(weight, hessian, grid, scales, block=block, order=order)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert kept is scales
        assert not torch.equal(found, snap(weight, grid, scales))


def test_order_matters() -> None:
    weight, hessian = gaussian(5, 12), hessian_of(correlated(100, 12))
    assert not torch.equal(
        gptq(weight, hessian, INT3)[0], gptq(weight, hessian, INT3, order="descending")[0]
    )


@every
@pytest.mark.parametrize("order", ["given", "descending"])
def test_cost_is_lower_than_of_the_nearest(grid: Grid, order: str) -> None:
    ratios = []
    for seed in range(12):
        weight, hessian = gaussian(16, 48, seed=seed), hessian_of(correlated(200, 48, seed=seed))
        plain = cost(weight, snap(weight, grid, fit(weight, grid)), hessian)
        ratios.append(cost(weight, gptq(weight, hessian, grid, order=order)[0], hessian) / plain)
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.6


def test_never_better_than_the_best_of_all_roundings() -> None:
    """Three inputs on a fixed ternary grid: 27 candidates per row bound what any method reaches."""
    grid, scales = Grid(Integer(2)), Scales(torch.ones(8, 1))
    weight = gaussian(8, 3) * 0.7
    hessian = hessian_of(correlated(50, 3))
    candidates = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
    for i in range(8):
        one = Scales(scales.scale[:1])
        best = min(cost(weight[i : i + 1], c[None], hessian) for c in candidates)
        found = gptq(weight[i : i + 1], hessian, grid, one, damp=1e-9)[0]
        assert best <= cost(weight[i : i + 1], found, hessian) * (1 + 1e-9)


@every
def test_values_lie_on_the_grid_of_the_scales_returned(grid: Grid) -> None:
    weight, hessian = gaussian(6, 40), hessian_of(correlated(200, 40))
    values, scales = gptq(weight, hessian, replace(grid, per_tensor=False))
    layout = replace(grid, per_tensor=False)
    assert torch.equal(values_of(codes_of(values, layout, scales), layout, scales), values)
    assert values.dtype == torch.float32 and values.shape == weight.shape


def test_per_tensor_scales_keep_their_shape() -> None:
    grid = Grid(Integer(4), per_tensor=True)
    weight, hessian = gaussian(6, 40), hessian_of(correlated(200, 40))
    values, scales = gptq(weight, hessian, grid)
    assert scales.scale.shape == (1, 1)
    assert torch.equal(snap(values, grid, scales), values)


@pytest.mark.parametrize("text", ["int3-g8", "uint4-g8-zero", "int4-g7"])
def test_blocks_only_batch_the_corrections(text: str) -> None:
    grid = Grid.parse(text)
    weight, hessian = gaussian(6, 45), hessian_of(correlated(200, 45))
    whole, scales = gptq(weight, hessian, grid, block=1000)
    for block in (1, 10, 16):
        values, found = gptq(weight, hessian, grid, block=block)
        torch.testing.assert_close(found.scale, scales.scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(values, whole, rtol=1e-5, atol=1e-6)


def test_scales_are_fitted_to_the_corrected_weight() -> None:
    grid = Grid(Integer(3), group=8)
    weight, hessian = gaussian(6, 24), hessian_of(correlated(200, 24))
    plain = fit(weight, grid).scale
    found = gptq(weight, hessian, grid)[1].scale
    assert torch.equal(found[:, 0], plain[:, 0])
    assert not torch.allclose(found[:, 1:], plain[:, 1:])
    assert torch.equal(gptq(weight, hessian, grid, order="descending")[1].scale, plain)


def test_given_scales_are_neither_changed_nor_refitted() -> None:
    grid = Grid(Integer(4), group=8)
    weight, hessian = gaussian(6, 24), hessian_of(correlated(200, 24))
    scales = fit(weight * 0.8, grid)
    before = scales.scale.clone()
    values, found = gptq(weight, hessian, grid, scales)
    assert torch.equal(found.scale, before)
    assert torch.equal(snap(values, grid, scales), values)


def test_multiples_of_the_hessian_change_nothing() -> None:
    weight, hessian = gaussian(6, 24), hessian_of(correlated(200, 24))
    for power in (-30, 30):
        assert torch.equal(
            gptq(weight, hessian * 2.0**power, INT3)[0], gptq(weight, hessian, INT3)[0]
        )


def test_rows_do_not_see_each_other() -> None:
    weight, hessian = gaussian(6, 24), hessian_of(correlated(200, 24))
    together = gptq(weight, hessian, INT3)[0]
    apart = [gptq(weight[i : i + 1], hessian, INT3)[0] for i in range(6)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- edges


def test_one_input() -> None:
    weight = gaussian(5, 1)
    values, scales = gptq(weight, torch.tensor([[2.0]]), INT3)
    assert torch.equal(values, snap(weight, INT3, fit(weight, INT3)))
    assert scales.scale.shape == (5, 1)


@pytest.mark.parametrize("order", ["given", "descending"])
def test_dead_inputs_are_rounded_to_the_nearest(order: str) -> None:
    x = correlated(200, 16)
    x[:, [3, 9]] = 0.0
    weight, grid = gaussian(6, 16), Grid(Integer(4))
    values = gptq(weight, hessian_of(x), grid, order=order)[0]
    nearest = snap(weight, grid, fit(weight, grid))
    assert torch.equal(values[:, [3, 9]], nearest[:, [3, 9]])
    assert (values[:, [3, 9]] != 0).any()
    living = [j for j in range(16) if j not in (3, 9)]
    scales = Scales(fit(weight, grid).scale)
    alone = gptq(weight[:, living], hessian_of(x[:, living]), grid, scales, order=order)[0]
    torch.testing.assert_close(values[:, living], alone, rtol=1e-6, atol=0)


def test_all_inputs_dead() -> None:
    weight = gaussian(6, 16)
    found = gptq(weight, torch.zeros(16, 16), INT3)[0]
    assert torch.equal(found, snap(weight, INT3, fit(weight, INT3)))


def test_fewer_rows_than_inputs_need_the_damping() -> None:
    weight, hessian = gaussian(4, 32), hessian_of(correlated(8, 32))
    assert cost(weight, gptq(weight, hessian, INT3)[0], hessian) < cost(
        weight, snap(weight, INT3, fit(weight, INT3)), hessian
    )
    with pytest.raises(QuantizationError, match="raise damp"):
        gptq(weight, hessian - 1e-3 * torch.eye(32), INT3, damp=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    weight, hessian = gaussian(4, 16).to(dtype), hessian_of(correlated(50, 16))
    wide = torch.promote_types(dtype, torch.float32)
    values, scales = gptq(weight, hessian, INT3)
    assert values.dtype == scales.scale.dtype == wide
    assert torch.equal(values, gptq(weight.to(wide), hessian, INT3)[0])


def test_inputs_are_left_alone() -> None:
    weight, hessian = gaussian(4, 16), hessian_of(correlated(50, 16))
    copies = weight.clone(), hessian.clone()
    gptq(weight, hessian, Grid(Integer(3), group=4), order="descending")
    gptq(weight, hessian, Grid(Integer(3), group=4))
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])


# ---------------------------------------------------------------- refusals


def test_shapes_must_match() -> None:
    with pytest.raises(QuantizationError, match=r"\(4, 16\) and \(8, 8\)"):
        gptq(gaussian(4, 16), torch.eye(8), INT3)
    with pytest.raises(QuantizationError, match="Flatten a convolution"):
        gptq(gaussian(4, 16, 1, 1), torch.eye(16), INT3)
    with pytest.raises(QuantizationError, match="scales of shape"):
        gptq(gaussian(4, 16), torch.eye(16), INT3, Scales(torch.ones(3, 1)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    hessian, x, weight = torch.eye(16), gaussian(9, 16), gaussian(4, 16)
    hessian[2, 3] = x[1, 1] = weight[0, 0] = bad
    with pytest.raises(QuantizationError, match="1 of 256 values of the Hessian"):
        gptq(gaussian(4, 16), hessian, INT3)
    with pytest.raises(QuantizationError, match="1 of 144 values"):
        hessian_of(x)
    with pytest.raises(QuantizationError, match="1 of 64 values"):
        gptq(weight, torch.eye(16), INT3)


@pytest.mark.parametrize(
    "fields", [{"damp": -0.1}, {"damp": float("nan")}, {"block": 0}, {"order": "x"}]
)
def test_settings_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(QuantizationError, match="damp is at least 0"):
        gptq(gaussian(4, 16), torch.eye(16), INT3, **fields)


@pytest.mark.parametrize(
    "x", [torch.ones(0, 4), torch.tensor(1.0), torch.ones(3, dtype=torch.int64)]
)
def test_inputs_must_be_rows_of_numbers(x: Tensor) -> None:
    with pytest.raises(QuantizationError, match="not empty"):
        hessian_of(x)
