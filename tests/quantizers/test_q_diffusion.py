"""Q-Diffusion and the block reconstruction under it: laws, fallbacks, splits, and whole pipelines."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from tiny_pipelines import ALL
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evenkeel import zoo
from evenkeel.errors import QuantizationError
from evenkeel.fitting.quantize import calibration_set, quantize
from evenkeel.quantizers import load_quantized
from evenkeel.quantizers.layers.blocks import Unit
from evenkeel.quantizers.layers.concatenations import skip_concatenations, split_scales
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.layers.learned_inputs import LearnedInput
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
)
from evenkeel.quantizers.layers.static_ranges import searched
from evenkeel.quantizers.methods.block_reconstruction import BlockTrial, Learning, WeightPlan
from evenkeel.quantizers.methods.catalogue import METHODS
from evenkeel.quantizers.methods.q_diffusion import QDiffusion
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import codes_of, fit, last, snap, unlast, values_of
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, kept
from evenkeel.quantizers.workspace.workspace import Workspace
from evenkeel.zoo.evaluation import sample_prompts

GRID = Grid(Integer(3), zero_point=True, range="mse", exponent=2.4)
UNIT = Unit("blocks.0", ("blocks.0.fc1", "blocks.0.fc2"), "block")
FAST = {"iterations": 30, "rounding_rate": 0.05, "activation_iterations": 10}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return x + self.fc2(torch.nn.functional.silu(self.fc1(x) + shift))


class Net(nn.Module):
    """A layer, two blocks, and a layer; inputs are correlated, which is what rounding can use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList([Block(16), Block(16)])

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, shift=shift)
        return self.head(x)


def calls(rows: int = 8, count: int = 4, dtype: torch.dtype = torch.float32) -> CalibrationSet:
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    return kept([((draw(rows, 3, 4),), {"shift": draw(rows, 1, 32)}) for _ in range(count)])


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def plans(workspace: Workspace, unit: Unit = UNIT, grid: Grid = GRID) -> dict[str, WeightPlan]:
    weights = {n: workspace.layers[n].get_parameter("weight") for n in unit.layers}
    return {n: WeightPlan(grid, fit(last(w, grid), grid)) for n, w in weights.items()}


def trial_of(net: nn.Module, seed: int = 0, **options: Any) -> BlockTrial:
    workspace = Workspace(net, calls(**options))
    return BlockTrial(workspace, UNIT, plans(workspace), seed)


def put(block: nn.Module, prefix: str, made: Mapping[str, nn.Module]) -> nn.Module:
    block = copy.deepcopy(block)
    for name, layer in made.items():
        setattr(block, name.removeprefix(f"{prefix}."), layer)
    return block


def block_error(net: Net, made: Mapping[str, nn.Module]) -> float:
    """Mean over rows and tokens of the squared error of the first block, computed from scratch."""
    rounded, errors = put(net.blocks[0], "blocks.0", made), []
    with torch.no_grad():
        for call in calls().calls:
            x, shift = net.stem(call.arguments[0]), call.keywords["shift"]
            off = rounded(x, shift=shift) - net.blocks[0](x, shift=shift)
            errors.append(off.square().sum(-1).mean())
    return float(torch.stack(errors).mean())


# ---------------------------------------------------------------- learning the rounding of a block


def test_learned_rounding_lowers_the_error_of_the_block_computed_independently(net: Net) -> None:
    nearest = trial_of(net)
    learned = trial_of(net)
    found = learned.learn_rounding(Learning(150, rounding_rate=0.05))
    assert found is not None
    assert found.kept == "learned"
    before, after = block_error(net, nearest.finished()), block_error(net, learned.finished())
    assert after < 0.7 * before
    assert found.nearest == pytest.approx(before, rel=1e-4)
    assert found.learned == pytest.approx(after, rel=1e-4)


def test_every_weight_ends_on_one_of_the_two_grid_values_around_it(net: Net) -> None:
    trial = trial_of(net)
    trial.learn_rounding(Learning(100, rounding_rate=0.05))
    moved = 0
    for name, layer in trial.finished().items():
        assert layer.stored is not None
        grid, scales = layer.stored
        weight = net.get_submodule(name).get_parameter("weight").detach()
        inside = snap(last(weight, grid), grid, scales)
        codes = codes_of(last(layer.weight, grid), grid, scales)
        assert torch.equal(values_of(codes, grid, scales), last(layer.weight, grid))
        steps = (last(layer.weight, grid) - inside) / scales.scale
        assert steps.abs().max() < 1.001  # the nearest, or its neighbour
        # Never past a neighbour of the weight itself, but where the range of the grid ends.
        low = (0 - scales.zero) * scales.scale
        high = (grid.format.largest - scales.zero) * scales.scale
        off = (last(layer.weight, grid) - last(weight, grid).clamp(low, high)).abs()
        assert bool((off <= scales.scale * 1.001).all())
        moved += int((steps.abs() > 0.5).sum())
    assert moved > 0  # else this is the nearest and the test shows nothing


def test_learning_that_does_harm_is_thrown_away(net: Net) -> None:
    trial, plain = trial_of(net), trial_of(net).finished()
    found = trial.learn_rounding(Learning(3, rounding_rate=1e4))  # every weight flips at once
    assert found is not None
    assert found.kept == "nearest"
    for name, layer in trial.finished().items():
        assert torch.equal(layer.weight, plain[name].weight)


def test_input_scales_are_kept_only_if_the_objective_falls(net: Net) -> None:
    wide = {n: StaticInput(4, torch.tensor([1.5]), torch.tensor([7.0])) for n in UNIT.layers}
    good, bad = trial_of(net), trial_of(net)
    for trial in (good, bad):
        trial.round_inputs(wide)
    before, after = good.learn_inputs(Learning(60, input_rate=0.05))
    assert after < 0.8 * before
    assert good.objective(Learning(1)) == pytest.approx(after)
    assert bad.learn_inputs(Learning(2, input_rate=50.0)) == (before, before)
    scales = [layer.activation.scale for layer in bad.finished().values()]
    assert all(torch.equal(s, torch.tensor([1.5])) for s in scales)
    assert all(layer.activation.scale < 1.5 for layer in good.finished().values())


def test_joint_learning_that_does_harm_restores_weights_and_scales(net: Net) -> None:
    trial, plain = trial_of(net), trial_of(net).finished()
    start = {n: searched(x, 8, "mse") for n, x in trial.inputs().items()}
    trial.round_inputs(start)
    found = trial.learn_rounding(Learning(3, rounding_rate=1e-9, input_rate=20.0))
    assert found is not None
    assert found.kept == "nearest"
    for name, layer in trial.finished().items():
        assert torch.equal(layer.weight, plain[name].weight)
        assert torch.equal(layer.activation.scale, start[name].scale)


def test_nothing_is_left_behind(net: Net) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    workspace = Workspace(net, calls())
    state = torch.get_rng_state()
    trial = BlockTrial(workspace, UNIT, plans(workspace))
    trial.round_inputs({n: searched(x, 8, "mse") for n, x in trial.inputs().items()})
    trial.learn_rounding(Learning(5, rounding_rate=0.05, input_rate=0.01))
    trial.output_errors()
    assert torch.equal(torch.get_rng_state(), state)
    for name, layer in trial.finished().items():
        assert [*layer.parameters()] == []
        assert not any(b.requires_grad for b in layer.buffers())
        assert type(layer.activation) is StaticInput
        assert type(workspace.quantized.get_submodule(name)) is nn.Linear
    for module in (net, workspace.quantized):
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_the_seed_decides(net: Net) -> None:
    made = []
    for seed in (0, 0, 1):
        trial = trial_of(net, seed)
        found = trial.learn_rounding(Learning(60, rounding_rate=0.05, batch_size=4))
        assert found is not None
        assert found.kept == "learned"
        made.append(torch.cat([m.weight.flatten() for m in trial.finished().values()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_it_learns_under_no_grad(net: Net) -> None:
    with torch.no_grad():
        found = trial_of(net).learn_rounding(Learning(40, rounding_rate=0.05))
    assert found is not None
    assert found.learned < found.nearest


def test_half_precision_is_learned_in_float32_and_given_back(net: Net) -> None:
    workspace = Workspace(net.to(torch.bfloat16), calls(dtype=torch.bfloat16))
    trial = BlockTrial(workspace, UNIT, plans(workspace))
    assert trial.examples.mixed
    found = trial.learn_rounding(Learning(60, rounding_rate=0.05))
    assert found is not None
    assert found.learned < found.nearest
    for layer in trial.finished().values():
        assert layer.weight.dtype == torch.bfloat16
        assert layer.bias is not None
        assert layer.bias.dtype == torch.bfloat16


def test_output_errors_are_those_of_each_layer_on_its_own_input(net: Net) -> None:
    trial = trial_of(net)
    found, made = trial.output_errors(), trial.finished()
    x = torch.cat([net.stem(call.arguments[0]) for call in calls().calls]).detach()
    exact = net.blocks[0].fc1(x)
    expected = ((made["blocks.0.fc1"](x) - exact).norm() / exact.norm()).item()
    assert found["blocks.0.fc1"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": -1},
        {"iterations": 1.0},
        {"iterations": 1, "batch_size": 0},
        {"iterations": 1, "rounding_rate": -1.0},
        {"iterations": 1, "input_rate": float("nan")},
        {"iterations": 1, "exponent": 0.0},
    ],
)
def test_learning_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match=list(wrong)[-1]):
        Learning(**wrong)


# ---------------------------------------------------------------- learned inputs


@pytest.mark.parametrize("split", [None, 3])
def test_a_learned_input_starts_as_the_static_one(split: int | None) -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    start = searched(x, 4, "mse", split=split)
    found = LearnedInput(start)
    assert torch.equal(found(2 * x).detach(), start(2 * x))
    with torch.no_grad():
        found.log_ratio.add_(0.3)
    assert torch.equal(found(x).detach(), found.fixed()(x))
    torch.testing.assert_close(found.fixed().scale, start.scale * 1.3498588)


def test_the_gradient_of_a_scale_is_that_of_learned_step_sizes() -> None:
    x = torch.tensor([0.7, -100.0, 100.0], requires_grad=True)
    found = LearnedInput(StaticInput(4, torch.tensor([0.5]), torch.tensor([8.0])))
    out = found(x)
    assert out.tolist() == pytest.approx([0.5, -4.0, 3.5])
    # d/du of s (inside: round(x/s) - x/s, outside: the code that clips), times s as u = log s.
    slopes = [torch.autograd.grad(o, found.log_ratio, retain_graph=True)[0].item() for o in out]
    assert slopes == pytest.approx([0.5 * (1 - 1.4), 0.5 * -8, 0.5 * 7])
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [1.0, 0.0, 0.0]


# ---------------------------------------------------------------- splits


class Concatenations(TorchFunctionMode):
    """Notes how many channels came first in every tensor made by torch.cat of two feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.cat and out.ndim == 4 and len(args[0]) == 2:
            self.found[id(out)] = (out, args[0][0].shape[1])
        return out


def unets() -> Iterator[Any]:
    sizes = {"sample_size": 16, "norm_num_groups": 4, "layers_per_block": 2}
    yield pytest.param(ALL["sdxl"], id="sdxl")
    yield pytest.param(
        lambda: d.UNet2DModel(
            block_out_channels=(8, 16, 24),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            **sizes,
        ),
        id="unconditional",
    )
    yield pytest.param(
        lambda: d.UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            mid_block_type=None,
            cross_attention_dim=8,
            **sizes,
        ),
        id="no middle",
    )


@pytest.mark.parametrize("build", list(unets()))
def test_the_splits_are_where_the_unet_really_concatenates(build: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        built = build()
    net = getattr(built, "model", built).eval()
    seen: dict[str, int] = {}
    mode = Concatenations()

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, given: Any) -> None:
            if id(given[0]) in mode.found:
                seen[name] = mode.found[id(given[0])][1]

        return hook

    for name, part in net.named_modules():
        if hasattr(part, "conv1"):
            part.register_forward_pre_hook(hook_of(name))
    given = {"encoder_hidden_states": torch.zeros(1, 4, 8)} if "Condition" in str(type(net)) else {}
    if build is ALL["sdxl"]:
        given["encoder_hidden_states"] = torch.zeros(1, 4, 64)
        given["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, 32),
            "time_ids": torch.zeros(1, 6),
        }
    with mode, torch.no_grad():
        net(torch.randn(1, net.config.in_channels, 16, 16), torch.tensor([1]), **given)
    assert len(seen) >= 4
    expected = {f"{n}.conv1": at for n, at in seen.items()}
    expected |= {f"{n}.conv_shortcut": at for n, at in seen.items()}
    assert skip_concatenations(net) == expected


def test_a_transformer_has_no_splits() -> None:
    assert skip_concatenations(ALL["pixart_sigma"]().model) == {}


@pytest.mark.parametrize("shape", [(5, 24), (5, 24, 1, 1), (5, 24, 3, 3)])
def test_a_split_weight_is_two_weights_side_by_side(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[:, 16:] *= 20
    grid, scales = split_scales(weight, GRID, 16)
    assert grid.group == 8
    found = unlast(snap(last(weight, grid), grid, scales), weight.shape, grid)
    for part in (slice(None, 16), slice(16, None)):
        own = last(weight[:, part], GRID)
        expected = snap(own, GRID, fit(own, GRID)).reshape(weight[:, part].shape)
        assert torch.equal(found[:, part], expected)
    whole = snap(last(weight, GRID), GRID, fit(last(weight, GRID), GRID)).reshape(shape)
    error = [(w - weight)[:, :16].norm() for w in (found, whole)]
    assert error[0] < 0.5 * error[1]  # the small range no longer pays for the large one


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("concatenations", {"conv1", "conv_shortcut"}),
        ("shortcuts", {"conv_shortcut"}),
        ("none", set()),
    ],
)
def test_both_operands_of_a_concatenation_are_split(split: Any, expected: set[str]) -> None:
    tiny = ALL["sdxl"]()
    others = ("conv_*", "time_*", "add_*", "down_blocks", "mid_block", "up_blocks.0", "*.attn*")
    method = QDiffusion(4, 8, skip=others, iterations=0, activation_iterations=0, split=split)
    quantized, report = quantize(
        tiny.pipe, method, prompts=tiny.prompts, num_inference_steps=2, calibration_steps=1, call=tiny.call,
        batch_size=2, progress=False,
    )  # fmt: skip
    assert len(report.quantized) >= 6
    found = set()
    for entry in report.quantized:
        layer = quantized.get_submodule(entry.name)
        assert isinstance(layer, QuantizedLayer)
        assert isinstance(layer.activation, StaticInput)
        at = skip_concatenations(tiny.model).get(entry.name) if layer.activation.split else None
        assert layer.activation.split == at
        assert layer.stored is not None
        assert (layer.stored[0].group is None) == (at is None)
        assert ("two ranges" in entry.note) == (at is not None)
        found |= {entry.name.rpartition(".")[2]} if at else set()
    assert found == expected


# ---------------------------------------------------------------- the method


def test_its_text_and_dictionary_are_the_same_method() -> None:
    method = QDiffusion.of_bits("w3a8", iterations=300, skip=["conv_in"])
    assert str(method) == "q-diffusion-w3a8-iterations=300-skip=('conv_in',)"
    assert QDiffusion.from_dict(method.as_dict()) == method
    assert method.grid == Grid.parse("uint3-zero-mse2.4")
    assert QDiffusion(2, 8, weight_range="absmax").grid == Grid.parse("uint2-zero")


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_bits": 16},
        {"weight_bits": 1},
        {"activation_bits": 2},
        {"weight_range": "percentile"},
        {"activation_range": "absmax"},
        {"split": "half"},
        {"iterations": -1},
        {"activation_rate": -1.0},
    ],
)
def test_fields_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError):
        QDiffusion(**wrong)


def test_running_ranges_and_unrounded_inputs(net: Net) -> None:
    whole = calls(rows=32)  # one minibatch each
    workspace = Workspace(net, whole)
    QDiffusion(4, 8, activation_range="running", iterations=0, activation_iterations=0).quantize(
        workspace
    )
    stem = workspace.quantized.get_submodule("stem")
    low = high = None
    for call in whole.calls:
        x = call.arguments[0]
        low = x.min() if low is None else 0.95 * low + 0.05 * x.min()
        high = x.max() if high is None else 0.95 * high + 0.05 * x.max()
    assert stem.activation.scale.item() == pytest.approx(float(high - low) / 255, rel=1e-5)
    bare = Workspace(net, calls())
    QDiffusion(4, 16, iterations=0).quantize(bare)
    assert bare.quantized.get_submodule("stem").activation is None


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(net: Net, tmp_path: Path) -> None:
    method = QDiffusion(3, 8, **FAST)
    whole = Workspace(net, calls())
    method.quantize(whole)

    first = Workspace(net, calls(), folder=tmp_path, identity="x", progress=_stopping_at(2))
    with pytest.raises(KeyboardInterrupt):
        method.quantize(first)
    second = Workspace(net, calls(), folder=tmp_path, identity="x")
    method.quantize(second)
    expected = whole.quantized.state_dict()
    assert expected.keys() == second.quantized.state_dict().keys()
    assert all(torch.equal(v, expected[k]) for k, v in second.quantized.state_dict().items())


def _stopping_at(count: int) -> Any:
    def progress(done: int, total: int, name: str) -> None:
        if done == count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("name", "skip"),
    [
        ("pixart_sigma", ()),  # all of it: first, last and time embedding too
        ("sdxl", ("down_blocks", "mid_block", "*.attentions", "time_*", "add_*")),
        ("flux", ("*transformer_blocks.1", "time_*", "*_embedder", "norm_out")),
    ],
)
def test_a_whole_pipeline_is_saved_and_loaded_bit_for_bit(
    name: str, skip: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, QDiffusion.name, QDiffusion)
    tiny = ALL[name]()
    method = QDiffusion(4, 8, iterations=2, activation_iterations=1, batch_size=4, skip=skip)
    options: dict[str, Any] = {
        "prompts": tiny.prompts,
        "num_inference_steps": 2,
        "calibration_steps": 2,
        "call": tiny.call,
        "batch_size": 2,
        "progress": False,
    }
    quantized, report = quantize(tiny.pipe, method, out=tmp_path, **options)
    assert (report.kept == ()) == (skip == ())
    loaded, again = load_quantized(tmp_path)
    assert again.spec == method.as_dict()
    for entry in report.quantized:
        old, new = quantized.get_submodule(entry.name), loaded.get_submodule(entry.name)
        assert isinstance(new, QuantizedLinear | QuantizedConv2d)
        assert new.stored is not None  # packed codes, split layers too
        for key, tensor in old.state_dict().items():
            assert torch.equal(new.state_dict()[key], tensor)
    call = calibration_set(
        tiny.pipe, tiny.prompts, num_inference_steps=2, guidance_scale=None, calibration_steps=1,
        batch_size=2, call=tiny.call, progress=False,
    ).calls[0]  # fmt: skip
    outputs = [call.make(net)[0] for net in (quantized, loaded)]
    assert torch.equal(*outputs)


@pytest.mark.rarely
def test_rounding_is_clearly_better_than_nearest_at_three_bits_on_a_trained_block() -> None:
    pipe = zoo.load("pixart-sigma")
    sets = [
        calibration_set(
            pipe, sample_prompts(8, seed), num_inference_steps=8, guidance_scale=4.5, calibration_steps=8,
            batch_size=8, seed=seed, progress=False,
        )
        for seed in (1, 50)
    ]  # fmt: skip
    errors = []
    for iterations in (0, 200):
        workspace = Workspace(pipe.transformer, sets[0])
        others = ("transformer_blocks.[!3]", "pos_embed", "adaln_single", "caption_*", "proj_out")
        QDiffusion(
            3, 8, iterations=iterations, rounding_rate=0.02, activation_iterations=0, skip=others
        ).quantize(workspace)
        off = size = 0.0
        for call in sets[1].calls:  # other prompts, other noise
            exact, found = (call.make(n)[0] for n in (pipe.transformer, workspace.quantized))
            off += float((found - exact).square().sum())
            size += float(exact.square().sum())
        errors.append((off / size) ** 0.5)
    assert errors[1] < 0.85 * errors[0]
