"""What methods quantize on: denoiser calls made again, blocks, units, resume, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import ALL
from torch import Tensor, nn

from evenkeel.errors import QuantizationError, StorageError
from evenkeel.fitting.quantize import calibration_set, quantize
from evenkeel.quantizers import load_quantized, save_quantized
from evenkeel.quantizers.layers.blocks import units_of
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
)
from evenkeel.quantizers.methods.base import Method, quantized_on
from evenkeel.quantizers.methods.catalogue import METHODS, method_from, method_named
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.saved.layer_files import read_layer, write_layer
from evenkeel.quantizers.workspace.calibration_set import (
    CalibrationSet,
    DenoiserCall,
    kept,
    tensors_in,
)
from evenkeel.quantizers.workspace.workspace import Workspace

MEMORY = Path(__file__).parent.parent / "helpers" / "memory_of_quantizing.py"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x))) * scale


class Net(nn.Module):
    """Two blocks called in the reverse of their order, a layer before and one after."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.stem = nn.Linear(4, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.stem(x)
        for block in reversed(self.blocks):
            x = block(x, scale=scale)
        return self.head(x)


LAYERS = ["head", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "stem"]


def calls(count: int = 3, rows: int = 5) -> CalibrationSet:
    g = torch.Generator().manual_seed(1)
    made = [((torch.randn(rows, 4, generator=g),), {"scale": torch.ones(())}) for _ in range(count)]
    return kept(made)


# ---------------------------------------------------------------- calibration_set.py


def test_calls_are_copies_and_what_repeats_is_kept_once() -> None:
    text, x = torch.ones(2, 3), torch.zeros(2, 2)
    made = kept([((x,), {"text": text, "n": 3}), ((x + 1,), {"text": text.clone(), "n": [text]})])
    x += 7
    first, second = made.calls
    assert first.arguments[0].sum() == 0
    assert first.keywords["text"] is second.keywords["text"] is second.keywords["n"][0]
    assert first.keywords["n"] == 3
    assert first.arguments[0] is not second.arguments[0]


def test_digest_depends_on_every_value() -> None:
    a, b = calls(), calls()
    assert a.digest == b.digest
    b.calls[-1].arguments[0][-1, -1] += 1e-6
    assert a.digest != b.digest


def test_bad_calibration_sets_are_refused() -> None:
    with pytest.raises(QuantizationError, match="at least one"):
        CalibrationSet(())
    with pytest.raises(QuantizationError, match="call 1 of 2"):
        kept([((torch.ones(1),), {}), ((torch.tensor([float("nan")]),), {})])


def test_calls_of_a_pipeline_are_those_it_makes() -> None:
    tiny = ALL["sdxl"]()
    made = calibration_set(
        tiny.pipe,
        tiny.prompts,
        num_inference_steps=5,
        guidance_scale=tiny.guidance_scale,
        calibration_steps=3,
        batch_size=1,
        call=tiny.call,
        progress=False,
    )
    assert len(made) == 2 * 3
    times = [float(torch.as_tensor(c.arguments[1])) for c in made.calls]
    assert times[:3] == times[3:]
    assert times[0] > times[1] > times[2]
    every = tiny.pipe.scheduler.timesteps.tolist()
    assert (times[0], times[2]) == (every[0], every[-1])
    with torch.no_grad():
        out = made.calls[0].make(tiny.model)[0]
    assert out.shape[0] == 2  # both branches of guidance
    assert all(torch.isfinite(t.float()).all() for t in tensors_in(made.calls[0].arguments))


# ---------------------------------------------------------------- blocks.py


def test_units_follow_the_order_of_the_calls() -> None:
    units = Workspace(Net(), calls()).units(LAYERS)
    assert [u.name for u in units] == ["stem", "blocks.1", "blocks.0", "head"]
    assert [u.kind for u in units] == ["layer", "block", "block", "layer"]
    assert units[1].layers == ("blocks.1.fc1", "blocks.1.fc2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pixart_sigma", "transformer_blocks.1"),
        ("sdxl", "down_blocks.1.attentions.0.transformer_blocks.0"),
        ("sdxl", "mid_block.resnets.0"),
        ("flux", "single_transformer_blocks.0"),
        ("sana", "transformer_blocks.0"),
    ],
)
def test_blocks_of_real_denoisers(name: str, expected: str) -> None:
    net = ALL[name]().model
    layers = [n for n, m in net.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    units = units_of(net, layers)
    assert expected in {u.name for u in units if u.kind == "block"}
    assert sorted(n for u in units for n in u.layers) == sorted(layers)


# ---------------------------------------------------------------- workspace.py


def test_a_block_is_seen_with_what_enters_and_leaves_it() -> None:
    net = Net()
    space = Workspace(net, calls())
    found = space.block_calls("blocks.1")
    assert len(found) == 3
    for call, made in zip(space.calls.calls, found, strict=True):
        stem = net.stem(call.arguments[0])
        assert torch.equal(made.arguments[0], stem)
        assert torch.equal(made.output, net.blocks[1](stem, **made.keywords))


def test_nothing_runs_behind_what_is_looked_at() -> None:
    net = Net()
    space = Workspace(net, calls())
    assert space.order  # one whole pass
    ran: list[str] = []
    net.head.register_forward_hook(lambda *_: ran.append("head"))
    space.visit(["stem"], lambda *_: None)
    assert ran == []
    space.visit(["head"], lambda *_: None)
    assert ran == ["head"] * 3


def test_rows_are_thinned_evenly_and_both_sides_are_seen() -> None:
    space = Workspace(Net(), calls(count=3, rows=50))
    assert space.layer_inputs(["head"], rows=30)["head"].shape == (30, 8)
    assert space.layer_inputs(["head"], rows=10**6)["head"].shape == (150, 8)
    before = space.layer_inputs(["blocks.0.fc1"], side="quantized")["blocks.0.fc1"]
    quantized_stem(space)
    after = space.layer_inputs(["blocks.0.fc1"], side="quantized")["blocks.0.fc1"]
    original = space.layer_inputs(["blocks.0.fc1"])["blocks.0.fc1"]
    assert torch.equal(before, original)
    assert not torch.equal(after, original)


def quantized_stem(space: Workspace) -> None:
    grid = Grid(Integer(2), 4)
    rounded, scales = snap_weight(space.layers["stem"].weight.detach(), grid)
    layer = QuantizedLinear(rounded, space.layers["stem"].bias.detach(), stored=(grid, scales))
    [unit] = space.units(["stem"])
    space.replace(unit, {"stem": layer})


def test_the_original_stays_and_every_layer_is_reported() -> None:
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    space = Workspace(net, calls())
    with pytest.raises(AssertionError, match="decided nothing"):
        space.result("rtn", {})
    quantized, report = quantized_on(space, RoundToNearest(weight_bits=3))
    assert {layer.name for layer in report.layers} == set(LAYERS)
    assert isinstance(quantized.stem, QuantizedLayer)
    assert not isinstance(net.stem, QuantizedLayer)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert quantized.evenkeel_quantizer == "rtn-w3a8"


def test_layers_that_no_call_reaches_are_named() -> None:
    net = Net()
    net.spare = nn.Linear(2, 2)
    space = Workspace(net, calls())
    with pytest.raises(QuantizationError, match="reaches \\['spare'\\]"):
        space.units([*LAYERS, "spare"])


def test_what_cannot_be_quantized_is_refused() -> None:
    done = Workspace(Net(), calls())
    RoundToNearest().quantize(done)
    with pytest.raises(QuantizationError, match="quantized already"):
        Workspace(done.quantized)
    bad = Net()
    bad.stem.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="'stem' holds 1 of 32"):
        Workspace(bad).units(LAYERS)
    hooked = Net()
    hooked.head.register_forward_hook(lambda *_: None)
    with pytest.raises(QuantizationError, match="'head' has hooks"):
        Workspace(hooked).units(LAYERS)
    assert Workspace(hooked).units(["stem"])  # what stays as it is may have hooks


# ---------------------------------------------------------------- resume


@dataclass(frozen=True)
class Interrupted(RoundToNearest):
    """Stops after so many units, like Ctrl-C."""

    name: ClassVar[str] = "interrupted"
    after: int = 2

    def quantize(self, workspace: Workspace) -> None:
        progress = workspace._progress

        def stop(done: int, total: int, name: str) -> None:
            progress(done, total, name)
            if done == self.after:
                raise KeyboardInterrupt

        workspace._progress = stop
        super().quantize(workspace)


def test_an_interrupted_run_continues_where_it_stopped(tmp_path: Path) -> None:
    seen: list[str] = []

    def space() -> Workspace:
        return Workspace(
            net, calls(), progress=lambda *a: seen.append(a[2]), folder=tmp_path, identity="a"
        )

    net = Net()
    whole = Workspace(net, calls())
    RoundToNearest(weight_bits=3, rounding="gptq").quantize(whole)
    with pytest.raises(KeyboardInterrupt):
        Interrupted(weight_bits=3, rounding="gptq").quantize(space())
    files = sorted(tmp_path.glob("unit-*.safetensors"))
    times = [f.stat().st_mtime_ns for f in files]
    assert len(files) == 2
    second = space()
    RoundToNearest(weight_bits=3, rounding="gptq").quantize(second)
    assert [f.stat().st_mtime_ns for f in files] == times  # not made again
    assert seen == ["stem", "blocks.1", "stem", "blocks.1", "blocks.0", "head"]
    assert second.reports == whole.reports
    for name, tensor in whole.quantized.state_dict().items():
        assert torch.equal(tensor, second.quantized.state_dict()[name])
    with pytest.raises(StorageError, match="another quantization run"):
        Workspace(net, calls(), folder=tmp_path, identity="b")


def test_stages_are_computed_once(tmp_path: Path) -> None:
    space = Workspace(Net(), calls(), folder=tmp_path, identity="a")
    assert space.stage("bits", lambda: {"stem": [1, 2]}) == {"stem": [1, 2]}
    again = Workspace(Net(), calls(), folder=tmp_path, identity="a")
    assert again.stage("bits", lambda: pytest.fail("computed twice")) == {"stem": [1, 2]}


# ---------------------------------------------------------------- quantize, methods, files


def settings(tiny) -> dict:
    return {
        "prompts": tiny.prompts,
        "num_inference_steps": 3,
        "guidance_scale": tiny.guidance_scale,
        "calibration_steps": 2,
        "batch_size": 2,
        "call": tiny.call,
        "progress": False,
    }


@pytest.mark.parametrize("name", ["sdxl", "pixart_sigma"])
@pytest.mark.parametrize(
    "method",
    [
        RoundToNearest(4, 8, group=16, rounding="gptq", only=("*blocks.0*", "mid_block")),
        RoundToNearest(4, 8, activation="static", zero_point=True, group=None),
        RoundToNearest(4, 4, weight_format="nvfp4", activation_format="nvfp4"),
        RoundToNearest(4, 16, weight_format="nf4"),
    ],
    ids=str,
)
def test_saved_and_loaded_denoisers_compute_the_same_bits(
    name: str, method: Method, tmp_path: Path
) -> None:
    tiny = ALL[name]()
    made, report = quantize(tiny.pipe, method, out=tmp_path / "out", **settings(tiny))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "quantized.json",
        "quantized.safetensors",
    ]
    loaded, again = load_quantized(tmp_path / "out")
    assert again == report
    assert again.spec == method.as_dict()
    made_calls = calibration_set(tiny.pipe, **settings(tiny))
    for call in made_calls.calls:
        assert torch.equal(call.make(loaded)[0], call.make(made)[0])
        assert not torch.equal(call.make(loaded)[0], call.make(tiny.model)[0])


def test_files_hold_packed_codes(tmp_path: Path) -> None:
    tiny = ALL["pixart_sigma"]()
    method = RoundToNearest(3, 16, group=16)
    made, report = quantize(tiny.pipe, method, out=tmp_path, progress=False)
    tensors = load_file(tmp_path / "quantized.safetensors")
    layer = report.quantized[0]
    count = torch.Size(layer.shape).numel()
    assert tensors[f"{layer.name}.weight.codes"].numel() == -(-count * 3 // 8)
    assert f"{layer.name}.weight" not in tensors
    # A weight that was changed since is written as it is, and read as it is.
    part = made.get_submodule(layer.name)
    part.weight = part.weight * 1.01
    save_quantized(made, tmp_path)
    loaded, _ = load_quantized(tmp_path)
    assert torch.equal(loaded.get_submodule(layer.name).weight, part.weight)


def test_layers_that_lack_something_are_refused() -> None:
    layer = RoundToNearest(4, 16).layer(nn.Linear(4, 4))
    tensors, description = write_layer(layer)
    description["weight"]["grid"] = None
    with pytest.raises(QuantizationError, match="lacks 'weight'"):
        read_layer(description, tensors, nn.Linear(4, 4))


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_methods_come_back_from_json(kind: type[Method]) -> None:
    method = kind()
    assert method_from(json.loads(json.dumps(method.as_dict()))) == method
    assert kind.of_bits("w8a8").weight_bits == 8
    assert str(kind.of_bits("w8a8")).startswith(f"{kind.name}-w8a8")


def test_unknown_methods_options_and_bits_are_refused() -> None:
    with pytest.raises(
        QuantizationError, match="no method called 'smoothquant'; there is rtn, svdquant"
    ):
        method_named("smoothquant")
    with pytest.raises(QuantizationError, match="rtn has no option gruop"):
        RoundToNearest.of_bits("w4a8", gruop=4)
    with pytest.raises(QuantizationError, match="for example w4a8"):
        RoundToNearest.of_bits("4bits")
    with pytest.raises(QuantizationError, match="nf4 has 4 bits, 8 were asked for"):
        RoundToNearest(8, 16, weight_format="nf4")
    with pytest.raises(QuantizationError, match="give prompts"):
        quantize(ALL["sdxl"]().pipe, RoundToNearest(rounding="gptq"), progress=False)


def test_convolutions_of_a_unet_are_replaced_too() -> None:
    tiny = ALL["sdxl"]()
    made, report = quantize(tiny.pipe, RoundToNearest(4, 8, group=16), progress=False)
    kinds = {type(m) for m in made.modules() if isinstance(m, QuantizedLayer)}
    assert kinds == {QuantizedLinear, QuantizedConv2d}
    assert all(layer.weight_format for layer in report.quantized)
    assert len(report.table().splitlines()) == len(report.layers)


@pytest.mark.rarely
@pytest.mark.parametrize(
    "method",
    [
        {"method": "rtn", "weight_bits": 4},
        {"method": "svdquant", "rank": 8, "iterations": 2, "grids": 2},
    ],
    ids=lambda m: m["method"],
)
def test_memory_beyond_the_result_is_that_of_one_block(method: dict) -> None:
    """Twice as many blocks take twice the result, and nothing else grows with them."""
    found = {}
    for depth in (4, 8):
        out = subprocess.run(
            [sys.executable, MEMORY, json.dumps(method), "128", str(depth)],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        found[depth] = json.loads(out.stdout.splitlines()[-1])
    beyond = {d: f["growth"] - f["weights"] for d, f in found.items()}
    one_block = found[8]["weights"] / 8
    assert found[8]["weights"] == 2 * found[4]["weights"]
    assert beyond[8] - beyond[4] < 2 * one_block  # all four further blocks would be 4 or more
    assert beyond[8] < 6 * found[8]["activations"]


def test_a_call_is_made_on_the_denoisers_device() -> None:
    net = Net()
    call = DenoiserCall((torch.ones(1, 4),), {"scale": torch.ones(())})
    assert call.make(net).shape == (1, 4)
    assert not call.make(net).requires_grad
