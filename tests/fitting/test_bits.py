"""Bits per layer within a budget: what is predicted, chosen, written, and what backends make of it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_pipelines import ALL, generate
from torch import nn

import evenkeel
from evenkeel import zoo
from evenkeel.errors import QuantizationError
from evenkeel.fitting.adapters.collect import collect
from evenkeel.fitting.adapters.effective_weight import effective_weight
from evenkeel.fitting.adapters.final_samples import FinalSamples
from evenkeel.fitting.adapters.pairs import Pairs
from evenkeel.fitting.adapters.sites import opened, sites_of
from evenkeel.fitting.bits import quantize_to_budget as module
from evenkeel.fitting.bits.allocation import (
    best_uniform,
    metric_of,
    mixed,
    options_of,
    scaled,
    uniforms_of,
    widest_uniform,
)
from evenkeel.fitting.bits.families import Own
from evenkeel.fitting.bits.layouts import LAYOUTS
from evenkeel.fitting.bits.quantize_to_budget import WEIGHT_ONLY, built
from evenkeel.fitting.bits.report import FILE, KIND
from evenkeel.hosts.run import Run
from evenkeel.low_rank.budget import Option, hull
from evenkeel.low_rank.metric import OutputMetric
from evenkeel.low_rank.moment import second_moment
from evenkeel.quantizers import QuantizationReport, RoundToNearest, load_quantized
from evenkeel.quantizers.methods.per_layer import PerLayer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.rounding.gptq import gptq
from evenkeel.storage import read_json
from evenkeel.zoo.pictures import KINDS

STEPS = 3


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32, bias=False))


@pytest.fixture(scope="module")
def metrics(net) -> dict[str, OutputMetric]:
    torch.manual_seed(1)
    made = {}
    for i, layer in enumerate(net):
        o, f = layer.weight.shape
        x = torch.randn(500, 8) @ torch.randn(8, f) + 0.3 * torch.randn(500, f)
        g = torch.randn(500, o) * torch.rand(o) * (1 + 9 * i)
        made[str(i)] = OutputMetric(second_moment(x), second_moment(g))
    return made


@pytest.fixture(scope="module")
def options(net, metrics):
    family = Own(RoundToNearest(4, 16, skip=(), rank=8))
    return options_of(family, dict(net.named_children()), metrics.get, "w4-g32")


def quantized(tiny, bits, **more):
    """A tiny pipeline's denoiser within so many bits."""
    asked = {
        "prompts": [*tiny.prompts],
        "num_inference_steps": STEPS,
        "guidance_scale": tiny.guidance_scale,
        "call": {k: v for k, v in tiny.call.items() if k != "output_type"},
        "progress": False,
        **more,
    }
    return evenkeel.quantize_to_budget(tiny.pipe, bits, **asked)


def said(gains):
    """Pairs of errors answer with these gains, over and over."""
    return lambda before, _: torch.tensor([gains[i % len(gains)] for i in range(len(before))])


# ---- what is predicted


def test_a_choice_costs_what_is_stored_and_errs_as_the_metric_says(net, metrics, options):
    # 4 bits in groups of 32 and a scale of 16 bits: 4.5 bits; a branch of rank 8 in 16 bits
    assert options["0"]["w4-g32"].bytes == 64 * 32 * 4.5 / 8
    assert options["0"]["w4-g32-r8"].bytes == 64 * 32 * 4.5 / 8 + 2 * 8 * (64 + 32)
    layer = RoundToNearest(3, 16, group=16, rank=4).layer(net[0])
    change = (net[0].weight.detach() - layer.weight - layer.up @ layer.down).double()
    s, g = metrics["0"].inputs, metrics["0"].outputs
    by_hand = float(torch.trace(g @ change @ s @ change.T))
    assert options["0"]["w3-g16-r4"].error == pytest.approx(by_hand, rel=1e-4)
    assert {c.split("-")[-1] for c in options["0"] if "r" in c} == {"r4", "r8"}


def test_a_layer_that_was_not_measured_has_no_choice(net, metrics):
    family = Own(RoundToNearest(4, 16, skip=()))
    found = options_of(family, dict(net.named_children()), {"0": metrics["0"]}.get, "w4-g64")
    assert [*found["1"]] == ["w4-g64"] and found["1"]["w4-g64"].error == 0
    assert len(found["0"]) == 28


def test_kinds_are_scaled_to_what_is_measured():
    def one(error):
        return {c: Option(b, error / b, c) for c, b in (("w3-g32", 3), ("w4-g32", 4))}

    options = {"b.0.k": one(12.0), "b.1.k": one(24.0), "b.0.v": one(4.0)}
    found = scaled(options, "w4-g32", lambda names: 18.0 if "b.0.k" in names else 0.5)
    # 3 + 6 were predicted of the keys together, 1 of the values
    assert [found[n]["w3-g32"].error for n in options] == pytest.approx([8.0, 16.0, 2 / 3])
    assert [found[n]["w4-g32"].error for n in options] == pytest.approx([6.0, 12.0, 0.5])


# ---- what is chosen


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("bits", [2.6, 3.2, 4.1, 4.5, 5.7])
def test_no_other_choice_of_as_many_bytes_is_better_than_the_one_found(options, bits, ranks):
    budget = int(bits * sum(64 * 32 for _ in options) / 8)
    family = Own(WEIGHT_ONLY)
    few = {
        n: {c: o for c, o in each.items() if "g32" in c and (ranks or "r" not in c)}
        for n, each in options.items()
    }
    chosen = mixed(family, few, budget)
    spent, error = (sum(getattr(o, k) for o in chosen.values()) for k in ("bytes", "error"))
    assert spent <= budget
    every = [
        (sum(o.bytes for o in mix), sum(o.error for o in mix))
        for mix in itertools.product(*(each.values() for each in few.values()))
    ]
    best = min(e for size, e in every if size <= budget)
    # within one item: nothing that spends less by the largest step of a hull is better
    step = max(
        b.bytes - a.bytes for each in few.values() for a, b in pairwise(hull([*each.values()]))
    )
    less = [e for size, e in every if size <= budget - step]
    assert best <= error <= min(less, default=float("inf"))
    assert bits < 3 or less or ranks
    assert spent > budget - step or error == best


def test_near_keeps_bits_within_one(options):
    family = Own(WEIGHT_ONLY)
    budget = int(4.5 * 64 * 32 * 3 / 8)
    free, near = mixed(family, options, budget), mixed(family, options, budget, near=4)
    assert {family.bits_of(o.choice) for o in near.values()} <= {3, 4, 5}
    assert sum(o.error for o in free.values()) <= sum(o.error for o in near.values())


def test_the_uniform_rival_is_the_best_that_fits(net, options):
    family, layers = Own(RoundToNearest(4, 16, skip=(), rank=8)), dict(net.named_children())
    budget = int(4.5 * 64 * 32 * 3 / 8)
    rival = best_uniform(options, budget)
    assert rival.bytes <= budget
    assert rival.error == min(u.error for u in uniforms_of(options) if u.bytes <= budget)
    assert widest_uniform(family, layers, budget) == "w4-g32"
    with pytest.raises(QuantizationError, match="Ask for at least"):
        best_uniform(options, 100)
    with pytest.raises(QuantizationError, match="Ask for at least"):
        widest_uniform(family, layers, 100)


# ---- GPTQ in the metric


def test_gradients_cancel_in_what_gptq_hands_on():
    """With column j of E fixed, the rest that minimizes tr(G E S E^T) is the same for every G."""
    torch.manual_seed(0)
    o, f = 4, 6
    a, b = torch.randn(20, f).double(), torch.randn(20, o).double()
    s = a.T @ a
    fixed = torch.randn(o, 1).double()
    rest = -fixed @ s[:1, 1:] @ torch.linalg.inv(s[1:, 1:])
    for g in (torch.eye(o).double(), b.T @ b):
        free = torch.zeros(o, f - 1, dtype=torch.float64, requires_grad=True)
        change = torch.cat([fixed, free], 1)
        # the form is quadratic: one Newton step from anywhere is its minimum
        slope = torch.autograd.grad(torch.trace(g @ change @ s @ change.T), free)[0]
        hessian = 2 * torch.kron(g, s[1:, 1:])
        found = -torch.linalg.solve(hessian, slope.flatten()).reshape(o, f - 1)
        assert torch.allclose(found, rest, atol=1e-9)


def test_gptq_in_the_metric_is_nearer_and_saved_as_it_is(metrics):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    plain = RoundToNearest(3, 16, group=32)
    by_gptq = PerLayer(
        RoundToNearest(3, 16, rounding="gptq"), {"0": "w3-g32"}, {"0": metrics["0"].inputs}
    )
    made = by_gptq.layer("0", layer)
    weight = layer.weight.detach()
    assert torch.equal(made.weight, gptq(weight, metrics["0"].inputs, Grid.parse("int3-g32"))[0])
    error = [metrics["0"].error(weight - m.weight) for m in (made, plain.layer(layer))]
    assert error[0] < 0.8 * error[1]


# ---- whole pipelines


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_a_denoiser_within_its_budget_is_reloaded_bit_for_bit(name, tmp_path):
    tiny = ALL[name]()
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    found, report = quantized(tiny, 4.5, out=tmp_path / "q")
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())
    again, said = load_quantized(tmp_path / "q")
    assert isinstance(said, QuantizationReport)
    assert {x.name for x in said.quantized} == set(report.choices)
    theirs = again.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in found.state_dict().items())
    assert sum(x.bytes for x in report.layers) <= report.budget
    assert report.uniform_bytes <= report.budget == int(4.5 * report.weights / 8)
    for x in said.quantized:
        assert report.choices[x.name].startswith(f"w{x.weight_bits}-")
    stored = read_json(tmp_path / "q" / FILE, KIND)["report"]
    assert stored == json.loads(json.dumps(report.as_dict()))
    assert stored["layers"][0]["name"] in report.table()
    sampled = [generate(tiny, steps=STEPS)]
    setattr(tiny.pipe, tiny.denoiser, again)
    assert not torch.equal(generate(tiny, steps=STEPS), sampled[0])


@pytest.mark.parametrize(("gains", "confirmed"), [([2.0, 2.5], True), ([3.0, -2.0], False)])
def test_what_held_out_pairs_do_not_confirm_is_not_returned(gains, confirmed, monkeypatch):
    monkeypatch.setattr(module, "gain", said(gains))
    tiny = ALL["flux"]()
    found, report = quantized(tiny, 3.5, method=RoundToNearest(4, 16, only=("*attn*",)))
    assert report.confirmed is confirmed
    expected = {x.name: x.choice if confirmed else report.uniform for x in report.layers}
    assert report.choices == expected
    assert ("is kept" in report.text()) is not confirmed
    bits = {x.name: x.weight_bits for x in found.evenkeel_report.quantized}
    assert bits == {n: int(c[1]) for n, c in expected.items()}


def test_predicted_errors_order_what_is_measured():
    """Kinds and layers apart, one at a time and together, on noise that no statistic has seen."""
    twin, pipe = zoo.twin("pixart-sigma"), zoo.load("pixart-sigma")
    full, steps = pipe.transformer, 6
    family = Own(RoundToNearest(4, 16))
    layers = family.layers(full)
    along = built(family, full, dict.fromkeys(layers, "w4-g32"))
    run = Run(
        pipe, KINDS[twin.pictures].prompts(8, 0), steps,
        guidance_scale=twin.guidance_scale, quantized=along,
    )  # fmt: skip
    pairs = Pairs.of(run)
    with opened(sites_of(run), 1024, 2e9, gradients=True) as sites:
        collect(pairs.fit, sites, probed=4, progress=False)
        metrics = {name: metric_of(site) for name, site in sites.items()}
    held_out = FinalSamples(pairs.held_out)
    some = [n for n in layers if n.split(".")[1] in ("0", "7")]
    predicted, measured = [], []
    for name, choice in zip(some, itertools.cycle(("w2-g128", "w3-g64", "w4-g32"))):
        layer = family.build(name, layers[name], choice)
        predicted.append(metrics[name].error((layers[name].weight - layer.weight).detach()))
        made = built(family, full, {name: choice})
        measured.append(float(held_out.errors_of(made, pairs.choose).mean()))
    assert spearmanr(predicted, measured)[0] > 0.75
    slopes = np.polyfit(np.log(predicted), np.log(measured), 1)
    assert 0.6 < slopes[0] < 1.4  # errors grow as predicted, not only in the same order


# ---- what is refused


@pytest.mark.parametrize(
    ("bits", "more", "says"),
    [
        (0.5, {}, "from 1 to 16"),
        (1.2, {}, "Ask for at least"),
        (4.5, {"layout": "onnx"}, "there is gguf, torchao, sdnq"),
        (4.5, {"layout": "gguf", "method": RoundToNearest(4, 8)}, "expected activation_bits 16"),
        (4.5, {"method": RoundToNearest(4, 16, weight_format="nf4")}, "are those of integers"),
        (4.5, {"method": RoundToNearest(4, 8, activation="static")}, "are those of integers"),
        (4.5, {"method": RoundToNearest(4, 16, only=("nothing",))}, "can be quantized"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sampled(bits, more, says, monkeypatch):
    tiny = ALL["flux"]()
    monkeypatch.setattr(Run, "sample", lambda *_: pytest.fail("it sampled"))
    with pytest.raises(QuantizationError, match=says):
        quantized(tiny, bits, **more)


def test_a_quantized_denoiser_is_refused():
    tiny = ALL["flux"]()
    made = built(
        Own(WEIGHT_ONLY), tiny.model, dict.fromkeys(Own(WEIGHT_ONLY).layers(tiny.model), "w4-g32")
    )
    setattr(tiny.pipe, tiny.denoiser, made)
    with pytest.raises(QuantizationError):
        quantized(tiny, 4.5)


# ---- layouts


def by_gguf(net, text):
    """As llama-quantize and stable-diffusion.cpp take the rules: the first whose pattern is found."""
    gguf = pytest.importorskip("gguf")
    rules = [line.split("=") for line in text.split()]
    found = {}
    for name, tensor in net.named_parameters():
        if tensor.ndim > 1:
            kind = next(
                t for pattern, t in rules if re.search(pattern, f"model.diffusion_model.{name}")
            )
            as_type = gguf.GGMLQuantizationType[kind.upper()]
            blocks = gguf.quants.quantize(tensor.detach().numpy(), as_type)
            found[name.removesuffix(".weight")] = gguf.quants.dequantize(blocks, as_type)
    return {n: torch.from_numpy(w) for n, w in found.items()}


def by_torchao(net, text):
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    quantize_(net, config_from_dict(json.loads(text)), None)
    linear = ((n, m.weight) for n, m in net.named_modules() if type(m) is nn.Linear)
    return {n: w.dequantize() for n, w in linear if type(w).__module__.startswith("torchao")}


def by_sdnq(net, text):
    from sdnq import sdnq_post_load_quant

    net = sdnq_post_load_quant(net, **json.loads(text))
    return {
        n: effective_weight(m) for n, m in net.named_modules() if hasattr(m, "sdnq_dequantizer")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layout", "bits", "read"),
    [("gguf", 5.0, by_gguf), ("torchao", 4.5, by_torchao), ("sdnq", 6.5, by_sdnq)],
)
def test_a_backend_makes_of_the_file_what_was_predicted(layout, bits, read, tmp_path, monkeypatch):
    if importlib.util.find_spec(layout) is None:
        pytest.skip(f"{layout} is not installed")
    monkeypatch.setattr(module, "gain", said([2.0, 2.5]))
    tiny = ALL["flux"]()
    method = RoundToNearest(4, 16, only=("transformer_blocks.0.attn*", "*proj_mlp"))
    found, report = quantized(tiny, bits, layout=layout, method=method, out=tmp_path)
    assert sum(x.bytes for x in report.layers) <= report.budget
    assert len(set(report.choices.values())) > 1
    text = (tmp_path / LAYOUTS[layout].file).read_text()
    theirs = read(tiny.model, text)
    plain = {n for n in theirs if n not in report.choices}
    assert layout == "gguf" or not plain
    for name in report.choices:
        own = effective_weight(found.get_submodule(name))
        # diffusers computes with GGUF's blocks in float16
        assert (own - theirs[name].float()).norm() < 1e-3 * own.norm()
