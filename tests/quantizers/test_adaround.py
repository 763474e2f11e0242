"""AdaRound: the soft weight, the learned choice, and that it never loses to the nearest."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import NF4, Float, Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, codes_of, fit, last, snap_weight, values_of
from evenkeel.quantizers.rounding.adaround import (
    SoftRounding,
    random_batches,
    reconstruct,
    temperature,
)

TEXTS = ["int3", "int2", "int4-g8", "uint4-zero", "uint3-g5-zero-mse", "int4-tensor", "int8-mse"]
every = pytest.mark.parametrize("grid", [Grid.parse(t) for t in TEXTS], ids=str)
shapes = pytest.mark.parametrize("shape", [(6, 20), (4, 10, 3, 3)])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding_of(weight: Tensor, grid: Grid) -> SoftRounding:
    return SoftRounding(weight, grid, snap_weight(weight, grid)[1])


def on_grid(values: Tensor, weight: Tensor, grid: Grid) -> bool:
    scales = snap_weight(weight, grid)[1]
    x = last(values, grid)
    return torch.equal(values_of(codes_of(x, grid, scales), grid, scales), x)


# ---------------------------------------------------------------- the soft weight


@every
@shapes
def test_starts_as_the_weight_itself_clamped_to_the_range(
    grid: Grid, shape: tuple[int, ...]
) -> None:
    weight = gaussian(*shape)
    found = rounding_of(weight, grid).soft()
    nearest, scales = snap_weight(weight, grid)
    assert found.shape == weight.shape
    inside = (weight - nearest).abs() <= 0.5001 * scales.scale.max()
    step = scales.scale.max().item()
    beyond = (found - weight).abs() > 1e-4 * step
    # What is not reproduced is saturated: beyond the last code, where the soft weight stops.
    assert torch.equal(found[beyond], nearest[beyond])
    assert inside.any() and (~beyond).float().mean() > 0.5


@every
@shapes
def test_hard_starts_as_the_nearest(grid: Grid, shape: tuple[int, ...]) -> None:
    weight = gaussian(*shape)
    rounding = rounding_of(weight, grid)
    assert torch.equal(rounding.hard(), snap_weight(weight, grid)[0])
    assert torch.equal(rounding.nearest(), rounding.hard())


@every
@shapes
def test_any_hard_weight_is_a_neighbour_on_the_grid(grid: Grid, shape: tuple[int, ...]) -> None:
    weight = gaussian(*shape)
    rounding = rounding_of(weight, grid)
    with torch.no_grad():
        rounding.alpha.copy_(gaussian(*rounding.alpha.shape, seed=1))
    hard = rounding.hard()
    assert on_grid(hard, weight, grid)
    assert not torch.equal(hard, rounding.nearest())
    scale = last(weight, grid)  # distances in steps, per value
    steps = (last(hard, grid) - scale).abs() / _steps(weight, grid)
    nearest = (last(rounding.nearest(), grid) - scale).abs() / _steps(weight, grid)
    # 1 step for a free choice; a saturated weight has the nearest's distance or one step more
    assert (steps <= torch.clamp(nearest + 1, min=1.0) + 1e-4).all()


def _steps(weight: Tensor, grid: Grid) -> Tensor:
    x = last(weight, grid)
    scale = fit(x, grid).scale
    return scale.repeat_interleave(grid.group or x.shape[-1], -1)[..., : x.shape[-1]]


@every
def test_soft_with_a_decided_alpha_is_hard(grid: Grid) -> None:
    rounding = rounding_of(gaussian(6, 20), grid)
    with torch.no_grad():
        rounding.alpha.copy_(50 * gaussian(6, 20, seed=1).sign())
    torch.testing.assert_close(rounding.soft().detach(), rounding.hard(), rtol=1e-6, atol=1e-7)
    assert set(rounding.up().unique().tolist()) == {0.0, 1.0}


@every
def test_reset_makes_the_hard_weight_the_nearest(grid: Grid) -> None:
    rounding = rounding_of(gaussian(6, 20), grid)
    with torch.no_grad():
        rounding.alpha.copy_(gaussian(6, 20, seed=1))
    assert not torch.equal(rounding.hard(), rounding.nearest())
    rounding.reset()
    assert torch.equal(rounding.hard(), rounding.nearest())


def test_reset_follows_ties_to_even() -> None:
    grid, scales = Grid(Integer(4)), Scales(torch.ones(1, 1))
    rounding = SoftRounding(torch.tensor([[0.5, 1.5, -0.5, 9.3, -9.3]]), grid, scales)
    assert rounding.hard().tolist() == [[1.0, 2.0, 0.0, 7.0, -7.0]]
    rounding.reset()
    assert rounding.hard().tolist() == [[0.0, 2.0, 0.0, 7.0, -7.0]]


def test_gradient_is_that_of_finite_differences() -> None:
    grid = Grid(Integer(3, signed=False), group=4, zero_point=True)
    rounding = rounding_of(gaussian(2, 6).double(), grid)
    start = 0.3 * gaussian(2, 6, seed=4).double()

    def soft(alpha: Tensor) -> Tensor:
        return torch.func.functional_call(rounding, {"alpha": alpha}, ())

    assert torch.autograd.gradcheck(soft, start.requires_grad_())
    rounding.soft().sum().backward()
    assert (rounding.alpha.grad != 0).float().mean() > 0.5


def test_modes() -> None:
    rounding = rounding_of(gaussian(6, 20), Grid(Integer(3)))
    assert rounding.mode == "soft" and rounding().requires_grad
    for mode, expected in (("hard", rounding.hard()), ("nearest", rounding.nearest())):
        rounding.mode = mode
        assert torch.equal(rounding(), expected) and not rounding().requires_grad
    assert [name for name, _ in rounding.named_parameters()] == ["alpha"]


# ---------------------------------------------------------------- regularizer and temperature


def test_regularizer_by_hand() -> None:
    grid, scales = Grid(Integer(4)), Scales(torch.ones(1, 1))
    rounding = SoftRounding(torch.tensor([[0.5, 3.75, 2.0]]), grid, scales)
    # h = 0.5, 0.75, 0
    assert rounding.regularizer(2.0).item() == pytest.approx(1 + (1 - 0.25) + 0, abs=1e-5)
    assert rounding.regularizer(20.0).item() == pytest.approx(1 + (1 - 0.5**20) + 0, abs=1e-4)


def test_regularizer_is_zero_where_all_is_decided_and_pushes_there() -> None:
    rounding = rounding_of(gaussian(6, 20), Grid(Integer(3)))
    optimizer = torch.optim.Adam(rounding.parameters(), lr=0.1)
    first = rounding.regularizer(2.0).item()
    for _ in range(100):
        optimizer.zero_grad()
        rounding.regularizer(2.0).backward()
        optimizer.step()
    assert rounding.regularizer(2.0).item() < 1e-4 < first
    assert torch.equal(rounding.soft(), rounding.hard())


def test_temperature_is_flat_then_a_line() -> None:
    found = [temperature(step, 1000) for step in range(1001)]
    assert found[:200] == [20.0] * 200
    assert found[600] == pytest.approx(11.0)
    assert found[1000] == pytest.approx(2.0)
    steps = torch.tensor(found[200:]).double().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, -18 / 800), rtol=1e-3, atol=1e-5)
    assert temperature(5, 10, warmup=1.0) == 20.0


# ---------------------------------------------------------------- reconstruction


def problem(
    grid: Grid, seed: int = 0, width: int = 24
) -> tuple[SoftRounding, Callable[..., Tensor], Tensor, Tensor]:
    """One linear layer on correlated inputs: where the nearest is far from the best."""
    weight = gaussian(8, width, seed=seed)
    x = gaussian(128, 3, seed=seed + 1) @ gaussian(3, width, seed=seed + 2)
    x = x + 0.2 * gaussian(128, width, seed=seed + 3)
    rounding = rounding_of(weight, grid)

    def loss(batch: Tensor | slice = slice(None)) -> Tensor:
        return (x[batch] @ (rounding() - weight).T).square().sum(1).mean()

    return rounding, loss, weight, x


def learned(
    rounding: SoftRounding, loss: Callable[..., Tensor], iterations: int = 400, **fields: float
):
    batches = random_batches(128, 32, torch.Generator().manual_seed(0))
    # Twenty thousand small steps in the papers; here few large ones with a strong regularizer.
    fields = {"rate": 3e-2, "weight": 1.0, **fields}
    return reconstruct(
        loss, [rounding], batches, iterations, objective=lambda: loss().item(), **fields
    )


@pytest.mark.parametrize("text", ["int3", "uint3-zero", "int3-g8", "int2-g8"])
def test_objective_falls_far_below_the_nearest(text: str) -> None:
    grid = Grid.parse(text)
    rounding, loss, weight, _ = problem(grid)
    nearest = snap_weight(weight, grid)[0]
    found = learned(rounding, loss)
    assert found.kept == "learned"
    assert found.learned < 0.5 * found.nearest
    assert rounding.mode == "hard"
    assert loss().item() == pytest.approx(found.learned)
    assert on_grid(rounding(), weight, grid)
    assert not torch.equal(rounding(), nearest)
    rounding.mode = "nearest"
    assert loss().item() == pytest.approx(found.nearest)


def test_rounding_is_decided_at_the_end() -> None:
    rounding, loss, _, _ = problem(Grid(Integer(3)))
    assert ((rounding.up() > 0.01) & (rounding.up() < 0.99)).float().mean() > 0.8
    learned(rounding, loss)
    between = (rounding.up() > 0.01) & (rounding.up() < 0.99)
    assert between.float().mean() < 0.06


def test_without_the_regularizer_it_stays_undecided() -> None:
    rounding, loss, _, _ = problem(Grid(Integer(3)))
    learned(rounding, loss, weight=0.0)
    assert ((rounding.up() > 0.01) & (rounding.up() < 0.99)).float().mean() > 0.5


def test_close_to_the_best_of_all_roundings() -> None:
    """Six weights have 64 roundings: near the best of them, and never below."""
    reached = middle = 0.0
    grid = Grid(Integer(4))
    for seed in range(4):
        weight = gaussian(1, 6, seed=seed)
        x = gaussian(128, 2, seed=seed + 1) @ gaussian(2, 6, seed=seed + 2)
        rounding = rounding_of(weight, grid)

        def loss(batch: Tensor | slice = slice(None), x: Tensor = x, r: SoftRounding = rounding,
                 w: Tensor = weight) -> Tensor:  # fmt: skip
            return (x[batch] @ (r() - w).T).square().sum(1).mean()

        scale = snap_weight(weight, grid)[1].scale
        floor = (weight / scale).floor()
        ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
        costs = (x @ ((floor + ups) * scale - weight).T).square().mean(0)
        found = learned(rounding, loss)
        kept = min(found.learned, found.nearest)
        assert costs.min() * (1 - 1e-4) <= kept
        reached, middle = reached + kept, middle + costs.median().item()
    assert reached < 0.35 * middle


def test_falls_back_to_the_nearest_when_learning_makes_it_worse() -> None:
    rounding, loss, weight, _ = problem(Grid(Integer(3)))
    nearest = snap_weight(weight, Grid(Integer(3)))[0]
    batches = random_batches(128, 32, torch.Generator().manual_seed(0))
    found = reconstruct(
        lambda batch: -loss(batch),
        [rounding],
        batches,
        50,
        objective=lambda: loss().item(),
        rate=0.1,
    )
    assert found.learned > found.nearest
    assert found.kept == "nearest"
    assert torch.equal(rounding.hard(), nearest)
    assert loss().item() == pytest.approx(found.nearest)


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_the_nearest(seed: int) -> None:
    for iterations in (1, 7, 60):
        rounding, loss, _, _ = problem(Grid(Integer(4)), seed=10 * seed)
        found = learned(rounding, loss, iterations, rate=0.3)
        assert loss().item() <= found.nearest


def test_several_roundings_are_learned_together() -> None:
    grid = Grid(Integer(3))
    first, second = gaussian(12, 10), gaussian(6, 12, seed=1)
    x = gaussian(128, 3, seed=2) @ gaussian(3, 10, seed=3)
    a, b = rounding_of(first, grid), rounding_of(second, grid)
    target = (x @ first.T).relu() @ second.T

    def loss(batch: Tensor | slice = slice(None)) -> Tensor:
        return ((x[batch] @ a().T).relu() @ b().T - target[batch]).square().sum(1).mean()

    batches = random_batches(128, 32, torch.Generator().manual_seed(0))
    found = reconstruct(
        loss, [a, b], batches, 600, objective=lambda: loss().item(), rate=3e-2, weight=1.0
    )
    assert found.learned < 0.5 * found.nearest
    assert not torch.equal(a(), a.nearest()) and not torch.equal(b(), b.nearest())


def test_losses_are_the_batches_without_regularizer() -> None:
    rounding, loss, _, _ = problem(Grid(Integer(3)))
    seen: list[float] = []

    def watched(batch: Tensor) -> Tensor:
        assert rounding.mode == "soft" and batch.shape == (32,)
        value = loss(batch)
        seen.append(value.item())
        return value

    batches = random_batches(128, 32, torch.Generator().manual_seed(0))
    found = reconstruct(watched, [rounding], batches, 30, objective=lambda: loss().item())
    assert list(found.losses) == pytest.approx(seen)
    assert len(seen) == 30


def test_the_generator_decides_the_outcome() -> None:
    weights = []
    for seed in (0, 0, 1):
        rounding, loss, _, _ = problem(Grid(Integer(3)))
        batches = random_batches(128, 8, torch.Generator().manual_seed(seed))
        reconstruct(loss, [rounding], batches, 40, objective=lambda: loss().item())  # noqa: B023
        weights.append(rounding.alpha.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_batches_are_distinct_indices_and_cover_everything() -> None:
    batches = random_batches(10, 4, torch.Generator().manual_seed(0))
    drawn = [next(batches) for _ in range(50)]
    assert all(len(b.unique()) == 4 for b in drawn)
    assert torch.cat(drawn).unique().tolist() == list(range(10))
    assert next(random_batches(3, 8, torch.Generator())).sort().values.tolist() == [0, 1, 2]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("form", [NF4, Float(2, 1)])
def test_only_integers_have_neighbours_one_step_apart(form) -> None:
    weight = gaussian(2, 4)
    with pytest.raises(QuantizationError, match="neighbouring integers"):
        SoftRounding(weight, Grid(form), snap_weight(weight, Grid(form))[1])


def test_scales_must_belong_to_the_weight() -> None:
    with pytest.raises(QuantizationError, match="scales of shape"):
        SoftRounding(gaussian(2, 4), Grid(Integer(4)), Scales(torch.ones(3, 1)))


def test_nan_in_the_weight() -> None:
    weight = torch.tensor([[float("nan"), 1.0]])
    with pytest.raises(QuantizationError, match="NaN"):
        SoftRounding(weight, Grid(Integer(4)), Scales(torch.ones(1, 1)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(bad: float) -> None:
    rounding, loss, _, _ = problem(Grid(Integer(3)))
    batches = random_batches(128, 8, torch.Generator())
    with pytest.raises(QuantizationError, match="not finite"):
        reconstruct(lambda b: loss(b) * bad, [rounding], batches, 3, objective=lambda: 1.0)
    with pytest.raises(QuantizationError, match="not finite"):
        reconstruct(loss, [rounding], batches, 3, objective=lambda: bad)


def test_nothing_to_do_is_an_error() -> None:
    rounding, loss, _, _ = problem(Grid(Integer(3)))
    batches = random_batches(128, 8, torch.Generator())
    with pytest.raises(QuantizationError, match="roundings and iterations"):
        reconstruct(loss, [], batches, 3, objective=lambda: 1.0)
    with pytest.raises(QuantizationError, match="roundings and iterations"):
        reconstruct(loss, [rounding], batches, 0, objective=lambda: 1.0)
    with pytest.raises(QuantizationError, match="0 out of 5"):
        random_batches(5, 0, torch.Generator())
