"""Branches refitted in closed form: exact where they can be, optimal, held to unseen prompts."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from refits import SPEC, TEST, TRAIN, inputs_of, make, refit
from tiny_pipelines import ALL
from torch import nn

from evenkeel.errors import CalibrationError
from evenkeel.fitting.refit.refit_branches import RefitReport
from evenkeel.fitting.refit.site import LayerRefit, Site, fold_index, spread
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.quantizers import QuantizerSpec, load_quantized, quantize_module, save_quantized
from evenkeel.quantizers.layers.input_quantizers import fake_quantize
from evenkeel.quantizers.layers.quantized_layers import QuantizedLinear
from evenkeel.statistics.normal_equations import NormalEquations
from evenkeel.statistics.reduced_rank import HeldOut, LowRank, held_out, reduced_rank


def rows(count=200, features=6, targets=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    h = torch.randn(count, features, generator=generator, dtype=torch.float64) @ mix + 1
    w = torch.randn(features, targets, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, targets, generator=generator, dtype=torch.float64)
    return h, h @ w + noise - 2


def equations(h, t, intercept=True):
    found = NormalEquations(h.shape[1], t.shape[1], intercept)
    found.add(h, t)
    return found


def whitened_svd(h, t, penalty, rank, prior):
    """Rank-R ridge by stacking the penalty as rows: SVD of the fitted values of least squares."""
    h, t, prior = (x.numpy() for x in (h, t, prior))
    hc, tc = h - h.mean(0), t - t.mean(0)
    strength = np.sqrt(penalty * (hc**2).sum(0).mean())
    a = np.vstack([hc, strength * np.eye(h.shape[1])])
    b = np.vstack([tc, strength * prior])
    full = np.linalg.lstsq(a, b, rcond=None)[0]
    v = np.linalg.svd(a @ full, full_matrices=False)[2][:rank].T
    return full @ v @ v.T, lambda d: ((b - a @ d) ** 2).sum()


# ---- the mathematics


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 8),
    st.sampled_from([1e-6, 1e-2, 3.0]),
    st.integers(0, 99),
)
def test_reduced_rank_is_the_svd_in_the_whitened_metric(features, targets, rank, penalty, seed):
    rank = min(rank, features, targets)
    h, t = rows(60, features, targets, seed)
    prior = torch.randn(features, targets, generator=torch.Generator().manual_seed(seed)).double()
    branch = reduced_rank(equations(h, t), penalty, rank, prior)
    expected, objective = whitened_svd(h, t, penalty, rank, prior)
    d, constant = branch.solution
    # The objective, not the map: two directions of nearly equal strength may trade places.
    assert objective(d.numpy()) == pytest.approx(objective(expected), rel=1e-9)
    assert torch.allclose(constant, t.mean(0) - h.mean(0) @ d)
    assert branch.down.shape == (rank, features) and branch.up.shape == (targets, rank)


def test_reduced_rank_beats_the_svd_of_the_full_solution():
    h, t = rows()
    h[:, 0] *= 30  # a metric far from the identity
    system, zero = equations(h, t), torch.zeros(6, 5, dtype=torch.float64)
    _, objective = whitened_svd(h, t, 1e-6, 2, zero)
    full = system.solve([1e-6])[0][0]
    u, s, v = torch.linalg.svd(full, full_matrices=False)
    plain = (u[:, :2] * s[:2]) @ v[:2]
    best = reduced_rank(system, 1e-6, 2).solution[0]
    assert objective(best.numpy()) < 0.99 * objective(plain.numpy())


def test_full_rank_is_ridge_and_a_large_penalty_is_the_svd_of_the_prior():
    h, t = rows()
    system, prior = equations(h, t), rows(6, 5, 5, seed=3)[1][:6]
    full = reduced_rank(system, 0.1, 5, prior).solution[0]
    assert torch.allclose(full, system.solve([0.1], (prior, torch.zeros(5)))[0][0])
    u, s, v = torch.linalg.svd(prior, full_matrices=False)
    strong = reduced_rank(system, 1e12, 2, prior).solution[0]
    assert torch.allclose(strong, (u[:, :2] * s[:2]) @ v[:2], atol=1e-6)


def test_features_that_never_vary_leave_the_best_part_of_the_prior():
    prior = rows(6, 5, 5, seed=3)[1][:6]
    system = equations(torch.ones(20, 6), rows(20)[1])
    u, s, v = torch.linalg.svd(prior, full_matrices=False)
    found = reduced_rank(system, 1e-3, 2, prior).solution[0]
    assert torch.allclose(found, (u[:, :2] * s[:2]) @ v[:2])
    assert reduced_rank(system, 1e-3, 2).solution[0].abs().max() == 0


def test_factors_share_the_norm_evenly():
    branch = reduced_rank(equations(*rows()), 1e-3, 3)
    assert torch.allclose(branch.down.norm(dim=1), branch.up.norm(dim=0))


def test_without_intercept_there_is_no_constant():
    h, t = rows()
    branch = reduced_rank(equations(h, t, intercept=False), 1e-8, 5)
    assert branch.constant.abs().max() == 0
    assert torch.allclose(branch.solution[0], torch.linalg.lstsq(h, t).solution, atol=1e-5)


@pytest.mark.parametrize(("penalty", "rank"), [(0.0, 1), (float("nan"), 1), (1.0, -1), (1.0, 6)])
def test_penalty_and_rank_out_of_range(penalty, rank):
    with pytest.raises(CalibrationError, match="expected a"):
        reduced_rank(equations(*rows()), penalty, rank)


def test_held_out_errors_are_those_of_the_rows():
    h, t = rows(90)
    parts = [(h[i::3], t[i::3]) for i in range(3)]
    present = (torch.full((6, 5), 0.1, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    penalties, zero = [1e-3, 1.0], torch.zeros(6, 5, dtype=torch.float64)
    found = held_out([equations(*part) for part in parts], penalties, 2, present)
    for f, (hf, tf) in enumerate(parts):
        assert float(found.before[f]) == pytest.approx(float(((tf - hf @ present[0]) ** 2).sum()))
        hr, tr = (torch.cat([p[k] for g, p in enumerate(parts) if g != f]) for k in (0, 1))
        for p, penalty in enumerate(penalties):
            d = torch.from_numpy(whitened_svd(hr, tr, penalty, 2, zero)[0])
            error = ((tf - tr.mean(0) - (hf - hr.mean(0)) @ d) ** 2).sum()
            assert float(found.after[p, f]) == pytest.approx(float(error))


def test_held_out_judges_what_is_stored():
    def nothing(branch):
        return LowRank(branch.down * 0, branch.up, branch.constant * 0)

    h, t = rows(90)
    folds = [equations(h[:40], t[:40]), equations(h[40:], t[40:])]
    zero = (torch.zeros(6, 5), torch.zeros(5))
    found = held_out(folds, [0.1], 2, zero, rounded=nothing)
    assert torch.allclose(found.after[0], found.before) and not found.improves


@pytest.mark.parametrize(
    "folds", [[], [equations(*rows())], [equations(*rows()), NormalEquations(6, 5)]]
)
def test_too_few_folds(folds):
    with pytest.raises(CalibrationError, match="at least two folds"):
        held_out(folds, [1.0], 2, (torch.zeros(6, 5), torch.zeros(5)))


@pytest.mark.parametrize(
    ("after", "improves"),
    [
        ([0.9, 0.99, 0.9, 0.99], True),  # every fold
        ([0.5, 0.4, 0.5, 1.01], True),  # not every fold, but far beyond their scatter
        ([0.5, 0.9, 0.9, 1.1], False),  # better in sum, within the scatter
        ([1.0, 1.0, 1.0, 1.0], False),
        ([0.9, 0.9, 0.9, 1.5], False),
    ],
)
def test_the_rule_of_improvement(after, improves):
    assert HeldOut(torch.ones(4), torch.tensor([[9.0] * 4, after])).improves is improves


def test_guidance_halves_of_a_prompt_share_a_fold():
    found = fold_index(6, 2, first=3, batch=3, folds=4, calls=5)
    assert found.tolist() == [[3, 3], [0, 0], [1, 1]] * 2
    assert fold_index(5, 2, 3, 3, 4, 6).unique().tolist() == [2]  # in turn, by call
    assert fold_index(16, 1, 5, 1, 4, 0).unique().tolist() == [1]  # a batch of one prompt


# ---- one layer


def site_of(layer, reference):
    site = Site("layer", layer, reference)
    site.open(4)
    return site


def look(site, x, prompts=4):
    site.prompts = (0, prompts)
    site.look(site.layer, (x,), {}, site.layer(x))


def linear(seed=0, features=16, targets=24, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(features, targets, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_an_error_of_the_branch_s_rank_is_recovered(bias):
    reference = linear(bias=bias)
    torch.manual_seed(1)
    missing = torch.randn(24, 3) @ torch.randn(3, 16)
    layer = QuantizedLinear(
        reference.weight - missing, reference.bias, torch.randn(3, 16), torch.randn(24, 3)
    )
    if bias:
        layer.bias = layer.bias - 2
    site, x = site_of(layer, reference), torch.randn(4, 50, 16)
    look(site, x)
    refit, branch = site.decide([1e-8])
    site.put(branch)
    assert refit.changed and refit.before > 1e-2 and refit.after < 1e-11
    assert torch.allclose(layer.up @ layer.down, missing, atol=1e-5)
    assert torch.allclose(layer(x), reference(x), atol=1e-4)
    assert (layer.bias is None) is not bias


def test_of_many_tokens_some_are_taken_evenly_and_others_in_the_next_call():
    x = torch.arange(700.0).expand(3, 700)[..., None] + torch.tensor([0.0, 1e4])
    first, second = spread(x, 0), spread(x, 1)
    assert first.shape == second.shape == (3, 256, 2)
    assert first[0, :, 0].tolist() == [i * 700 // 256 for i in range(256)]
    assert torch.equal(second, first + 1) and second.max() < 1e4 + 700
    assert torch.equal(spread(x, 2), first)
    assert spread(x[:, :256], 5) is x[:, :256] or torch.equal(spread(x[:, :256], 5), x[:, :256])
    image = x.reshape(3, 70, 10, 2)
    assert torch.equal(spread(image, 1), second)
    vectors = torch.zeros(5, 2)
    assert spread(vectors, 1) is vectors
    reference = linear()
    layer = QuantizerSpec(3, 4, group=8, rank=2).layer(reference)
    site = site_of(layer, reference)
    look(site, torch.randn(4, 600, 16))
    site.settle()
    assert [fold.count for fold in site.folds] == [256] * 4


def test_the_target_is_the_layers_own_error_without_branch():
    reference = linear()
    layer = QuantizerSpec(3, 4, group=8, rank=2).layer(reference)
    site, x = site_of(layer, reference), torch.randn(4, 30, 16)
    look(site, x)
    rounded = fake_quantize(x, 4, layer.activation.group)
    r = (reference(x) - F.linear(rounded, layer.weight, layer.bias)).double()
    site.settle()
    total = NormalEquations.merged(site.folds)
    assert np.allclose(total.mean_t, r.mean((0, 1)), atol=1e-6)
    assert np.allclose(site.folds[2].mean_h, x[2].double().mean(0))
    present = float(total.squared_error([site._present(total)])[0])
    assert present == pytest.approx(float((reference(x) - layer(x)).square().sum()), rel=1e-4)
    assert site.energy == pytest.approx(float(layer(x).square().sum()), rel=1e-5)


def test_bfloat16_buffers_stay_bfloat16_and_improve():
    reference = linear().bfloat16()
    layer = QuantizerSpec(3, 8, group=8, rank=2).layer(reference)
    site, x = site_of(layer, reference), torch.randn(4, 99, 16).bfloat16() + 1
    look(site, x)
    before = (layer(x).float() - reference(x).float()).square().sum()
    refit, branch = site.decide([1e-3, 1e-1])
    site.put(branch)
    assert refit.changed
    assert {layer.down.dtype, layer.up.dtype, layer.bias.dtype} == {torch.bfloat16}
    assert (layer(x).float() - reference(x).float()).square().sum() < before


def test_factors_that_float16_cannot_hold_name_the_layer():
    layer = QuantizedLinear(
        torch.zeros(24, 16).half(), None, torch.zeros(2, 16).half(), torch.zeros(24, 2).half()
    )
    reference = nn.Linear(16, 24, bias=False).requires_grad_(False)
    reference.weight.fill_(3e10)
    site = site_of(layer, reference)
    look(site, torch.rand(4, 50, 16).half())
    with pytest.raises(CalibrationError, match=r"refit of layer 'layer'.*not finite"):
        site.decide([1e-3])


def test_a_convolution_refits_its_bias_to_the_mean_error():
    torch.manual_seed(0)
    reference = nn.Conv2d(8, 6, 3, padding=1).requires_grad_(False)
    layer = QuantizerSpec(3, 4).layer(reference)
    weight, site, x = layer.weight.clone(), site_of(layer, reference), torch.randn(8, 8, 5, 5) + 2
    look(site, x)
    expected = layer.bias + (reference(x) - layer(x)).mean((0, 2, 3))
    refit, branch = site.decide([1e-3, 1.0])
    site.put(branch)
    assert refit.changed and refit.penalty is None and refit.rank == 0
    assert torch.allclose(layer.bias, expected, atol=1e-6) and torch.equal(layer.weight, weight)


def test_a_layer_with_neither_branch_nor_bias_is_kept():
    reference = linear(bias=False)
    site = site_of(QuantizerSpec(3, 4).layer(reference), reference)
    look(site, torch.randn(4, 9, 16))
    refit, branch = site.decide([1.0])
    assert (refit.reason, branch) == ("neither branch nor scales nor bias", None)


def test_folds_that_disagree_keep_the_layer():
    """The mean error of every prompt points another way: no bias serves an unseen one."""
    reference = linear()
    layer = QuantizedLinear(torch.zeros(24, 16), reference.bias)
    x = torch.randn(4, 1, 16).repeat(1, 20, 1)
    x = x - x.mean(0)
    site = site_of(layer, reference)
    look(site, x)
    refit, branch = site.decide([1.0])
    assert refit.reason == "no gain on held-out prompts" and branch is None
    assert refit.after > refit.before
    site = site_of(layer, reference)
    look(site, x + 1)  # now they agree on something
    assert site.decide([1.0])[0].changed


def test_no_error_is_left_alone():
    reference = linear()
    down, up = torch.randn(2, 16) / 20, torch.randn(24, 2)
    layer = QuantizedLinear(reference.weight - up @ down, reference.bias, down, up)
    site = site_of(layer, reference)
    look(site, torch.randn(4, 50, 16))
    assert site.decide([1e-3])[0].reason == "no error beyond rounding"


def test_rows_of_a_single_fold_or_none_at_all():
    reference = linear()
    layer = QuantizerSpec(3, 4, rank=2).layer(reference)
    site = site_of(layer, reference)
    assert site.decide([1.0])[0].reason == "was not called"
    look(site, torch.randn(9, 50, 16))  # nine rows of four prompts: by call, and there is one
    assert "smaller batch_size" in site.decide([1.0])[0].reason


# ---- pipelines


@pytest.mark.parametrize("name", ["sdxl", "flux", "pixart_sigma"])
def test_the_denoiser_errs_less_on_prompts_it_has_not_seen(name):
    tiny, quantized, _ = make(name)
    before = copy.deepcopy(quantized.state_dict())
    refitted, report = refit(tiny, quantized)
    calls, sample = inputs_of(tiny, tiny.model, TEST)
    errors = torch.zeros(2, len(calls))
    with torch.no_grad():
        for k, (args, kwargs) in enumerate(calls):
            exact = tiny.model(*args, **kwargs)[0]
            for m, model in enumerate((quantized, refitted)):
                errors[m, k] = (model(*args, **kwargs)[0] - exact).square().mean()
    assert (errors[1] < 0.9 * errors[0]).all()
    finals = [(inputs_of(tiny, m, TEST)[1] - sample).square().mean() for m in (quantized, refitted)]
    assert finals[1] < finals[0]
    assert np.mean([x.after / x.before for x in report.changed]) < 0.9
    assert len(report.changed) > 0.7 * len(report.layers)
    assert all(torch.equal(before[k], v) for k, v in quantized.state_dict().items())
    assert type(refitted) is type(quantized)
    assert not any(m._forward_hooks for m in refitted.modules())
    assert tiny.pipe.components[tiny.denoiser] is tiny.model


def test_kept_layers_keep_their_bits_and_changed_ones_do_not():
    tiny, quantized, _ = make("pixart_sigma")
    exact = [n for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear)][::2]
    for name in exact:  # every other layer makes no error at all
        layer = quantized.get_submodule(name)
        layer.weight, layer.activation = tiny.model.get_submodule(name).weight.data.clone(), None
        layer.up = torch.zeros_like(layer.up)
    refitted, report = refit(tiny, quantized)
    assert set(exact) <= {x.name for x in report.layers if not x.changed}
    assert {x.reason for x in report.layers if x.name in exact} == {"no error beyond rounding"}
    assert len(report.changed) > 0.7 * (len(report.layers) - len(exact))
    for layer in report.layers:
        old, new = quantized.get_submodule(layer.name), refitted.get_submodule(layer.name)
        same = [torch.equal(a, b) for a, b in zip(old.buffers(), new.buffers(), strict=True)]
        assert all(same) is not layer.changed
        assert torch.equal(old.weight, new.weight)


def test_groups_of_layers_in_turn_give_the_same_result():
    tiny, quantized, _ = make("pixart_sigma")
    at_once, report = refit(tiny, quantized, batch_size=4)
    in_turn, other = refit(tiny, quantized, batch_size=4, memory=5e5)
    assert fingerprint(at_once) == fingerprint(in_turn) != fingerprint(quantized)
    assert report == other


def test_a_refitted_module_can_be_saved_and_loaded(tmp_path):
    tiny, quantized, _ = make("pixart_sigma")
    refitted, report = refit(tiny, quantized)
    loaded, _ = load_quantized(save_quantized(refitted, tmp_path))
    assert fingerprint(loaded) == fingerprint(refitted)
    assert refitted.evenkeel_quantizer == str(SPEC)
    assert refitted.evenkeel_refit == report.text().splitlines()[0]
    assert not hasattr(quantized, "evenkeel_refit")


def test_two_prompts_are_enough_and_one_is_not():
    """Blocks of one prompt are no substitute: measured, its refit ruins every other prompt."""
    tiny, quantized, _ = make("flux")
    _, report = refit(tiny, quantized, prompts=TRAIN[:2])
    assert report.prompts == 2 and len(report.changed) > 0.3 * len(report.layers)
    with pytest.raises(CalibrationError, match="at least two prompts"):
        refit(tiny, quantized, prompts=TRAIN[:1])


def test_class_labels_and_a_fixed_penalty():
    tiny, quantized, _ = make("dit")
    _, report = refit(tiny, quantized, prompts=[3, 7, 1, 2], penalty=0.1)
    assert {x.penalty for x in report.layers if x.rank and x.before} == {0.1}
    assert report.changed


def test_the_report_is_a_table_and_json():
    layers = (
        LayerRefit("block.0", 4, 0.2, 0.05, 0.1, what="branch"),
        LayerRefit("block.1", 0, reason="was not called"),
    )
    report = RefitReport(layers, 8)
    lines = report.text().splitlines()
    assert lines[0].startswith("1 of 2 layers refitted on 8 prompts") and "x 0.25" in lines[0]
    assert lines[2].split() == ["block.0", "branch", "bias", "4", "0.2", "0.05", "0.1"]
    assert lines[3].endswith("kept: was not called")
    found = json.loads(json.dumps(report.as_dict()))
    assert [x["changed"] for x in found["layers"]] == [True, False]
    assert [x["bias"] for x in found["layers"]] == [True, True]


@pytest.mark.parametrize(
    ("what", "bias", "said"),
    [
        ("branch", True, ["branch", "bias"]),
        ("branch", False, ["branch"]),
        ("scales", False, ["scales"]),
        ("", True, ["bias"]),
        ("", False, ["-"]),
    ],
)
def test_the_report_names_a_bias_only_where_there_is_one(what, bias, said):
    layer = LayerRefit("block.0", 4, 0.2, 0.05, 0.1, what=what)
    other = LayerRefit("block.1", 4, 0.2, 0.05, 0.1, what="branch")
    without = frozenset() if bias else frozenset({"block.0"})
    report = RefitReport((layer, other), 8, without)
    lines = [line.split() for line in report.text().splitlines()]
    assert lines[2] == ["block.0", *said, "4", "0.2", "0.05", "0.1"]
    assert lines[3][1:3] == ["branch", "bias"]
    assert [x["bias"] for x in report.as_dict()["layers"]] == [bias, True]


def test_a_refit_reports_the_layers_of_the_module_that_have_no_bias():
    tiny = ALL["pixart_sigma"]()
    block = tiny.model.transformer_blocks[0]
    block.attn1.to_q.bias = None
    quantized, _ = quantize_module(tiny.model, SPEC)
    _, report = refit(tiny, quantized)
    name = "transformer_blocks.0.attn1.to_q"
    assert report.without_bias == {name}
    words = {line.split()[0]: line.split()[1:] for line in report.text().splitlines()[2:]}
    assert words[name][:2] == ["branch", str(SPEC.rank)]
    assert words["transformer_blocks.0.attn1.to_k"][:2] == ["branch", "bias"]


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "non-empty list of prompts"),
        ({"prompts": "a cat"}, "non-empty list of prompts"),
        ({"batch_size": 0}, "batch_size"),
        ({"penalty": 0.0}, "penalty"),
        ({"penalty": float("inf")}, "penalty"),
        ({"memory": 0}, "memory"),
    ],
)
def test_arguments_out_of_range(change, message):
    tiny, quantized, _ = make("pixart_sigma")
    with pytest.raises(CalibrationError, match=message):
        refit(tiny, quantized, **change)


def test_modules_that_do_not_belong_together():
    tiny, quantized, _ = make("pixart_sigma")
    with pytest.raises(CalibrationError, match="own denoiser object"):
        refit(tiny, tiny.model)
    with pytest.raises(CalibrationError, match="nothing to refit"):
        refit(tiny, copy.deepcopy(tiny.model))
    other = ALL["flux"]()
    with pytest.raises(CalibrationError, match="of the same name"):
        refit(other, quantized)
    tiny.pipe.transformer = copy.deepcopy(quantized)  # the pipeline's own one is quantized too
    with pytest.raises(CalibrationError, match="of the same name"):
        refit(tiny, quantized)


def test_values_that_are_not_finite_name_the_layer():
    tiny, quantized, _ = make("pixart_sigma")
    name = next(n for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear))
    quantized.get_submodule(name).bias.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=f"layer '{name}'.*not finite"):
        refit(tiny, quantized)
    assert tiny.pipe.transformer is tiny.model
