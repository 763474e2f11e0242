"""A network quantized as a whole: what is replaced, reported and refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from small_denoisers import (
    gaussian,
    pixart,
    run_pixart,
    run_sdxl,
    sdxl,
)
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers import (
    QuantizationReport,
    QuantizedLinear,
    QuantizerSpec,
    quantize_module,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)  # the layers and denoisers below start from random weights


class Small(nn.Module):
    """One of each: linear, convolution, depthwise, 3-D convolution, a subclass, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(6, 4)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 4), "proj_out": nn.Linear(4, 6, bias=False)})
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.volume = nn.Conv3d(2, 2, 1)
        self.special = nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.shared = self.block["fc"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(x)).mean((-1, -2))
        return (
            self.proj_out(x)
            + self.shared(x)
            + self.block["fc"](self.block["proj_out"](self.norm(x[:, :4])))
        )


def test_every_layer_is_reported_once_with_a_reason_or_an_error() -> None:
    net = Small().eval()
    new, report = quantize_module(net, QuantizerSpec(3, 8, group=4, rank=1))
    by_name = {layer.name: layer for layer in report.layers}
    assert len(by_name) == len(report.layers)
    assert {name: layer.reason for name, layer in by_name.items()} == {
        "proj_out": "skip pattern 'proj_out'",
        "block.fc": "",
        "block.proj_out": "",
        "conv": "",
        "depthwise": "",
        "volume": "type Conv3d is not quantized",
        "special": "type NonDynamicallyQuantizableLinear is not quantized",
    }
    assert all(layer.weight_error > 0.01 for layer in report.quantized)
    assert all(layer.weight_error == 0 for layer in report.kept)
    assert (by_name["block.fc"].rank, by_name["block.fc"].note) == (1, "")
    assert (by_name["conv"].rank, by_name["conv"].note) == (0, "convolution: no low-rank branch")
    assert by_name["depthwise"].group is None
    assert "one weight scale per output channel" in by_name["depthwise"].note
    # the copy's own weights, independently of the report
    expected = torch.linalg.norm(net.conv.weight - new.conv.weight) / torch.linalg.norm(
        net.conv.weight
    )
    assert by_name["conv"].weight_error == pytest.approx(expected.item(), rel=1e-4)


def test_the_original_is_untouched_and_shared_layers_stay_shared() -> None:
    net = Small()
    before = copy.deepcopy(net.state_dict())
    new, report = quantize_module(net, QuantizerSpec(3, 8, group=4, rank=1))
    assert isinstance(new.shared, QuantizedLinear)
    assert new.shared is new.block["fc"]
    assert isinstance(new.proj_out, nn.Linear)
    assert new.proj_out is not net.proj_out
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert not new.training
    assert not any(p.requires_grad for p in new.parameters())
    old_memory = {t.data_ptr() for t in net.state_dict().values()}
    assert not old_memory & {t.data_ptr() for t in new.state_dict().values()}
    assert (new.evenkeel_quantizer, report.spec["rank"]) == ("w3a8-g4-r1", 1)


def test_sixteen_bits_change_nothing() -> None:
    net, x = Small().eval(), gaussian(2, 6, 5, 5)
    new, report = quantize_module(net, QuantizerSpec(16))
    assert torch.equal(new(x), net(x))
    assert report.stored_bytes == report.full_precision_bytes
    rounded, _ = quantize_module(net, QuantizerSpec(8))
    assert not torch.equal(rounded(x), net(x))


def test_sizes_by_hand() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    _, report = quantize_module(net, QuantizerSpec(3, group=4, rank=1, only=("0",)))
    norm = 4 * 4 * 2 + 8  # four vectors, and one 64-bit counter
    assert report.full_precision_bytes == (24 + 4 + 8) * 2 + norm
    codes, scales, factors = 24 * 3 // 8, 4 * 2 * 2, (6 + 4) * 2
    assert report.stored_bytes == codes + scales + factors + 4 * 2 + 8 * 2 + norm


def test_sizes_by_hand_of_a_convolution_whose_codes_do_not_fill_a_byte() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 3, bias=False))
    _, report = quantize_module(net, QuantizerSpec(3, group=2))
    assert report.full_precision_bytes == 54
    assert report.stored_bytes == 11 + 9 * 2 * 2  # 81 bits; nine positions of two groups


def test_only_restricts_and_skip_wins() -> None:
    net = Small()
    _, report = quantize_module(net, QuantizerSpec(4, only=("block", "proj_out")))
    assert [layer.name for layer in report.quantized] == ["block.fc", "block.proj_out"]
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert reasons["conv"] == "matched by no `only` pattern"
    assert reasons["proj_out"] == "skip pattern 'proj_out'"
    _, report = quantize_module(net, QuantizerSpec(4, skip=("conv*", "*fc")))
    assert [layer.name for layer in report.quantized] == ["proj_out", "block.proj_out", "depthwise"]


@pytest.mark.parametrize("patterns", [{"only": ("attn",)}, {"skip": ("*",)}])
def test_nothing_to_quantize_is_an_error(patterns: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(QuantizationError, match="No layer is left to quantize") as caught:
        quantize_module(Small(), QuantizerSpec(4, **patterns))
    assert "'block.fc'" in str(caught.value)
    with pytest.raises(QuantizationError, match="none at all"):
        quantize_module(nn.ReLU(), QuantizerSpec(4))


def test_bad_weights_are_named() -> None:
    net = Small()
    net.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="'conv' holds 1 of 324"):
        quantize_module(net, QuantizerSpec(4))
    with pytest.raises(QuantizationError, match=r"'block\.fc' is \(4, 6\): a branch of rank 4"):
        quantize_module(Small(), QuantizerSpec(4, rank=4))
    net = Small()
    net.block["fc"].weight.data[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match=r"'block\.fc'"):
        quantize_module(net, QuantizerSpec(4, rank=1))


def test_layers_that_would_lose_something_are_refused() -> None:
    hooked = Small()
    hooked.conv.register_forward_hook(lambda *_: None)
    with pytest.raises(QuantizationError, match="'conv' has hooks"):
        quantize_module(hooked, QuantizerSpec(4))
    with pytest.raises(QuantizationError, match="'meta'"):
        quantize_module(Small().to("meta"), QuantizerSpec(4))
    new, _ = quantize_module(Small(), QuantizerSpec(4))
    with pytest.raises(QuantizationError, match=r"'block\.fc' is quantized already"):
        quantize_module(new, QuantizerSpec(4))


def test_progress_counts_every_unit() -> None:
    seen: list[tuple[int, int, str]] = []
    _, report = quantize_module(Small(), QuantizerSpec(4), lambda *step: seen.append(step))
    names = [layer.name for layer in report.quantized]
    assert seen == [(i, len(names), name) for i, name in enumerate(names, start=1)]


def test_reports_come_back_from_json_and_print_shortly() -> None:
    _, report = quantize_module(Small(), QuantizerSpec(3, group=None, only=("*block*", "*conv")))
    assert QuantizationReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    text = str(report)
    assert text.startswith("w3a16-gnone: 3 of 7 layers quantized")
    assert "kept    2  matched by no `only` pattern" in text
    assert len(text.splitlines()) < 10
    broken = report.as_dict()
    broken["layers"][0].pop("kind")
    with pytest.raises(QuantizationError, match="not a quantization report"):
        QuantizationReport.from_dict(broken)


@pytest.mark.parametrize(("build", "run"), [(pixart, run_pixart), (sdxl, run_sdxl)])
def test_a_real_denoiser_at_sixteen_bits_is_bit_identical(build, run) -> None:
    net = build()
    exact, _ = quantize_module(net, QuantizerSpec(16))
    rounded, _ = quantize_module(net, QuantizerSpec(4, 8))
    assert torch.equal(run(exact), run(net))
    error = (run(rounded) - run(net)).norm() / run(net).norm()
    assert 1e-4 < error < 0.5
