"""MixDQ: the integer program against brute force, sensitivities, the first token, whole pipelines."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipelines import ALL
from torch import Tensor, nn

from evenkeel import zoo
from evenkeel.errors import QuantizationError
from evenkeel.fitting.quantize import calibration_set, quantize
from evenkeel.quantizers import load_quantized
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer, QuantizedLinear
from evenkeel.quantizers.layers.static_ranges import RunningRange
from evenkeel.quantizers.methods import sensitivity
from evenkeel.quantizers.methods.base import quantized_on
from evenkeel.quantizers.methods.mixdq import FirstToken, MixDQ
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.methods.sensitivity import Trial, prediction
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.rounding.bit_allocation import (
    allocate,
    allocate_decoupled,
    noise_share,
    structural_loss,
)
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, kept
from evenkeel.quantizers.workspace.workspace import Workspace
from evenkeel.zoo.evaluation import sample_prompts

BITS = (2, 4, 8)


# ---------------------------------------------------------------- the integer program


def cheapest(damage: dict, sizes: dict, mean_bits: float) -> float:
    """Of all allocations that fit, tried one by one."""
    budget = mean_bits * sum(sizes.values())
    fitting = [
        sum(damage[name][bits] for name, bits in zip(damage, chosen, strict=True))
        for chosen in itertools.product(BITS, repeat=len(damage))
        if sum(sizes[name] * bits for name, bits in zip(damage, chosen, strict=True)) <= budget
    ]
    return min(fitting)


layers = st.lists(
    st.tuples(st.integers(1, 1000), *(st.floats(0, 1e6) for _ in BITS)), min_size=1, max_size=6
)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(layers, st.sampled_from((2, 2.5, 3.66, 4, 5, 8)))
def test_the_program_meets_its_budget_and_is_optimal(found: list, mean_bits: float) -> None:
    sizes = {str(i): row[0] for i, row in enumerate(found)}
    damage = {str(i): dict(zip(BITS, row[1:], strict=True)) for i, row in enumerate(found)}
    chosen = allocate(damage, sizes, mean_bits)
    assert list(chosen) == list(damage)
    spent = sum(sizes[name] * bits for name, bits in chosen.items())
    assert spent <= mean_bits * sum(sizes.values()) * (1 + 1e-12)
    # Costs are handed to the solver relative to the largest; it closes the gap to 1e-6 of that.
    largest = max(max(row.values()) for row in damage.values())
    total = sum(damage[name][bits] for name, bits in chosen.items())
    assert total <= cheapest(damage, sizes, mean_bits) + 1e-5 * largest


@pytest.mark.parametrize("mean_bits", [2.0, 2.0001, 3.3, 8.0])
def test_the_budget_is_met_where_a_layer_is_smaller_than_the_tolerance_of_the_solver(
    mean_bits: float,
) -> None:
    sizes = {"a": 1, "b": 6_000_000, "c": 77, "d": 60_001}
    damage = {name: {2: 3.0, 4: 2.0, 8: 1.0} for name in sizes}
    chosen = allocate(damage, sizes, mean_bits)
    spent = sum(sizes[name] * bits for name, bits in chosen.items())
    assert spent <= mean_bits * sum(sizes.values())
    assert (chosen["a"] == 2) == (mean_bits == 2.0)


def test_taking_the_most_sensitive_layer_first_is_not_optimal_and_the_program_knows() -> None:
    damage = {"big": {2: 10.0, 8: 0.0}, "one": {2: 7.0, 8: 0.0}, "two": {2: 7.0, 8: 0.0}}
    sizes = {"big": 2, "one": 1, "two": 1}
    assert allocate(damage, sizes, 5.0) == {"big": 2, "one": 8, "two": 8}


def test_what_no_allocation_fits_is_refused() -> None:
    damage = {"a": {4: 1.0, 8: 0.0}}
    with pytest.raises(QuantizationError, match="fewest that these layers can have are 4"):
        allocate(damage, {"a": 5}, 3.9)
    assert allocate(damage, {"a": 5}, 4.0) == {"a": 4}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(QuantizationError, match="damage of 4 bits in 'a'"):
        allocate({"a": {4: value}}, {"a": 5}, 4.0)


def test_no_layers_and_empty_budgets_are_refused() -> None:
    for damage, sizes, mean_bits in (({}, {}, 4.0), ({"a": {4: 1.0}}, {"a": 1}, 0.0)):
        with pytest.raises(QuantizationError):
            allocate(damage, sizes, mean_bits)


@pytest.mark.parametrize("ratio", [0.1, 0.46, 1.0, 1.36, 9.0])
@pytest.mark.parametrize("mean_bits", [2.9, 4.0, 6.0, 8.0])
def test_both_groups_keep_to_one_budget(ratio: float, mean_bits: float) -> None:
    rng = np.random.default_rng(0)
    content = {f"c{i}": {b: rng.random() * 4.0**-b for b in (2, 4, 8)} for i in range(9)}
    quality = {f"q{i}": {b: rng.random() * 4.0**-b for b in (4, 8)} for i in range(7)}
    sizes = {name: int(rng.integers(10, 90)) for name in [*content, *quality]}
    sizes["c0"] = 500  # so that 2 bits there leave 4 for the others
    chosen = allocate_decoupled(content, quality, sizes, mean_bits, ratio)
    assert list(chosen) == [*content, *quality]
    total = sum(sizes.values())
    assert sum(sizes[n] * bits for n, bits in chosen.items()) <= mean_bits * total * (1 + 1e-12)


def test_the_ratio_moves_bits_from_quality_to_content_and_nothing_is_left_over() -> None:
    content = {f"c{i}": {b: 4.0**-b for b in BITS} for i in range(30)}
    quality = {f"q{i}": {b: 4.0**-b for b in BITS} for i in range(30)}
    sizes = dict.fromkeys([*content, *quality], 7)
    means = []
    for ratio in (0.5, 1.0, 2.0):
        chosen = allocate_decoupled(content, quality, sizes, 4.0, ratio)
        means.append(sum(chosen[n] for n in content) / 30)
        assert sum(chosen.values()) == 4 * 60
    assert means[0] < means[1] == 4.0 < means[2]


def test_one_group_alone_gets_the_whole_budget() -> None:
    one = {"a": {4: 1.0, 8: 0.0}}
    assert allocate_decoupled(one, {}, {"a": 1}, 8.0, 0.5) == {"a": 8}
    assert allocate_decoupled({}, one, {"a": 1}, 8.0, 0.5) == {"a": 8}
    with pytest.raises(QuantizationError, match="ratio"):
        allocate_decoupled(one, {"b": {4: 1.0}}, {"a": 1, "b": 1}, 8.0, 0.0)


# ---------------------------------------------------------------- what it minimizes


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_noise_share_is_the_inverse_of_the_signal_to_noise_ratio() -> None:
    y, e = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    decibels = 10 * np.log10(y.square().sum().item() / (0.1 * e).square().sum().item())
    assert noise_share(y + 0.1 * e, y) == pytest.approx(10 ** (-decibels / 10), rel=1e-5)
    assert noise_share(5 * (y + 0.1 * e), 5 * y) == pytest.approx(noise_share(y + 0.1 * e, y))


@pytest.mark.parametrize("layout", ["fields", "tokens"])
def test_structural_loss_is_ssim_with_one_window(layout: str) -> None:
    y, x = noise(2, 3, 20), noise(2, 3, 20) + 0.5 * noise(2, 3, 20, seed=1) + 0.2
    shape = {"fields": lambda t: t.reshape(2, 3, 4, 5), "tokens": lambda t: t.transpose(1, 2)}
    expected = []
    for sample in range(2):
        reach = float(y[sample].max() - y[sample].min())
        c1, c2 = (0.01 * reach) ** 2, (0.03 * reach) ** 2
        for channel in range(3):
            a, b = x[sample, channel].numpy(), y[sample, channel].numpy()
            (saa, sab), (_, sbb) = np.cov(a, b, bias=True)
            ma, mb = a.mean(), b.mean()
            above = (2 * ma * mb + c1) * (2 * sab + c2)
            expected.append(above / ((ma**2 + mb**2 + c1) * (saa + sbb + c2)))
    found = structural_loss(shape[layout](x), shape[layout](y))
    assert found == pytest.approx(1 - np.mean(expected), rel=1e-4)


def test_structural_loss_of_little_independent_noise_is_half_the_noise_share() -> None:
    y, e = noise(1, 1, 300, 300), noise(1, 1, 300, 300, seed=1)
    assert structural_loss(y + 0.1 * e, y) == pytest.approx(0.005, rel=0.1)


def test_equal_answers_do_no_damage() -> None:
    y = noise(2, 4, 8, 8)
    assert noise_share(y, y) == 0
    assert structural_loss(y, y) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", [noise_share, structural_loss])
def test_answers_that_are_no_numbers_are_refused(metric: Any) -> None:
    y = noise(1, 2, 4, 4)
    with pytest.raises(QuantizationError, match="NaN"):
        metric(y * float("nan"), y)
    with pytest.raises(QuantizationError):
        noise_share(y, torch.zeros_like(y))


# ---------------------------------------------------------------- sensitivities


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(16, 16), nn.Linear(16, 16)
        self.ff = nn.ModuleDict({"loud": nn.Linear(16, 16), "quiet": nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        content = 3 * self.ff["loud"](x) + 1e-3 * self.ff["quiet"](x)
        return content + 3 * self.loud(x) + 1e-3 * self.quiet(x)


class Net(nn.Module):
    """Layers that matter and layers that do not, of the same size, in both groups."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x) / 5
        return (x,)


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def calls(count: int = 4) -> CalibrationSet:
    return kept([((noise(2, 6, 16, seed=i),), {}) for i in range(count)])


def bits_of(workspace: Workspace) -> dict[str, int]:
    return {name: report.weight_bits for name, report in workspace.reports.items()}


def test_layers_that_matter_get_the_bits(net: Net) -> None:
    # 5 is the mean of 2 and 8, in each group and each block.
    method = MixDQ(5, 8, quality_candidates=BITS, kept_inputs=0.0, ratios=(1.0,))
    workspace = Workspace(net, calls())
    method.quantize(workspace)
    assert bits_of(workspace) == {
        name: 8 if name.endswith("loud") else 2 for name in workspace.layers
    }


def test_inputs_that_matter_stay_in_16_bits(net: Net) -> None:
    workspace = Workspace(net, calls())
    MixDQ(8, 4, kept_inputs=0.3).quantize(workspace)  # 0.3 of 4 layers a group, rounded up: 2
    found = {n for n, report in workspace.reports.items() if report.activation_bits == 16}
    assert found == {name for name in workspace.layers if name.endswith("loud")}
    assert all(
        ("sensitive input" in report.note) == (report.name in found)
        for report in workspace.reports.values()
    )


def test_no_input_is_kept_where_none_is_asked_for(net: Net) -> None:
    workspace = Workspace(net, calls())
    MixDQ(8, 4, kept_inputs=0.0).quantize(workspace)
    assert {report.activation_bits for report in workspace.reports.values()} == {4}


def test_a_trial_is_what_a_copy_with_the_layer_replaced_answers(net: Net) -> None:
    workspace = Workspace(net, calls())
    before = copy.deepcopy(net.state_dict())
    layer = net.blocks[0].loud
    weight, _ = snap_weight(layer.weight, Grid(Integer(3)))
    rounded = QuantizedLinear(weight, layer.bias.detach())
    found = Trial(workspace, 4).damage(["blocks.0.loud"], lambda _: rounded, noise_share)
    other = copy.deepcopy(net)
    other.blocks[0].loud = rounded
    shares = [noise_share(call.make(other)[0], call.make(net)[0]) for call in calls().calls]
    assert found == pytest.approx(sum(shares) / 4, rel=1e-6)
    assert found > 0
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_a_trial_that_fails_leaves_no_hooks(net: Net) -> None:
    def broken(_: str) -> QuantizedLayer:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Trial(Workspace(net, calls()), 1).damage(["blocks.0.loud"], broken, noise_share)
    assert all(not module._forward_hooks for module in net.modules())


def test_a_trial_uses_calls_from_the_first_to_the_last(net: Net) -> None:
    seen: list[Tensor] = []
    hook = net.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    everything = calls(9)
    Trial(Workspace(net, everything), 3)
    hook.remove()
    expected = [everything.calls[i].arguments[0] for i in (0, 4, 8)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_learned_variance_does_not_count() -> None:
    class Both(nn.Module):
        config = type("Config", (), {"in_channels": 4})

    answer = noise(1, 8, 4, 4)
    assert torch.equal(prediction(answer, Both()), answer[:, :4])
    assert torch.equal(prediction(answer, nn.Identity()), answer)
    assert prediction((noise(1, 6, 8),), Both()).shape == (1, 6, 8)
    with pytest.raises(QuantizationError, match="answers with str"):
        prediction("nothing", nn.Identity())


def test_the_split_of_the_budget_is_the_one_with_the_least_noise(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[dict[str, int], float]] = []
    whole = Trial.damage

    def damage(self: Trial, names: Any, make: Any, metric: Any) -> float:
        found = whole(self, names, make, metric)
        if len(names) > 1:
            bits = {name: make(name).stored[0].format.bits for name in names}
            asked.append((bits, found))
        return found

    monkeypatch.setattr(Trial, "damage", damage)
    workspace = Workspace(net, calls())
    MixDQ(4, 8, quality_candidates=BITS, kept_inputs=0.0).quantize(workspace)
    assert len(asked) > 2
    assert asked[0][0] == dict.fromkeys(workspace.layers, 4)
    best = min(asked, key=lambda row: row[1])
    assert bits_of(workspace) == best[0]
    assert best[1] < asked[0][1]


def test_an_interrupted_run_measures_nothing_twice(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, ...]] = []
    whole = Trial.damage

    def damage(self: Trial, names: Any, make: Any, metric: Any) -> float:
        measured.append(tuple(names))
        if len(measured) == 20:
            raise KeyboardInterrupt
        return whole(self, names, make, metric)

    monkeypatch.setattr(Trial, "damage", damage)

    def run(folder: str) -> dict[str, Tensor]:
        workspace = Workspace(net, calls(), folder=tmp_path / folder, identity="one run")
        MixDQ().quantize(workspace)
        return workspace.quantized.state_dict()

    with pytest.raises(KeyboardInterrupt):
        run("interrupted")
    a = run("interrupted")
    firsts = [names[0] for names in measured if len(names) == 1]
    assert sum(name.startswith("blocks.0") for name in firsts[:20]) == 2 * (4 + 3)
    assert {name.split(".")[1] for name in firsts[20:]} == {"1"}
    b = run("straight")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- the first token


def sequences(first: float, *, seed: int = 0, tokens: int = 5) -> Tensor:
    x = noise(3, tokens, 16, seed=seed)
    x[:, 0] = first
    return x


def test_a_token_that_is_always_the_same_is_found_and_does_not_count_for_the_range() -> None:
    found, others = FirstToken(), RunningRange(0.0)
    for seed in range(3):
        x = sequences(100.0, seed=seed)
        found.add(x * (1 + 1e-6 * seed))  # an encoder rounds differently in another batch
        others.add(x[:, 1:])
    assert torch.equal(found.value, torch.full((16,), 100.0))
    assert torch.allclose(found.others.high, others.high, rtol=1e-5)
    assert found.others.high < 10


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((sequences(1.0), sequences(1.01)), "not the same for all prompts"),
        ((sequences(1.0), torch.zeros(1, 5, 16)), "not the same for all prompts"),
        ((sequences(1.0)[:1], sequences(1.0)[:1]), "one prompt only"),
        ((sequences(1.0, tokens=1),), "no sequences"),
        ((noise(3, 16),), "no sequences"),
    ],
)
def test_any_other_token_is_not_protected_and_says_why(given: Any, reason: str) -> None:
    found = FirstToken()
    for x in given:
        found.add(x)
    assert found.value is None
    assert reason in found.reason


def ran(name: str, method: MixDQ, out: Path | None = None, **options: Any) -> Any:
    tiny = ALL[name]()
    options = {"guidance_scale": tiny.guidance_scale, **options}
    return tiny, *quantize(
        tiny.pipe, method, prompts=tiny.prompts, num_inference_steps=3, calibration_steps=2, call=tiny.call,
        batch_size=2, out=out, progress=False, **options,
    )  # fmt: skip


SMALL = {"sensitivity_calls": 1, "ratios": (0.8, 1.0)}


@pytest.fixture(scope="module")
def unet() -> Any:
    return ran("sdxl", MixDQ(8, 8, kept_inputs=0.0), guidance_scale=1.0)


def test_keys_and_values_of_the_first_text_token_are_those_of_full_precision(unet: Any) -> None:
    tiny, quantized, report = unet
    protected = [entry.name for entry in report.layers if "first token protected" in entry.note]
    texts = ("attn2.to_k", "attn2.to_v")
    assert protected == [n for n, _ in tiny.model.named_modules() if n.endswith(texts)]
    text = tiny.pipe.encode_prompt("a prompt that was not calibrated on", device="cpu")[0]
    for name in protected:
        old, new = tiny.model.get_submodule(name), quantized.get_submodule(name)
        with torch.no_grad():
            right, found = old(text), new(text)
        assert torch.allclose(found[:, 0], right[:, 0], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[:, 1:], right[:, 1:], rtol=1e-5, atol=1e-6)


def test_shortcuts_of_a_unet_have_two_ranges(unet: Any) -> None:
    _, quantized, report = unet
    split = {e.name for e in report.layers if "two ranges" in e.note}
    shortcuts = {e.name for e in report.layers if e.name.endswith("conv_shortcut")}
    assert split == {name for name in shortcuts if name.startswith("up_blocks")}
    assert split
    for name in shortcuts:
        layer = quantized.get_submodule(name)
        assert isinstance(layer.activation, StaticInput)
        assert len(layer.activation.scale) == (2 if name in split else 1)
        assert (layer.stored[0].group is not None) == (name in split)


def test_guidance_with_zeros_for_the_empty_prompt_is_not_protected_and_says_so() -> None:
    _, quantized, report = ran("sdxl", MixDQ(8, 8, kept_inputs=0.0))
    notes = [entry.note for entry in report.layers if entry.name.endswith("attn2.to_k")]
    assert notes
    assert all("first token not protected: it is not the same" in note for note in notes)
    assert all(getattr(m, "first_token", None) is None for m in quantized.modules())


# ---------------------------------------------------------------- whole pipelines


def weighted_mean(report: Any) -> float:
    sizes = [int(np.prod(entry.shape)) for entry in report.quantized]
    return float(np.average([entry.weight_bits for entry in report.quantized], weights=sizes))


@pytest.mark.parametrize("name", ["sdxl", "pixart_sigma", "flux"])
def test_a_pipeline_meets_its_budget_and_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    method = MixDQ(skip=("down_blocks", "mid_block", "*.1", "single_transformer_blocks"), **SMALL)
    tiny, quantized, report = ran(name, method, tmp_path / "out")
    assert all(entry.reason.startswith("skip") for entry in report.kept)
    assert weighted_mean(report) <= 4
    others = [e for e in report.quantized if not first_match(e.name, method.content)]
    assert 0 < len(others) < len(report.quantized)
    assert {entry.weight_bits for entry in others} <= {4, 8}
    loaded, again = load_quantized(tmp_path / "out")
    assert again == report
    a, b = quantized.state_dict(), loaded.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    call = calibration_set(
        tiny.pipe, tiny.prompts, num_inference_steps=2, guidance_scale=tiny.guidance_scale,
        calibration_steps=1, batch_size=2, call=tiny.call, progress=False,
    ).calls[0]  # fmt: skip
    answers = [prediction(call.make(net), net) for net in (quantized, loaded, tiny.model)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


@pytest.mark.rarely
def test_it_is_better_than_plain_rounding_at_the_same_bits() -> None:
    pipe = zoo.load("pixart-sigma")
    some, held = (
        calibration_set(
            pipe, sample_prompts(4, seed), num_inference_steps=20, guidance_scale=4.5, calibration_steps=3,
            batch_size=2, seed=100 * seed, progress=False,
        )
        for seed in (1, 2)
    )  # fmt: skip
    errors = []
    skip = ("transformer_blocks.[1-6]",)  # for time
    for method in (
        MixDQ(4, 8, sensitivity_calls=2, ratios=(0.66, 0.86), skip=skip),
        RoundToNearest(4, 8, group=None, activation="static", skip=skip),
    ):
        quantized, report = quantized_on(Workspace(pipe.transformer, some), method)
        assert weighted_mean(report) <= 4
        nets = (quantized, pipe.transformer)
        pairs = [[prediction(call.make(net), net) for net in nets] for call in held.calls]
        errors.append(np.mean([noise_share(*pair) for pair in pairs]))
    assert errors[0] < 0.7 * errors[1]


# ---------------------------------------------------------------- the method


def test_its_text_and_dictionary_are_the_same_method() -> None:
    method = MixDQ.of_bits("w5a8", kept_inputs=0.02, skip=["conv_in"])
    assert str(method) == "mixdq-w5a8-kept_inputs=0.02-skip=('conv_in',)"
    assert MixDQ.from_dict(method.as_dict()) == method


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_bits": 1},
        {"activation_bits": 2},
        {"content_candidates": ()},
        {"content_candidates": (4, 2)},
        {"quality_candidates": (4, 16)},
        {"quality_candidates": (4.0, 8)},
        {"ratios": ()},
        {"ratios": (1.0, 0.0)},
        {"kept_inputs": 1.5},
        {"momentum": 1.0},
        {"sensitivity_calls": 0},
    ],
)
def test_fields_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError):
        MixDQ(**wrong)


def test_uniform_bits_without_kept_inputs_measure_nothing(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity.Trial, "damage", None)
    workspace = Workspace(net, calls())
    MixDQ(8, 8, kept_inputs=0.0).quantize(workspace)
    assert set(bits_of(workspace).values()) == {8}
    with pytest.raises(TypeError):
        MixDQ(8, 8).quantize(Workspace(net, calls()))


def test_the_slow_measurement_reports_its_progress(net: Net) -> None:
    seen: list[tuple[int, int, str]] = []
    workspace = Workspace(net, calls(), progress=lambda *step: seen.append(step))
    MixDQ(sensitivity_calls=1).quantize(workspace)
    units = len(workspace.units(list(workspace.layers)))
    assert [done for done, _, name in seen if "sensitivity" in name] == list(range(1, units + 1))
    assert [done for done, _, name in seen if "sensitivity" not in name] == list(
        range(1, units + 1)
    )
