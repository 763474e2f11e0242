"""Best maps of low rank in a metric, their rounding, and how bytes are shared out."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenkeel.errors import CalibrationError
from evenkeel.low_rank.budget import Option, hull, share_out
from evenkeel.low_rank.factors import (
    BITS,
    Factor,
    bytes_of,
    fit_factors,
    rounded,
    top_of,
    without_empty,
)
from evenkeel.low_rank.metric import OutputMetric
from evenkeel.low_rank.moment import RowMoment, second_moment
from evenkeel.low_rank.rounding_slope import _ridge, rounding_slope


def drawn(rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows of very unequal directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    mix *= torch.logspace(0, -2, width, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mix


@pytest.fixture(params=[True, False], ids=["output", "local"])
def metric(request):
    g = second_moment(drawn(400, 10, 1)) if request.param else None
    return OutputMetric(second_moment(drawn(500, 14, 0)), g)


@pytest.fixture
def change():
    return torch.randn(10, 14, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_form_is_the_mean_square_of_what_a_probe_sees():
    x, g = drawn(300, 6, 3), drawn(200, 5, 4)
    e = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    metric = OutputMetric(x.T @ x / len(x), g.T @ g / len(g))
    seen = (g @ e @ x.T).square().mean()  # every pair: independent rows
    assert metric.error(e) == pytest.approx(float(seen), rel=1e-10)


def test_what_a_map_gains_is_the_difference_of_the_errors(metric, change):
    down, up = drawn(3, 14, 8), drawn(3, 10, 9)
    expected = metric.error(change) - metric.error(change - up.T @ down)
    assert metric.gained(change, down, up) == pytest.approx(expected, rel=1e-9)


def test_no_map_of_the_same_rank_is_better(metric, change):
    components = metric.components(change, 3)
    best = components.up.T @ components.down
    least = metric.error(change - best)
    assert least == pytest.approx(float(components.left()[3]), rel=1e-9)
    down, up = components.down.clone().requires_grad_(), components.up.clone().requires_grad_()
    inputs, outputs = metric.inputs, metric.outputs
    left = change - up.T @ down
    right = left if outputs is None else outputs @ left
    (right * (left @ inputs)).sum().backward()
    scale = float(metric.error(change))
    assert down.grad.norm() * down.norm() < 1e-8 * scale
    assert up.grad.norm() * up.norm() < 1e-8 * scale
    generator = torch.Generator().manual_seed(6)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(30):
            other = [
                f + size * f.norm() * torch.randn(f.shape, generator=generator, dtype=f.dtype) / 10
                for f in (components.down, components.up)
            ]
            assert metric.error(change - other[1].T @ other[0]) > least


def test_a_change_of_low_rank_is_met_exactly(metric):
    generator = torch.Generator().manual_seed(7)
    change = torch.randn(10, 2, generator=generator).double() @ torch.randn(2, 14).double()
    adapter = fit_factors("a", metric, change, metric.components(change, 5), 2, 16)
    assert (adapter.change - change).abs().max() < 2e-3 * change.abs().max()  # float16 factors
    whole = metric.components(change, 5)
    assert float(whole.left()[2]) < 1e-12 * whole.error


def test_a_large_layer_gets_the_same_components_by_iteration():
    generator = torch.Generator().manual_seed(8)
    change = (
        torch.randn(300, 20, generator=generator) @ torch.randn(20, 240, generator=generator)
    ).double()
    change += 0.01 * torch.randn(300, 240, generator=generator)
    metric = OutputMetric(torch.eye(240, dtype=torch.float64), None)
    few = metric.components(change, 20)
    exact = torch.linalg.svdvals(change)[:20].square()
    assert torch.allclose(few.gain, exact, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_within_the_fit_is_never_worse_than_at_the_end(metric, change, bits):
    components = metric.components(change, 4)
    adapter = fit_factors("a", metric, change, components, 4, bits)
    at_the_end = rounded(components.up, bits).dense().T @ rounded(components.down, bits).dense()
    assert metric.error(change - adapter.change) <= metric.error(change - at_the_end) * (1 + 1e-9)
    if bits == 16:
        assert metric.error(change - adapter.change) < 1.01 * float(components.left()[4])


def test_refitting_to_rounded_factors_brings_something(metric, change):
    components = metric.components(change, 4)
    adapter = fit_factors("a", metric, change, components, 4, 3)
    at_the_end = rounded(components.up, 3).dense().T @ rounded(components.down, 3).dense()
    assert metric.error(change - adapter.change) < 0.9 * metric.error(change - at_the_end)


@given(st.integers(0, 2**31), st.sampled_from([3, 4, 8]), st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_a_rounded_factor_is_exact_in_sixteen_bits(seed, bits, width):
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    factor = rounded(values, bits)
    dense = factor.dense(torch.float64)
    assert torch.equal(factor.dense(torch.float16).double(), dense)
    step = factor.scale.double().repeat_interleave(32, 1)[:, :width]
    clipped = values.abs().double() > (2 ** (bits - 1) - 1 + 0.5) * step
    assert bool(((dense - values).abs() <= 0.5001 * step)[~clipped].all())


@pytest.mark.parametrize("bits", BITS)
def test_factors_take_in_memory_what_their_file_takes(bits):
    values = torch.randn(5, 70, generator=torch.Generator().manual_seed(3))
    factor = rounded(values, bits)
    assert 2 * factor.nbytes == bytes_of(5, 70, 70, bits)
    assert factor.codes.nbytes == -(-5 * 70 * bits // 8)
    assert torch.equal(factor.take(torch.tensor([4, 1])).dense(), factor.dense()[[4, 1]])
    if bits < 16:
        signed = factor._signed(torch.int16)
        assert int(signed.abs().max()) <= top_of(bits)
        again = Factor.of(bits, signed, factor.scale)
        assert torch.equal(again.codes, factor.codes)


def test_components_that_rounding_made_zero_go(metric, change):
    components = metric.components(change, 2)
    adapter = fit_factors("a", metric, change, components, 2, 4)
    assert without_empty(adapter) is adapter
    adapter.down.scale[1] = 0
    left = without_empty(adapter)
    assert left.rank == 1
    assert torch.equal(left.change, adapter.change)
    adapter.down.scale[0] = 0
    assert without_empty(adapter) is None


def test_few_rows_are_drawn_to_the_diagonal():
    true = torch.diag(torch.linspace(1, 2, 40, dtype=torch.float64))
    rows = torch.randn(20, 40, generator=torch.Generator().manual_seed(9)).double() @ true.sqrt()
    plain = rows.T @ rows / 20
    error = (second_moment(rows, ridge=0) - true).norm()
    assert error < 0.5 * (plain - true).norm()
    many = drawn(20_000, 8, 10)
    assert torch.allclose(
        second_moment(many, ridge=0), many.T @ many / 20_000, rtol=0.02, atol=1e-4
    )


@pytest.mark.parametrize(
    "rows", [torch.zeros(0, 3), torch.tensor([[float("nan"), 0, 0]]), torch.full((2, 3), torch.inf)]
)
def test_rows_without_information_are_refused(rows):
    with pytest.raises(CalibrationError, match="finite values"):
        second_moment(rows)


def brute_force(layers, budget):
    best = float("inf")
    for choice in product(*layers.values()):
        if sum(o.bytes for o in choice) <= budget:
            best = min(best, sum(o.error for o in choice))
    return best


@given(st.integers(0, 2**31), st.floats(0, 1.1))
@settings(max_examples=60, deadline=None)
def test_bytes_are_shared_out_within_one_item_of_the_best(seed, share):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in "abc":
        gains = torch.rand(3, generator=generator).sort(descending=True).values
        cost = int(torch.randint(1, 9, (), generator=generator))
        left = [float(gains.sum() - gains[:r].sum()) for r in range(4)]
        layers[name] = [Option(cost * r, left[r], r) for r in range(4)]
    budget = int(share * sum(o[-1].bytes for o in layers.values()))
    chosen = share_out(layers, budget)
    assert sum(o.bytes for o in chosen.values()) <= budget
    found = sum(o.error for o in chosen.values())
    largest = max(a.error - b.error for o in layers.values() for a, b in pairwise(o))
    best = brute_force(layers, budget)
    assert best - 1e-9 <= found <= best + largest + 1e-9


def test_a_hull_is_convex_and_starts_at_the_cheapest():
    options = [Option(b, e, "") for b, e in [(0, 10), (1, 9.5), (2, 5), (3, 4), (4, 4.5), (6, 0)]]
    points = hull(options)
    assert points[0].bytes == 0
    slopes = [(b.error - a.error) / (b.bytes - a.bytes) for a, b in pairwise(points)]
    assert slopes == sorted(slopes)
    assert all(o.error >= points[-1].error for o in options)


def test_sizes_count_codes_and_scales():
    assert bytes_of(3, 100, 50, 3) == (3 * 100 * 3 + 7) // 8 + (3 * 50 * 3 + 7) // 8 + 2 * 3 * (
        4 + 2
    )


def test_what_cannot_be_fitted_is_refused(metric, change):
    components = metric.components(change, 2)
    with pytest.raises(CalibrationError, match="rank from 1 to 2"):
        fit_factors("blocks.0", metric, change, components, 3, 4)
    with pytest.raises(CalibrationError, match="5 bits"):
        fit_factors("blocks.0", metric, change, components, 1, 5)
    with pytest.raises(CalibrationError, match="positive definite"):
        OutputMetric(torch.zeros(14, 14, dtype=torch.float64), None).components(change, 1)


# ---- wide layers: rows in place of matrices


@pytest.mark.parametrize("rows", [60, 900])
def test_rows_stand_for_the_matrix(rows):
    x = drawn(rows, 40, 5)
    matrix, kept = second_moment(x), second_moment(x, wide=0)
    right = drawn(40, 3, 6)
    assert isinstance(kept, RowMoment)
    assert torch.allclose(
        kept @ right.float(), (matrix @ right.to(matrix)).float(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("outputs", ["identity", "matrix", "rows"])
def test_components_of_a_wide_layer_are_those_of_the_matrices(outputs):
    x, g, change = drawn(300, 60, 1), drawn(400, 50, 2), drawn(50, 60, 3)
    dense = OutputMetric(second_moment(x), None if outputs == "identity" else second_moment(g))
    of_outputs = {"identity": None, "matrix": dense.outputs, "rows": second_moment(g, wide=0)}
    wide = OutputMetric(second_moment(x, wide=0), of_outputs[outputs])
    exact, found = dense.components(change, 6), wide.components(change, 6)
    assert found.error == pytest.approx(exact.error, rel=1e-4)
    assert torch.allclose(found.gain.double(), exact.gain.double(), rtol=2e-2)
    left = dense.error(change - (found.up.T @ found.down).to(change))
    best = dense.error(change - (exact.up.T @ exact.down).to(change))
    assert best <= left * (1 + 1e-6)
    assert left < best * 1.003


def test_rounding_that_follows_its_input_is_found_and_noise_is_not():
    x, fresh = torch.randn(1600, 12, generator=torch.Generator().manual_seed(1)).split(800)
    folds, weight = torch.arange(800) % 2 == 0, drawn(5, 12, 2).float()

    def noise(rows):
        return (rows - 3 * (rows / 3).round()) @ weight.T  # most values are below half a step

    slope = rounding_slope(x, noise(x), folds).float()
    unexplained = (noise(fresh) - fresh @ slope.T).square().sum()
    assert unexplained < 0.95 * noise(fresh).square().sum()
    chance = drawn(800, 5, 3).float()
    assert not bool(rounding_slope(x, chance, folds).any())


def test_the_slope_of_few_rows_is_that_of_the_features():
    x, y = drawn(20, 30, 1), drawn(20, 4, 2)
    gram = x.T @ x
    gram.diagonal().add_(0.1 * gram.diagonal().mean())
    assert torch.allclose(_ridge(x, y, 0.1), torch.linalg.solve(gram, x.T @ y).T, atol=1e-6)
