"""Scales of inputs for each sampling step: the told timestep finds them, in threads and copies; gradients."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.quantizers.layers.input_quantizers import StaticInput, input_from
from evenkeel.quantizers.layers.merged_layers import merged_layer
from evenkeel.quantizers.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.layers.timed_inputs import LearnedTimedInput, TimedInput
from evenkeel.quantizers.layers.told_timestep import tell
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.rounding.straight_through import straight_through

LEVELS = (900.0, 600.0, 333.25, 10.0)
SCALES = torch.tensor([0.1, 0.2, 0.3, 0.4])
ZEROS = torch.tensor([3.0, 8.0, 0.0, 15.0])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Denoiser(nn.Module):
    """Takes a timestep as diffusers' denoisers do, and waits where a test wants it to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = QuantizedLinear(
            gaussian(3, 5), activation=TimedInput(4, LEVELS, SCALES.clone(), ZEROS.clone())
        )
        self.meet = None

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Tensor:
        if self.meet is not None:
            self.meet.wait()
        return self.layer(sample)


@pytest.fixture
def denoiser() -> Denoiser:
    made = Denoiser()
    tell(made)
    return made


def expected(x: Tensor, place: int, layer: QuantizedLinear) -> Tensor:
    rounded = StaticInput(4, SCALES[[place]], ZEROS[[place]])(x)
    return nn.functional.linear(rounded, layer.weight)


@pytest.mark.parametrize(
    ("time", "place"), [(10, 3), (900, 0), (333.25, 2), (640, 1), (0, 3), (1000, 0), (466.0, 2)]
)
def test_the_told_timestep_decides_in_any_order(denoiser: Denoiser, time: float, place: int):
    x = 2 * gaussian(4, 5)
    for _ in range(2):  # nothing is counted
        found = denoiser(x, timestep=torch.tensor(time))
        assert torch.equal(found, expected(x, place, denoiser.layer))
    assert torch.equal(denoiser.forward(x, time), found)  # positional, a number, past all hooks


def test_rows_of_a_batch_may_be_told_different_timesteps(denoiser: Denoiser):
    x = 2 * gaussian(3, 2, 5)
    found = denoiser(x, torch.tensor([600, 10, 590]))
    for row, place in enumerate((1, 3, 1)):
        assert torch.equal(found[row], expected(x[row], place, denoiser.layer))
    with pytest.raises(QuantizationError, match="told 3 different timesteps, and 2 rows enter"):
        denoiser(x[:2], torch.tensor([900, 600, 10]))
    with pytest.raises(QuantizationError, match="one timestep, or one per row"):
        denoiser(x, torch.tensor([[900, 600]]))


def test_threads_do_not_hear_each_other(denoiser: Denoiser):
    """Both are inside the same denoiser at the same time, told different timesteps."""
    x, found = 2 * gaussian(4, 5), {}
    denoiser.meet = threading.Barrier(2, timeout=10)

    def call(time: float) -> None:
        found[time] = denoiser(x, time)

    threads = [threading.Thread(target=call, args=(time,)) for time in (900.0, 10.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    denoiser.meet = None
    for time, place in ((900.0, 0), (10.0, 3)):
        assert torch.equal(found[time], expected(x, place, denoiser.layer))


def test_copies_look_up_for_themselves(denoiser: Denoiser):
    x, other = 2 * gaussian(4, 5), copy.deepcopy(denoiser)
    other.layer.activation.scale.mul_(2)
    assert not torch.equal(other(x, 900), denoiser(x, 900))
    assert torch.equal(copy.deepcopy(denoiser)(x, 600), expected(x, 1, denoiser.layer))
    assert torch.equal(copy.copy(denoiser)(x, 600), expected(x, 1, denoiser.layer))
    assert type(denoiser).__name__ == "Denoiser" and isinstance(denoiser, Denoiser)


def test_a_failed_call_leaves_nothing_told(denoiser: Denoiser):
    with pytest.raises(RuntimeError):
        denoiser(gaussian(4, 6), 900)
    with pytest.raises(QuantizationError, match="call the denoiser as a whole"):
        denoiser.layer(gaussian(4, 5))


def test_a_network_without_a_timestep_is_refused():
    with pytest.raises(QuantizationError, match="takes one of"):
        tell(nn.Linear(2, 2))


def test_the_fingerprint_sees_scales_and_levels(denoiser: Denoiser):
    seen = {fingerprint(denoiser)}
    for name, value in (("scale", SCALES * 1.01), ("zero", ZEROS + 0.5)):
        other = copy.deepcopy(denoiser)
        setattr(other.layer.activation, name, value)
        seen.add(fingerprint(other))
    other = copy.deepcopy(denoiser)
    other.layer.activation.levels = (900.0, 600.0, 333.5, 10.0)
    seen.add(fingerprint(other))
    assert len(seen) == 4


def test_descriptions_come_back_and_faulty_ones_are_refused():
    made = TimedInput(4, LEVELS, SCALES, ZEROS)
    again = input_from(made.as_dict(), {"scale": SCALES, "zero": ZEROS})
    assert again.as_dict() == made.as_dict() and torch.equal(again.scale, SCALES)
    for levels, scale in (
        (LEVELS[:3], SCALES),
        ((1.0, 1.0, 2.0, 3.0), SCALES),
        (LEVELS, -SCALES),
        (LEVELS, SCALES * float("nan")),
    ):
        with pytest.raises(QuantizationError):
            TimedInput(4, levels, scale, ZEROS)


# ---------------------------------------------------------------- gradients


def smoothed(x: Tensor, scale: Tensor, zero: Tensor, largest: int, kept: Tensor) -> Tensor:
    """The rounding with its rounding error held fixed: what straight-through gradients are of."""
    codes = (x / scale + kept + zero).clamp(0, largest)
    return (codes - zero) * scale


@pytest.mark.parametrize("shape", [(), (6, 1)], ids=["one scale", "a scale per row"])
def test_gradients_are_finite_differences_of_the_smoothed_function(shape: tuple[int, ...]):
    x = (3 * gaussian(6, 40)).double()
    scale = (0.3 + 0.1 * gaussian(*shape, seed=1).abs()).double()
    zero = (5 + gaussian(*shape, seed=2)).double()
    weights = gaussian(6, 40, seed=3).double()
    given = [t.requires_grad_() for t in (x, scale, zero)]
    straight_through(*given, 15).mul(weights).sum().backward()
    with torch.no_grad():
        kept = (x / scale).round() - x / scale
        codes = x / scale + kept + zero
        clipped = (codes < 0) | (codes > 15)
        assert 10 < int(clipped.sum()) < 200  # both branches are met
        for index, tensor in enumerate(given):
            for at in range(0, tensor.numel(), 1 + tensor.numel() // 20):
                sides = []
                for step in (1e-6, -1e-6):
                    moved = [t.detach().clone() for t in given]
                    moved[index].view(-1)[at] += step
                    sides.append((smoothed(*moved, 15, kept) * weights).sum())
                found = tensor.grad.reshape(-1)[at]
                assert found == pytest.approx(float(sides[0] - sides[1]) / 2e-6, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv2d(4, 6, 3, padding=1)], ids=["linear", "conv"]
)
def test_merged_layers_start_at_the_rounded_weight_and_finish_in_the_same_bits(layer: nn.Module):
    grid = Grid.parse("uint4-zero-mse2.4")
    rounded, scales = snap_weight(layer.weight, grid)
    timed = TimedInput(4, LEVELS, SCALES, ZEROS)
    made = merged_layer(
        layer, rounded, grid, scales, rank=3, activation=timed, generator=torch.Generator()
    )
    assert torch.equal(made.weight, rounded)

    class Whole(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, sample: Tensor, timestep: float) -> Tensor:
            return self.inner(sample)

    whole = Whole(made)
    tell(whole)
    x = gaussian(3, 6) if isinstance(layer, nn.Linear) else gaussian(3, 4, 8, 8)
    optimizer = torch.optim.SGD(made.parameters(), 0.01)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    for _ in range(2):  # the first step moves B alone
        (whole(x, 600) - layer(x).detach()).square().sum().backward()
        optimizer.step()
    changed = {n for n, p in made.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"down", "up", "scale", "activation.scale", "activation.zero"}
    moved = made.activation.scale != before["activation.scale"]
    assert moved.tolist() == [False, True, False, False]  # the step that was told, no other
    finished = Whole(made.finished())
    tell(finished)
    kind = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    assert type(finished.inner) is kind
    with torch.no_grad():
        assert torch.equal(finished(x, 600), whole(x, 600))
        assert not torch.equal(finished(x, 600), finished(x, 900))


def test_merged_gradients_are_those_of_the_dense_weight():
    """dL/dA = B^T G and dL/dB = G A^T with G the gradient at W_0 + B A."""
    layer, grid = nn.Linear(6, 5), Grid.parse("uint3-zero")
    rounded, scales = snap_weight(layer.weight, grid)
    made = merged_layer(
        layer, rounded, grid, scales, rank=2, activation=None, generator=torch.Generator()
    )
    with torch.no_grad():
        made.up.copy_(0.1 * gaussian(5, 2))
    x = gaussian(7, 6)
    made(x).square().sum().backward()
    dense = made.merged.detach().requires_grad_()
    weight = straight_through(dense, made.scale.detach(), made.zero, 7)
    nn.functional.linear(x, weight, layer.bias.detach()).square().sum().backward()
    assert torch.allclose(made.down.grad, made.up.detach().T @ dense.grad, atol=1e-5)
    assert torch.allclose(made.up.grad, dense.grad @ made.down.detach().T, atol=1e-5)


def test_learned_inputs_give_the_bits_of_fixed_ones():
    start = TimedInput(4, LEVELS, SCALES, ZEROS - 0.25)

    class Whole(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, sample: Tensor, timestep: float) -> Tensor:
            return self.inner(sample)

    found = []
    for inner in (start, LearnedTimedInput(start), LearnedTimedInput(start).fixed()):
        whole = Whole(inner)
        tell(whole)
        with torch.no_grad():
            found.append(whole(3 * gaussian(4, 50), torch.tensor([900, 600, 300, 0])))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
