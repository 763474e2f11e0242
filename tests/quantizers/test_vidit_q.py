"""ViDiT-Q: tokens on scales of their own, smoothing, mixed bits, and whole pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import ALL
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel import zoo
from evenkeel.errors import QuantizationError
from evenkeel.fitting.quantize import calibration_set, quantize
from evenkeel.quantizers import load_quantized
from evenkeel.quantizers.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.methods.base import quantized_on
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.methods.sensitivity import Trial, prediction
from evenkeel.quantizers.methods.vidit_q import ViDiTQ
from evenkeel.quantizers.rounding.bit_allocation import noise_share
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, kept
from evenkeel.quantizers.workspace.workspace import Workspace
from evenkeel.zoo.evaluation import sample_prompts


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Channels of very different size, one of them dead, and a last layer that hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.loud, self.quiet = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("sizes", 4.0 ** torch.arange(-4.0, 4.0))
        self.sizes[2] = 0

    def forward(self, x: Tensor) -> Tensor:
        sized = x * self.sizes
        seen = self.conv(sized.movedim(-1, 1)) + self.depth(x.movedim(-1, 1))
        return 3 * self.loud(sized) + 1e-3 * self.quiet(sized) + 1e-2 * seen.movedim(1, -1)


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def calls(count: int = 3) -> CalibrationSet:
    return kept([((noise(2, 4, 5, 8, seed=i),), {}) for i in range(count)])


def quantized_by(method: ViDiTQ, net: nn.Module) -> Workspace:
    workspace = Workspace(net, calls())
    method.quantize(workspace)
    return workspace


def answers(net: nn.Module) -> Tensor:
    return torch.cat([call.make(net) for call in calls().calls])


# ---------------------------------------------------------------- rounding


def by_hand(x: Tensor, bits: int, dims: Any) -> Tensor:
    """Asymmetric min-max rounding, as the paper has it."""
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    return (((x / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step


def test_a_layer_is_minimum_to_maximum_on_both_sides(net: Net) -> None:
    workspace = quantized_by(ViDiTQ(5, 6, candidates=(), smoothed=(), skip=()), net)
    x = noise(3, 7, 8)
    right = F.linear(by_hand(x, 6, -1), by_hand(net.loud.weight, 5, 1), net.loud.bias)
    found = workspace.quantized.loud(x)
    assert torch.allclose(found, right, atol=1e-5)
    assert not torch.allclose(found, net.loud(x), atol=1e-2)


@pytest.mark.parametrize("across_batch", [False, True])
def test_samples_depend_on_their_batch_only_if_asked_to(net: Net, across_batch: bool) -> None:
    method = ViDiTQ(8, 4, across_batch=across_batch, skip=())
    layer = quantized_by(method, net).quantized.loud
    x = noise(2, 5, 8)
    together = layer(torch.cat([x[:1], 50 * x[1:]]))[:1]
    assert torch.allclose(together, layer(x[:1]), atol=1e-5) == (not across_batch)


def test_a_dead_token_leaves_the_others_alone(net: Net) -> None:
    layer = quantized_by(ViDiTQ(8, 4, skip=()), net).quantized.loud
    x = noise(1, 5, 8)
    dead = x.clone()
    dead[:, 2] = 0
    assert torch.equal(layer(dead)[:, [0, 1, 3, 4]], layer(x)[:, [0, 1, 3, 4]])
    assert torch.allclose(layer(dead)[:, 2], net.loud.bias, atol=1e-6)


# ---------------------------------------------------------------- smoothing


def test_smoothing_does_not_change_the_function(net: Net) -> None:
    workspace = quantized_by(ViDiTQ(16, 16, skip=()), net)
    smoothed = {name: m.smoothing for name, m in workspace.quantized.named_children()}
    assert smoothed["depth"] is None  # its weight has no column for each input channel
    for name in ("conv", "loud", "quiet"):
        assert smoothed[name].max() > 5 * smoothed[name].min()
        assert smoothed[name][2] == 1
    assert torch.allclose(answers(workspace.quantized), answers(net), rtol=1e-4, atol=1e-4)


def test_smoothing_factors_are_those_of_the_running_average(net: Net) -> None:
    found = quantized_by(ViDiTQ(alpha=0.4, momentum=0.6, skip=()), net).quantized.loud.smoothing
    spans = [(c.arguments[0] * net.sizes).abs().amax((0, 1, 2)) for c in calls().calls]
    average = spans[0]
    for span in spans[1:]:
        average = 0.6 * average + 0.4 * span
    right = average**0.4 / net.loud.weight.abs().amax(0) ** 0.6
    alive = torch.arange(8) != 2
    assert torch.allclose(found[alive], right[alive])
    largest = quantized_by(ViDiTQ(alpha=1.0, momentum=0.0, skip=()), net).quantized.loud.smoothing
    assert torch.allclose(largest[alive], torch.stack(spans).amax(0)[alive])


def test_smoothing_helps_where_channels_differ(net: Net) -> None:
    errors = [
        noise_share(answers(quantized_by(method, net).quantized), answers(net))
        for method in (
            ViDiTQ(8, 4, alpha=0.5, skip=()),
            ViDiTQ(8, 4, smoothed=(), skip=()),
        )
    ]
    assert errors[0] < errors[1]


def test_only_layers_that_are_named_are_smoothed(net: Net) -> None:
    workspace = quantized_by(ViDiTQ(smoothed=("lou?",), skip=()), net)
    smooth = {n for n, m in workspace.quantized.named_children() if m.smoothing is not None}
    assert smooth == {"loud"}
    assert {n for n, r in workspace.reports.items() if r.note == "smoothed"} == {"loud"}


def test_nan_at_a_smoothed_layer_is_refused(net: Net) -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 0)

    broken = Broken()
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        ViDiTQ(skip=()).quantize(Workspace(broken, calls()))


# ---------------------------------------------------------------- mixed bits


def test_layers_that_matter_get_the_bits(net: Net) -> None:
    method = ViDiTQ(5, 8, candidates=(2, 8), ratios=(1.0,), skip=("conv", "depth"))
    reports = quantized_by(method, net).reports
    assert {n: r.weight_bits for n, r in reports.items() if not r.kept} == {"loud": 8, "quiet": 2}


@pytest.mark.parametrize(
    "method", [ViDiTQ(8), ViDiTQ(8, candidates=(2, 4)), ViDiTQ(3, candidates=())]
)
def test_nothing_is_mixed_where_all_bits_are_equal(
    method: ViDiTQ, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "damage", None)
    reports = quantized_by(method, net).reports
    assert {report.weight_bits for report in reports.values()} == {method.weight_bits}
    with pytest.raises(TypeError):
        quantized_by(ViDiTQ(4), net)


def test_calibration_is_needed_for_smoothing_and_for_mixing() -> None:
    assert ViDiTQ().calibrated
    assert ViDiTQ(4, smoothed=()).calibrated
    assert not ViDiTQ(8, smoothed=()).calibrated
    assert not ViDiTQ(4, candidates=(), smoothed=()).calibrated


def test_it_works_without_calibration(net: Net) -> None:
    workspace = Workspace(net)
    ViDiTQ(8, 8, smoothed=(), skip=()).quantize(workspace)
    assert noise_share(answers(workspace.quantized), answers(net)) < 1e-3


# ---------------------------------------------------------------- whole pipelines


def weighted_mean(report: Any) -> float:
    sizes = [int(np.prod(entry.shape)) for entry in report.quantized]
    return float(np.average([entry.weight_bits for entry in report.quantized], weights=sizes))


@pytest.mark.parametrize(
    ("name", "bits"),
    [("sdxl", 8), ("pixart_sigma", 8), ("pixart_sigma", 4), ("flux", 8), ("sana", 8)],
)
def test_a_pipeline_meets_its_budget_and_comes_back_bit_by_bit(
    name: str, bits: int, tmp_path: Path
) -> None:
    tiny = ALL[name]()
    where = {"guidance_scale": tiny.guidance_scale, "batch_size": 2, "call": tiny.call}
    where |= {"num_inference_steps": 2, "calibration_steps": 1, "progress": False}
    method = ViDiTQ(bits, 8, sensitivity_calls=1, ratios=(0.8,))
    quantized, report = quantize(tiny.pipe, method, prompts=tiny.prompts, out=tmp_path, **where)
    assert weighted_mean(report) <= bits
    assert all(entry.reason.startswith("skip") for entry in report.kept)
    loaded, again = load_quantized(tmp_path)
    assert again == report
    kinds = {type(module) for module in loaded.modules()}
    assert QuantizedLinear in kinds
    assert (QuantizedConv2d in kinds) == (name in ("sdxl", "sana"))
    a, b = quantized.state_dict(), loaded.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    call = calibration_set(tiny.pipe, tiny.prompts, **where).calls[0]
    found = [prediction(call.make(net), net) for net in (quantized, loaded, tiny.model)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.rarely
@pytest.mark.parametrize("bits", [8, 6])
def test_it_is_better_than_plain_rounding_at_the_same_bits(bits: int) -> None:
    pipe = zoo.load("pixart-sigma")
    some, held = (
        calibration_set(
            pipe, sample_prompts(2, seed), num_inference_steps=20, guidance_scale=4.5, calibration_steps=4,
            batch_size=2, seed=100 * seed, progress=False,
        )
        for seed in (1, 2)
    )  # fmt: skip
    errors = []
    for method in (ViDiTQ(bits, 8, candidates=()), RoundToNearest(bits, 8, group=None)):
        quantized, report = quantized_on(Workspace(pipe.transformer, some), method)
        assert weighted_mean(report) == bits
        nets = (quantized, pipe.transformer)
        pairs = [[prediction(call.make(net), net) for net in nets] for call in held.calls]
        errors.append(np.mean([noise_share(*pair) for pair in pairs]))
    assert errors[0] < 0.7 * errors[1]


# ---------------------------------------------------------------- the method


def test_its_text_and_dictionary_are_the_same_method() -> None:
    method = ViDiTQ.of_bits("w4a8", smoothed=["*.ff.net.2"], across_batch=True)
    assert str(method) == "vidit-q-w4a8-smoothed=('*.ff.net.2',)-across_batch=True"
    assert ViDiTQ.from_dict(method.as_dict()) == method


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_bits": 1},
        {"activation_bits": 2},
        {"candidates": (8, 4)},
        {"candidates": (4, 16)},
        {"alpha": 1.5},
        {"momentum": 1.0},
        {"ratios": ()},
        {"ratios": (-1.0,)},
        {"sensitivity_calls": 0},
    ],
)
def test_fields_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError):
        ViDiTQ(**wrong)
