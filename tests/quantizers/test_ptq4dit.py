"""PTQ4DiT: the balance in closed form, the unchanged function, joint learning, whole pipelines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tiny_pipelines import ALL, TinyPipeline
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.fitting.quantize import calibration_set, quantize
from evenkeel.quantizers import load_quantized
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.layers.static_ranges import searched
from evenkeel.quantizers.methods.block_reconstruction import (
    BlockTrial,
    Learning,
    WeightPlan,
    planned,
)
from evenkeel.quantizers.methods.catalogue import METHODS
from evenkeel.quantizers.methods.ptq4dit import PTQ4DiT, balancing, salience_balance
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import fit, last
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, kept
from evenkeel.quantizers.workspace.workspace import Workspace


def saliences(seed: int, samples: int = 6, channels: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    spread = torch.randn(channels, generator=g).exp()
    noise = torch.randn(samples, channels, generator=g).mul(0.3).exp()
    return spread * noise, torch.rand(channels, generator=g) + 0.1


# ---------------------------------------------------------------- the balance


def test_one_sample_in_closed_form() -> None:
    found = salience_balance(torch.tensor([[9.0, 1.0, 4.0]]), torch.tensor([1.0, 1.0, 4.0]))
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0, 1.0]))


@pytest.mark.parametrize("seed", range(4))
def test_samples_are_weighted_by_an_independent_rank_correlation(seed: int) -> None:
    x, w = saliences(seed)
    x[2, 3] = x[2, 4]  # ties share a rank
    rho = torch.tensor([spearmanr(row.numpy(), w.numpy()).statistic for row in x])
    share = torch.exp(-rho) / torch.exp(-rho).sum()
    expected = ((share[:, None] * x).sum(0) / (w + 1e-8)).sqrt().float()
    torch.testing.assert_close(salience_balance(x, w), expected)
    plain = (x.mean(0) / w).sqrt()
    assert not torch.allclose(salience_balance(x, w), plain, rtol=1e-3)  # the weights matter


def test_samples_whose_large_channels_meet_small_weights_count_more() -> None:
    w = torch.tensor([1.0, 2.0, 3.0])
    against, along = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    mean = salience_balance(torch.stack([against, along]), w).square() * w
    assert (mean - against).norm() < (mean - along).norm()
    heavy = torch.e**2 / (1 + torch.e**2)  # softmax of (1, -1)
    torch.testing.assert_close(mean, heavy * against + (1 - heavy) * along)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_both_sides_become_equally_salient_whatever_the_units(seed: int, factor: float) -> None:
    x, w = saliences(seed, samples=1)
    s = salience_balance(x, w)
    torch.testing.assert_close(x[0] / s, w * s, rtol=1e-5, atol=0)
    found = salience_balance(factor * x, w)
    torch.testing.assert_close(found, s * factor**0.5, rtol=1e-5, atol=0)
    found = salience_balance(x, factor * w)
    torch.testing.assert_close(found, s / factor**0.5, rtol=1e-5, atol=0)


def test_dead_channels_and_constant_samples() -> None:
    x = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    assert salience_balance(x, torch.tensor([1.0, 1.0])).tolist() == pytest.approx([1.0, 2.0])
    same = torch.full((3, 4), 2.0)  # no ranks: all samples count alike
    torch.testing.assert_close(salience_balance(same, torch.full((4,), 2.0)), torch.ones(4))


@pytest.mark.parametrize(
    ("x", "w"),
    [
        (torch.ones(3), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(2)),
        (torch.ones(0, 3), torch.ones(3)),
        (torch.tensor([[1.0, float("nan")]]), torch.ones(2)),
        (torch.tensor([[1.0, -1.0]]), torch.ones(2)),
        (torch.ones(1, 2), torch.tensor([1.0, float("inf")])),
    ],
)
def test_what_is_no_salience_is_refused(x: Tensor, w: Tensor) -> None:
    with pytest.raises(QuantizationError, match="salience"):
        salience_balance(x, w)


# ---------------------------------------------------------------- on denoisers


@pytest.fixture(scope="module")
def dit() -> TinyPipeline:
    return ALL["dit"]()


def calls_of(tiny: TinyPipeline, steps: int = 2) -> CalibrationSet:
    return calibration_set(
        tiny.pipe,
        tiny.prompts,
        num_inference_steps=4,
        guidance_scale=None,
        calibration_steps=steps,
        batch_size=2,
        call=tiny.call,
        progress=False,
    )


def balanced_names(workspace: Workspace) -> list[str]:
    return [n for n in workspace.layers if first_match(n, PTQ4DiT().balance)]


def expressed(workspace: Workspace, smoothing: dict[str, Tensor], *, weights: bool) -> nn.Module:
    """The denoiser with x / s, and W s if ``weights``, and nothing rounded."""
    net = copy.deepcopy(workspace.original)
    for name, s in smoothing.items():
        layer = net.get_submodule(name)
        weight = planned(layer, s if weights else None)
        parent, _, own = name.rpartition(".")
        kind = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        like = (layer,) if isinstance(layer, nn.Conv2d) else ()
        made = kind(*like, weight, layer.bias, smoothing=s)
        net.get_submodule(parent)._modules[own] = made
    return net


@pytest.mark.parametrize("name", ["dit", "pixart_sigma", "sd3", "flux", "sana"])
def test_balancing_leaves_the_full_precision_function_as_it_is(name: str) -> None:
    tiny = ALL[name]()
    workspace = Workspace(tiny.model, calls_of(tiny, steps=1))
    smoothing = balancing(workspace, balanced_names(workspace))
    assert len(smoothing) >= 8
    assert max(float((s - 1).abs().max()) for s in smoothing.values()) > 0.5
    call = workspace.calls.calls[0]
    exact = call.make(tiny.model)[0]
    for weights, same in ((True, True), (False, False)):
        found = call.make(expressed(workspace, smoothing, weights=weights))[0]
        relative = float((found - exact).norm() / exact.norm())
        assert (relative < 1e-5) == same


def test_layers_of_one_input_share_their_factors(dit: TinyPipeline) -> None:
    workspace = Workspace(dit.model, calls_of(dit))
    found = balancing(workspace, balanced_names(workspace))
    block = "transformer_blocks.1"
    q, k, v, out = (found[f"{block}.attn1.{n}"] for n in ("to_q", "to_k", "to_v", "to_out.0"))
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    assert not torch.equal(q, out)
    assert not torch.equal(q, found["transformer_blocks.0.attn1.to_q"])
    assert f"{block}.ff.net.0.proj" in found
    assert f"{block}.ff.net.2" not in found
    # From scratch: every row is a sample, and the three projections are one weight.
    seen: list[Tensor] = []
    workspace.visit([f"{block}.attn1.to_q"], lambda _, x: seen.append(x.abs().amax(1)))
    weights = [workspace.layers[f"{block}.attn1.to_{n}"].weight.detach().abs() for n in "qkv"]
    expected = salience_balance(torch.cat(seen), torch.cat(weights).amax(0))
    torch.testing.assert_close(q, expected)


def test_cross_attention_shares_by_what_it_reads() -> None:
    tiny = ALL["pixart_sigma"]()
    workspace = Workspace(tiny.model, calls_of(tiny, steps=1))
    found = balancing(workspace, balanced_names(workspace))
    q, k, v = (found[f"transformer_blocks.0.attn2.to_{n}"] for n in "qkv")
    assert torch.equal(k, v)
    assert not torch.equal(q, k)
    assert not torch.equal(k, found["transformer_blocks.1.attn2.to_k"])


def test_weights_and_input_scales_are_learned_together(dit: TinyPipeline) -> None:
    workspace = Workspace(dit.model, calls_of(dit))
    unit = next(u for u in workspace.units(workspace.open) if u.kind == "block")
    grid = Grid.parse("uint3-zero-percentile")
    weights = {n: planned(workspace.layers[n]) for n in unit.layers}
    plans = {n: WeightPlan(grid, fit(last(w, grid), grid)) for n, w in weights.items()}
    trial = BlockTrial(workspace, unit, plans)
    start = {n: searched(x, 4, "percentile") for n, x in trial.inputs().items()}
    trial.round_inputs(start)
    before = trial.objective(Learning(1))
    found = trial.learn_rounding(Learning(40, rounding_rate=0.05, input_rate=0.01))
    assert found is not None
    assert found.kept == "learned"
    assert found.nearest == before
    assert found.learned < 0.9 * before
    assert trial.objective(Learning(1)) == pytest.approx(found.learned)
    scales = {n: m.activation.scale for n, m in trial.finished().items()}
    assert all(not torch.equal(s, start[n].scale) for n, s in scales.items())
    assert all(float(s) > 0 for s in scales.values())


# ---------------------------------------------------------------- the method


def test_its_text_and_dictionary_are_the_same_method() -> None:
    method = PTQ4DiT.of_bits("w8a8", iterations=20, balance=["*.to_q"])
    assert PTQ4DiT.from_dict(method.as_dict()) == method
    assert method.grid == Grid.parse("uint8-zero-percentile")


@pytest.mark.parametrize(
    "wrong",
    [{"weight_bits": 16}, {"activation_bits": 1}, {"batch_size": 0}, {"activation_rate": -1.0}],
)
def test_fields_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError):
        PTQ4DiT(**wrong)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def test_a_denoiser_without_layers_to_balance_is_refused_unless_none_are_asked_for() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    workspace = Workspace(Plain(), kept([((x,), {})]))
    with pytest.raises(QuantizationError, match="balance"):
        PTQ4DiT(iterations=0).quantize(workspace)
    PTQ4DiT(4, 16, iterations=0, balance=()).quantize(workspace)
    layer = workspace.quantized.get_submodule("one")
    assert layer.smoothing is None
    assert layer.activation is None


@pytest.mark.parametrize("name", ["dit", "pixart_sigma", "sana"])
def test_a_whole_pipeline_is_saved_and_loaded_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, PTQ4DiT.name, PTQ4DiT)
    tiny = ALL[name]()
    skip = () if name == "dit" else ("transformer_blocks.1", "*_embed*")
    quantized, report = quantize(
        tiny.pipe,
        PTQ4DiT(8, 8, iterations=2, batch_size=4, skip=skip),
        prompts=tiny.prompts,
        num_inference_steps=2,
        calibration_steps=2,
        call=tiny.call,
        batch_size=2,
        out=tmp_path,
        progress=False,
    )
    assert (report.kept == ()) == (skip == ())
    loaded, again = load_quantized(tmp_path)
    assert again.spec == report.spec
    smoothed = 0
    for entry in report.quantized:
        old, new = quantized.get_submodule(entry.name), loaded.get_submodule(entry.name)
        assert isinstance(new, QuantizedLinear | QuantizedConv2d)
        assert isinstance(new.activation, StaticInput)
        assert new.stored is not None
        assert (new.smoothing is not None) == bool(first_match(entry.name, PTQ4DiT().balance))
        smoothed += new.smoothing is not None
        assert old.state_dict().keys() == new.state_dict().keys()
        for key, tensor in old.state_dict().items():
            assert torch.equal(new.state_dict()[key], tensor)
        assert entry.weight_error < 0.02
        assert entry.output_error is not None
    assert smoothed >= 4
    call = calls_of(tiny, steps=1).calls[0]
    exact, found = (call.make(net)[0] for net in (quantized, loaded))
    assert torch.equal(exact, found)
    original = call.make(tiny.model)[0]
    assert float((found - original).norm() / original.norm()) < 0.1
