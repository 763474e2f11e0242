"""Files read by their pages alone give what this library gives, and are refused where it refuses them."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import independent_reader as reader
import numpy as np
import pytest
import torch
from made_adapters import made_adapters
from synthetic_record import provenance
from torch import Tensor, nn

import evenkeel
from evenkeel.corrections import Readout
from evenkeel.corrections.head_table import HeadTable
from evenkeel.errors import EvenkeelError
from evenkeel.hosts.actuators.beside import attach
from evenkeel.quantizers import load_quantized
from evenkeel.quantizers.layers.input_quantizers import DynamicInput, StaticInput
from evenkeel.quantizers.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.layers.replacing import swap
from evenkeel.quantizers.layers.timed_inputs import TimedInput
from evenkeel.quantizers.layers.told_timestep import _TOLD, Told
from evenkeel.quantizers.numbers.formats import format_named
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.saved.folder import save_quantized
from evenkeel.quantizers.saved.report import QuantizationReport, report_of
from evenkeel.quantizers.saved.report import attach as attach_report
from evenkeel.record.lora_file import write_lora
from evenkeel.reports.restored import RESTORED
from evenkeel.storage import Kind, read_json, write_folder, write_json


def test_the_reader_knows_nothing_of_this_library() -> None:
    tree = ast.parse(Path(reader.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
        )
    }
    assert imported == {"__future__", "hashlib", "json", "math", "numpy", "pathlib", "re", "typing"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- adapters


class Net(nn.Module):
    """A linear layer of odd width and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(37, 50), nn.Conv2d(5, 7, 3, stride=2, padding=1)])


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_adapters_add_what_the_page_says(bits: int, tmp_path: Path) -> None:
    net = Net()
    made = made_adapters(net, bits=bits)
    found = reader.adapters(evenkeel.save(made, tmp_path / "adapters.safetensors"))
    assert list(found) == ["blocks.0", "blocks.1"]
    inputs = (random(2, 3, 37), random(2, 5, 8, 8))
    with torch.no_grad():
        plain = [layer(x) for layer, x in zip(net.blocks, inputs, strict=True)]
        attach(net, made.layers)
        added = [layer(x) - y for layer, x, y in zip(net.blocks, inputs, plain, strict=True)]
    down, up, kernel = found["blocks.0"]
    np.testing.assert_allclose(inputs[0].numpy() @ down.T @ up, added[0], atol=1e-5)
    assert kernel == [] and float(added[0].abs().max()) > 0.1
    down, up, kernel = found["blocks.1"]
    filters = down.reshape(len(down), 5, *kernel)
    mixed = np.einsum("nrhw,ro->nohw", reader.convolved(inputs[1].numpy(), filters, 2, 1), up)
    np.testing.assert_allclose(mixed, added[1], atol=1e-5)


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_loras_hold_the_same_values(layout: str, tmp_path: Path) -> None:
    made = made_adapters(Net())
    packed = reader.adapters(evenkeel.save(made, tmp_path / "adapters.safetensors"))
    metadata, tensors = reader.safetensors(write_lora(made, tmp_path / "lora.safetensors", layout))
    assert metadata["evenkeel.quantized"] == made.provenance.quantized
    for name, (down, up, kernel) in packed.items():
        if layout == "peft":
            first, second = (tensors[f"transformer.{name}.lora_{c}.weight"].values for c in "AB")
            scale = 1.0
        else:
            stem = f"lora_unet_{name.replace('.', '_')}"
            first, second = (tensors[f"{stem}.lora_{c}.weight"].values for c in ("down", "up"))
            scale = float(tensors[f"{stem}.alpha"].values) / len(down)
        assert first.shape == ((len(down), 5, *kernel) if kernel else down.shape)
        np.testing.assert_array_equal(first.reshape(down.shape), down)
        np.testing.assert_allclose(scale * second.reshape(up.shape[1], -1).T, up, rtol=1e-3)


def test_a_restored_folder_lists_its_parts(tmp_path: Path) -> None:
    made = made_adapters(Net())
    write_folder(tmp_path, RESTORED, {"parts": ["adapters"]},
                 {"adapters.safetensors": lambda path: evenkeel.save(made, path)})  # fmt: skip
    said, files = reader.folder(tmp_path, "restored", 1, ("parts",))
    assert said["parts"] == ["adapters"]
    assert list(reader.adapters(files["adapters.safetensors"])) == ["blocks.0", "blocks.1"]
    files["adapters.safetensors"].rename(tmp_path / "adapters.safetensors.new")  # a killed writer
    assert reader.folder(tmp_path, "restored", 1, ("parts",))[1]
    assert evenkeel.load(tmp_path).name == "adapters"


# ---- readouts


def test_a_readout_adds_what_the_page_says(tmp_path: Path) -> None:
    made_for = provenance(trajectory="corrected")
    steps = len(made_for.timesteps)
    active = torch.ones(steps, 2, dtype=torch.bool)
    active[1, 0] = False
    table = HeadTable.of(
        *made_for.levels, random(steps, 2, 6, 4), random(steps, 2, 4, seed=1), active
    )
    file = evenkeel.save(
        Readout(made_for, "proj_out", "per-step", table, (), None), tmp_path / "readout.safetensors"
    )
    found = reader.Readout(file)
    assert found.head == "proj_out"
    h = random(3, 6, seed=2).numpy()
    levels = [*zip(made_for.alpha, made_for.sigma, strict=True), (1.0, 10.0), (1.0, 6.0)]
    for alpha, sigma in levels:
        (expected,) = table.at(np.array([alpha]), np.array([sigma]))
        assert expected is not None
        weight, constant = found.at(alpha, sigma)
        for branch in range(2):
            np.testing.assert_allclose(
                h @ weight[branch] + constant[branch],
                torch.from_numpy(h) @ expected[0][branch] + expected[1][branch],
                atol=1e-5,
            )


# ---- quantized denoisers

GRIDS = [
    "int3-g16", "int4", "int8-tensor", "uint4-g24-zero", "uint2-zero-mse", "uint5-g7", "nvfp4", "mxfp4",
    "nf4-g64", "fp8_e4m3-g16", "fp8_e5m2", "fp6_e2m3-g32", "fp6_e3m2", "int6-g100", "int5-tensor",
]  # fmt: skip
INPUTS: list[Any] = [
    None,
    DynamicInput(format_named("int8"), 16),
    DynamicInput(format_named("int4")),
    DynamicInput(format_named("uint8"), zero_point=True),
    DynamicInput(format_named("uint4"), 16, shift=0.17),
    DynamicInput(format_named("uint8"), shift=random(40).abs()),
    DynamicInput(format_named("fp8_e4m3"), 16),
    DynamicInput(format_named("fp4_e2m1"), 16),
    DynamicInput(format_named("nf4"), 8),
    DynamicInput(format_named("int8"), 16, across_batch=True),
    StaticInput(8, torch.tensor([0.02]), torch.tensor([120.0])),
    StaticInput(4, torch.tensor([0.3, 0.2]), torch.tensor([7.0, 9.0]), split=11),
    TimedInput(6, [900.0, 500.0, 100.0], torch.tensor([0.1, 0.2, 0.3]), torch.tensor([30.0, 31.5, 32.0])),
]  # fmt: skip


def denoiser(dtype: torch.dtype = torch.float32) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(  # any class with convolutions and linear layers
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(40,),
        norm_num_groups=8, attention_head_dim=8, down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    ).to(dtype).eval()  # fmt: skip


def saved(
    place: Path, change: Callable[[int, nn.Module, Grid], Any], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A network whose layers are on all grids in turn, as this library saves it."""
    net, reports = denoiser(dtype), []
    plain = [(n, m) for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for i, (name, layer) in enumerate(plain):
        new = change(i, layer, Grid.parse(GRIDS[i % len(GRIDS)]))
        reports.append(report_of(name, layer, new))
        swap(net, layer, new)
    attach_report(QuantizationReport("made here", {}, tuple(reports), 1, 1), net)
    save_quantized(net, place)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_what_the_page_says(dtype: torch.dtype, tmp_path: Path) -> None:
    def change(i: int, layer: nn.Module, grid: Grid) -> Any:
        weight = layer.get_parameter("weight").detach()
        values, scales = snap_weight(weight, grid)
        stored = (grid, scales)
        if isinstance(layer, nn.Conv2d):
            return QuantizedConv2d(layer, values.to(dtype), layer.bias.detach(), stored=stored)
        return QuantizedLinear(values.to(dtype), layer.bias.detach(), stored=stored)

    net = saved(tmp_path, change, dtype)
    found = reader.Quantized(tmp_path)
    grids = [said["weight"]["grid"] for said in found.said["layers"].values()]
    assert len(grids) >= len(GRIDS) and None not in grids  # all are packed
    for name in found.parts:
        weight = net.get_submodule(name).get_buffer("weight")
        wide = weight.float() if dtype == torch.bfloat16 else weight
        np.testing.assert_array_equal(found.weight(name), wide.numpy(), err_msg=name)
    others = {n for n, _ in net.named_parameters()}
    assert set(found.others) == others


@pytest.mark.parametrize("entering", INPUTS, ids=str)
def test_layers_compute_what_the_page_says(entering: Any, tmp_path: Path) -> None:
    def change(i: int, layer: nn.Module, grid: Grid) -> Any:
        values, scales = snap_weight(layer.get_parameter("weight").detach(), grid)
        if isinstance(layer, nn.Conv2d) or layer.in_features != 40:
            stored = (grid, scales)
            kind: Any = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
            given = (layer, values) if isinstance(layer, nn.Conv2d) else (values,)
            return kind(*given, layer.bias.detach(), stored=stored)
        outputs = len(values)
        return QuantizedLinear(
            values,
            layer.bias.detach(),
            random(3, 40, seed=i),
            random(outputs, 3, seed=i + 1) / 9,
            activation=entering,
            smoothing=random(40, seed=i).abs() + 0.5,
            first_token=random(outputs, seed=i) if i % 2 else None,
            stored=(grid, scales),
        )

    net = saved(tmp_path, change)
    found = reader.Quantized(tmp_path)
    x = random(2, 5, 40, seed=7)
    checked = 0
    for name in found.parts:
        layer = net.get_submodule(name)
        if not isinstance(layer, QuantizedLinear) or layer.rank == 0:
            continue
        mark = _TOLD.set(Told(430.0))
        with torch.no_grad():
            expected = layer(x)
        _TOLD.reset(mark)
        np.testing.assert_allclose(found.output(name, x.numpy(), 430.0), expected, atol=2e-4)
        checked += 1
    assert checked >= 4


# ---- refusals


def damaged(content: bytes, header: Callable[[dict[str, Any]], None]) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(content[:8], "little")
    said = json.loads(content[8 : 8 + size])
    header(said)
    text = json.dumps(said).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def set_to(**values: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(values)


@pytest.mark.parametrize(
    "harm",
    [
        lambda c: c[:-1] + bytes([c[-1] ^ 1]),
        lambda c: c[:4],
        lambda c: b"",
        lambda c: damaged(c, set_to(format="evenkeel-record")),
        lambda c: damaged(c, set_to(schema_version="2")),
        lambda c: damaged(c, set_to(adapters="{}")),
        lambda c: damaged(c, set_to(digest="0" * 64)),
        lambda c: damaged(c, lambda h: h.update(more=h["codes"])),
        lambda c: damaged(c, lambda h: h.pop("scales")),
    ],
)
def test_both_refuse_a_damaged_file(harm: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = evenkeel.save(made_adapters(Net()), tmp_path / "adapters.safetensors")
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(reader.Refused):
        reader.adapters(file)
    with pytest.raises(EvenkeelError):
        evenkeel.load(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda said, tensors: said["adapters"]["layers"].append(said["adapters"]["layers"][0]),
        lambda said, tensors: said["adapters"].update(bits=5),
        lambda said, tensors: said["adapters"].update(more=1),
        lambda said, tensors: said["adapters"]["layers"][0].update(rank=0),
        lambda said, tensors: said["adapters"]["layers"][0].update(rank=True),
        lambda said, tensors: said["provenance"].pop("call"),
        lambda said, tensors: tensors["codes"].fill_(255),
        lambda said, tensors: tensors["scales"].fill_(-1),
        lambda said, tensors: tensors["scales"].fill_(float("nan")),
        lambda said, tensors: tensors.update(scales=tensors["scales"].float()),
        lambda said, tensors: tensors.update(codes=tensors["codes"][:-1].clone()),
        lambda said, tensors: tensors.update(codes=tensors["codes"].repeat(2)),
        lambda said, tensors: tensors.update(codes=tensors["codes"][None]),
    ],
)
def test_both_refuse_what_a_right_digest_makes_no_better(
    change: Callable[[Any, Any], Any], tmp_path: Path
) -> None:
    from evenkeel.storage import read_tensors, write_tensors

    kind = Kind("adapters", 1, "", keys=("provenance", "adapters"))
    file = evenkeel.save(made_adapters(Net()), tmp_path / "adapters.safetensors")
    said, tensors = read_tensors(file, kind)
    change(said, tensors)
    write_tensors(file, kind, said, tensors)
    with pytest.raises(reader.Refused):
        reader.adapters(file)
    with pytest.raises(EvenkeelError):
        evenkeel.load(file)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "", "a//b", "./a", "link/a"])
def test_both_refuse_names_that_lead_out(name: str, tmp_path: Path) -> None:
    place = tmp_path / "in"
    place.mkdir()
    (place / "link").symlink_to(tmp_path)
    kind = Kind("restored", 1, "", keys=("parts", "files"))
    write_json(place / "restored.json", kind, {"parts": [], "files": {name: "0" * 64}})
    with pytest.raises(reader.Refused):
        reader.folder(place, "restored", 1, ("parts",))
    with pytest.raises(EvenkeelError):
        evenkeel.load(place)


@pytest.mark.parametrize(("format", "wrong"), [("int3", 4), ("fp8_e4m3", 127), ("fp8_e5m2", 124)])
def test_both_refuse_codes_that_are_no_number(format: str, wrong: int, tmp_path: Path) -> None:
    place = tmp_path / "q"
    grid = Grid.parse(f"{format}-g16")

    def change(i: int, layer: nn.Module, _: Grid) -> Any:
        values, scales = snap_weight(layer.get_parameter("weight").detach(), grid)
        bias = layer.get_parameter("bias").detach()
        if isinstance(layer, nn.Conv2d):
            return QuantizedConv2d(layer, values, bias, stored=(grid, scales))
        return QuantizedLinear(values, bias, stored=(grid, scales))

    saved(place, change)
    from safetensors.torch import load_file, save_file

    from evenkeel.quantizers.saved.folder import KIND
    from evenkeel.storage import read_folder

    header, files = read_folder(place, KIND)
    tensors = load_file(files["quantized.safetensors"])
    name = next(n for n in tensors if n.endswith(".weight.codes"))
    first = int(tensors[name][0]) & ~(2**grid.format.bits - 1)
    tensors[name][0] = first | wrong
    shutil.rmtree(place)
    write_folder(place, KIND, header,
                 {"quantized.safetensors": lambda path: save_file(tensors, path)})  # fmt: skip
    found = reader.Quantized(place)
    with pytest.raises(reader.Refused):
        found.weight(name.removesuffix(".weight.codes"))
    with pytest.raises(EvenkeelError):
        load_quantized(place)


# ---- JSON


@pytest.mark.parametrize(
    "value",
    [
        {"b": [1, -2.5, 1e-7, 1e22, 123456789012345678901, 0.1], "a": None, "A": True, "é": False},
        {"𝄞": '𝄞 " \\ \x00 \x1f \x7f \n \r \t \b \f / ü \u2028', "￿": [], "": {}},
        {"x": [[], {}, [{}], "", 1.0, 100.0, 1e16, -0.0, float("inf")]},
    ],
)
def test_the_canonical_text_is_the_same(value: Any, tmp_path: Path) -> None:
    kind = Kind("thing", 1, "", keys=("value",))
    file = write_json(tmp_path / "thing.json", kind, {"value": value})
    assert reader.json_file(file, "thing", 1, ("value",))["value"] == value
    assert read_json(file, kind)["value"] == value
    file.write_text(file.read_text().replace("evenkeel-thing", "evenkeel-thing "))
    with pytest.raises(reader.Refused):
        reader.json_file(file, "thing", 1, ("value",))
