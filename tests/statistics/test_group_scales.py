"""Weight scales refitted in closed form: exact where they can be, and held to unseen prompts."""

import copy

import pytest
import torch
from tiny_pipelines import ALL
from torch import nn

from evenkeel.errors import CalibrationError
from evenkeel.fitting import refit_branches
from evenkeel.fitting.refit.site import Site
from evenkeel.hosts.pipeline.pipelines import denoiser_swapped
from evenkeel.quantizers import QuantizerSpec, load_quantized, quantize_module, save_quantized
from evenkeel.quantizers.layers.quantized_layers import QuantizedLinear
from evenkeel.statistics.group_scales import group_scales
from evenkeel.statistics.normal_equations import NormalEquations

TRAIN = ("a cat on a mat", "two dogs in the rain", "red house", "the sea at night", "old tree", "7")
TEST = ("a green lamp", "snow on a hill", "three birds")


def data(features=12, targets=5, count=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    h = torch.randn(count, features, generator=generator, dtype=torch.float64) @ mix + 2
    weight = torch.randn(targets, features, generator=generator, dtype=torch.float64)
    t = torch.randn(count, targets, generator=generator, dtype=torch.float64)
    return h, weight, t


def equations(h, t, intercept=True):
    found = NormalEquations(h.shape[1], t.shape[1], intercept)
    found.add(h, t)
    return found


@pytest.mark.parametrize("group", [3, 4, 5, 12, 64, None])
@pytest.mark.parametrize("intercept", [True, False])
def test_it_equals_one_regression_per_row(group, intercept):
    """Group 5 of 12 inputs leaves a last group of 2."""
    h, weight, t = data()
    found = group_scales(equations(h, t, intercept), weight, group, 1e-10)
    size = group or 12
    for o in range(len(weight)):
        parts = [h[:, i : i + size] @ weight[o, i : i + size] for i in range(0, h.shape[1], size)]
        a = torch.stack([*parts, *([torch.ones(len(h)).double()] if intercept else [])], 1)
        d = torch.linalg.lstsq(a, t[:, o]).solution
        assert torch.allclose(found.factors[o] - 1, d[: len(parts)], atol=1e-6)
        if intercept:
            assert found.constant[o] == pytest.approx(float(d[-1]), abs=1e-5)
    assert intercept or not found.constant.any()


def test_a_wrong_scale_is_recovered_and_the_change_is_what_the_factors_say():
    h, weight, _ = data()
    factors = torch.tensor([[1.5, 0.5, 1.0]]).double().expand(5, 3)
    true = weight * factors.repeat_interleave(4, 1)
    found = group_scales(equations(h, h @ (true - weight).T), weight, 4, 1e-12)
    assert torch.allclose(found.factors, factors, atol=1e-6)
    assert torch.allclose(weight + found.change, true, atol=1e-5)
    d, b = found.solution
    assert torch.allclose(h @ d + b, h @ (true - weight).T, atol=1e-4)


def test_chunks_of_rows_give_the_same(monkeypatch):
    h, weight, t = data(targets=7)
    whole = group_scales(equations(h, t), weight, 4, 1e-3)
    monkeypatch.setattr(
        "evenkeel.statistics.group_scales.ROWS_AT_A_TIME", 8.0 * (3 * 3 + 2 * 12) * 2
    )
    parts = group_scales(equations(h, t), weight, 4, 1e-3)
    assert torch.allclose(whole.factors, parts.factors, atol=1e-12)


def test_a_large_penalty_is_the_constant_alone_and_an_empty_row_stays():
    h, weight, t = data()
    weight[2] = 0
    found = group_scales(equations(h, t), weight, 4, 1e9)
    assert torch.allclose(found.factors, torch.ones(5, 3).double(), atol=1e-6)
    assert torch.allclose(found.constant, t.mean(0), atol=1e-4)
    free = group_scales(equations(h, t), weight, 4, 1e-6)
    assert torch.equal(free.factors[2], torch.ones(3).double()) and (free.factors[1] != 1).all()


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("inf"), float("nan")])
def test_penalties_out_of_range(penalty):
    h, weight, t = data()
    with pytest.raises(CalibrationError, match="penalty"):
        group_scales(equations(h, t), weight, 4, penalty)
    with pytest.raises(CalibrationError, match="12"):
        group_scales(equations(h, t), weight[:, :6], 4, 1.0)


def site(group=4):
    torch.manual_seed(0)
    reference = nn.Linear(16, 8)
    layer = QuantizedLinear(reference.weight.detach().clone(), reference.bias.detach().clone())
    return Site("layer", layer, reference, group=group), reference, layer


def look(s, x):
    s.open(4)
    s.prompts = (0, len(x))
    s.look(s.layer, (x,), {}, s.layer(x))


def test_a_layer_with_wrong_scales_gets_them_back():
    s, reference, layer = site()
    layer.weight.view(8, 4, 4).mul_(torch.tensor([0.8, 1.0, 1.1, 1.3])[:, None])
    look(s, torch.randn(8, 30, 16))
    report, scales = s.decide([1e-8, 1.0])
    s.put(scales)
    assert report.changed and report.what == "scales" and report.after < 1e-9 < report.before
    assert torch.allclose(layer.weight, reference.weight, atol=1e-5)
    assert torch.allclose(layer.bias, reference.bias, atol=1e-5)


def test_without_a_known_group_only_the_bias_changes():
    s, _, layer = site(group=None)
    layer.weight.mul_(0.9)
    before = layer.weight.clone()
    look(s, torch.randn(8, 30, 16) + 1)
    report, bias = s.decide([1e-8, 1.0])
    s.put(bias)
    assert report.changed and report.what == "" and torch.equal(layer.weight, before)


def test_where_the_bias_alone_is_wrong_the_weight_keeps_its_bits():
    s, reference, layer = site()
    layer.bias.add_(1)
    before = layer.weight.clone()
    look(s, torch.randn(8, 30, 16))
    report, bias = s.decide([1e-4, 1.0])
    s.put(bias)
    assert report.changed and (report.what, report.penalty) == ("", None)
    assert torch.equal(layer.weight, before)
    assert torch.allclose(layer.bias, reference.bias, atol=1e-5)


def test_scales_that_serve_no_unseen_prompt_leave_the_bias_to_be_refitted():
    s, reference, layer = site()
    layer.bias.add_(1)
    before = layer.weight.clone()
    torch.manual_seed(5)
    s.reference = copy.deepcopy(reference)
    s.open(4)
    for k in range(4):  # every prompt wants its own scales, and all want the same bias
        factors = 1 + torch.randn(8, 4, generator=torch.Generator().manual_seed(k)).double()
        change = (layer.weight.view(8, 4, 4) * factors[..., None].float()).view(8, 16)
        x = torch.randn(6, 16)
        s.folds[k].add(x, x @ (change - layer.weight).T - 1)
    s.calls, s.energy = 1, 1.0
    report, bias = s.decide([1e-4])
    s.put(bias)
    assert report.changed and report.what == "" and torch.equal(layer.weight, before)
    assert not torch.equal(layer.bias, reference.bias + 1)


def test_an_exact_layer_keeps_its_bits():
    s, _, layer = site()
    before = copy.deepcopy(layer.state_dict())
    look(s, torch.randn(8, 30, 16))
    report, scales = s.decide([1e-8, 1.0])
    assert scales is None and report.reason == "no error beyond rounding"
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("name", ["pixart_sigma", "flux"])
def test_the_denoiser_errs_less_on_prompts_it_has_not_seen(name, tmp_path):
    tiny = ALL[name]()
    reference = getattr(tiny.pipe, tiny.denoiser)
    quantized, _ = quantize_module(reference, QuantizerSpec.parse("w3a16-g16"))
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    common = {"num_inference_steps": 2, "guidance_scale": tiny.guidance_scale, "call": call}
    refitted, found = refit_branches(
        tiny.pipe, quantized=quantized, prompts=TRAIN, batch_size=3, progress=False, **common
    )
    assert any(layer.what == "scales" and layer.changed for layer in found.layers)

    def outputs(denoiser):
        """Raw denoiser outputs at the full-precision states: what the layers can answer for."""
        seen = []

        def follow(module, arguments, named, output):
            seen.append(denoiser(*arguments, **named)[0])

        hook = reference.register_forward_hook(follow, with_kwargs=True)
        with denoiser_swapped(tiny.pipe, reference), torch.no_grad():
            generators = [torch.Generator().manual_seed(90 + i) for i in range(len(TEST))]
            tiny.pipe(
                list(TEST),
                num_inference_steps=2,
                guidance_scale=tiny.guidance_scale,
                generator=generators,
                **tiny.call,
            )
        hook.remove()
        return torch.cat([o.flatten() for o in seen])

    exact = outputs(copy.deepcopy(reference))
    before = (outputs(quantized) - exact).square().mean()
    after = (outputs(refitted) - exact).square().mean()
    assert after < 0.95 * before
    save_quantized(refitted, tmp_path / "refitted")
    again = load_quantized(tmp_path / "refitted")[0]
    assert torch.equal(outputs(again), outputs(refitted))
