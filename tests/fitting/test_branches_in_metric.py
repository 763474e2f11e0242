"""Branches refitted by the engine of recovery adapters."""

import copy
from functools import cache

import pytest
import torch
from refits import SPEC, TEST, TRAIN, inputs_of, make, refit

from evenkeel.errors import CalibrationError
from evenkeel.quantizers.layers.quantized_layers import QuantizedLinear


def branched(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLinear) and m.rank}


@cache
def refitted(name, metric="output"):
    tiny, quantized, _ = make(name)
    return tiny, quantized, *refit(tiny, quantized, metric=metric)


@pytest.mark.parametrize(("name", "metric"), [("flux", "output"), ("pixart_sigma", "local")])
def test_final_samples_of_other_prompts_come_nearer(name, metric):
    tiny, quantized, found, report = refitted(name, metric)
    sample = inputs_of(tiny, tiny.model, TEST)[1]
    before, after = (
        (inputs_of(tiny, m, TEST)[1] - sample).square().mean() for m in (quantized, found)
    )
    assert after < 0.9 * before
    assert len(report.changed) > 0.7 * len(branched(quantized))
    assert all(x.after < x.before <= 1.5 for x in report.changed)


def test_branches_and_their_biases_change_and_the_given_denoiser_does_not():
    _, quantized, found, report = refitted("flux")
    assert not any(m._forward_hooks for m in found.modules())
    changed = {x.name: found.get_submodule(x.name) for x in report.changed}
    before, after = quantized.state_dict(), found.state_dict()
    others = {k for k in before if not torch.equal(before[k], after[k])}
    parts = ("down", "up", "bias")
    assert others == {
        f"{n}.{p}" for n, m in changed.items() for p in parts if getattr(m, p) is not None
    }
    assert found.evenkeel_refit == report.text().splitlines()[0]
    layers = [n for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear)]
    assert {x.name for x in report.layers} >= set(layers)


def test_a_change_of_the_branch_s_rank_is_found_through_smoothing():
    """Weights are W - U V exactly and biases are off: then U V is the best branch, and all is given back."""
    tiny, quantized, _ = make("pixart_sigma")
    torch.manual_seed(0)
    expected = {}
    for name, layer in branched(quantized).items():
        layer.activation = None
        layer.smoothing = torch.rand(layer.in_features) + 0.5
        down = torch.randn(SPEC.rank, layer.in_features) / layer.in_features**0.5
        up = 0.1 * torch.randn(layer.out_features, SPEC.rank)
        weight = tiny.model.get_submodule(name).weight.detach()
        layer.weight = weight * layer.smoothing - up @ down
        layer.down, layer.up = torch.zeros_like(layer.down), torch.zeros_like(layer.up)
        if layer.bias is not None:
            layer.bias = layer.bias + 0.3
        expected[name] = up @ down
    found, report = refit(tiny, quantized, metric="local")
    assert {x.name for x in report.changed} == set(expected)
    for name, layer in branched(found).items():
        assert torch.allclose(layer.up @ layer.down, expected[name], atol=2e-3), name
        if layer.bias is not None:
            assert torch.allclose(layer.bias, tiny.model.get_submodule(name).bias, atol=2e-3), name
    assert max(x.after for x in report.changed) < 1e-4


def test_one_prompt_is_enough_and_nothing_better_is_left_alone():
    tiny, _, found, _ = refitted("flux")
    again, report = refit(tiny, found, prompts=TRAIN[:1], metric="output")
    kept = [x for x in report.layers if not x.changed and x.what == "branch"]
    assert {x.reason for x in kept} <= {
        "no gain on held-out rows",
        "the output does not depend on it",
    }
    for x in kept:
        old, new = found.get_submodule(x.name), again.get_submodule(x.name)
        assert torch.equal(old.up, new.up) and torch.equal(old.down, new.down)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "loss"}, "metric must be one of"),
        ({"metric": "output", "penalty": 0.1}, "a penalty belongs to"),
        ({"metric": "output", "rows": 8}, "rows must be at least"),
    ],
)
def test_arguments_out_of_range(change, message):
    tiny, quantized, _ = make("pixart_sigma")
    with pytest.raises(CalibrationError, match=message):
        refit(tiny, quantized, **change)


def test_without_branches_there_is_nothing_to_refit():
    tiny, quantized, _ = make("pixart_sigma")
    bare = copy.deepcopy(quantized)
    for layer in branched(bare).values():
        layer.down = layer.up = None
    with pytest.raises(CalibrationError, match="no layer has a low-rank branch"):
        refit(tiny, bare, metric="output")
