"""SVDQuant: the laws of its parts, an independent dense implementation, and real denoisers."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_weights import decaying, gaussian
from tiny_pipelines import ALL, TinyPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import QuantizationError
from evenkeel.fitting.quantize import calibration_set
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.quantizers import load_quantized, save_quantized
from evenkeel.quantizers.layers.input_quantizers import DynamicInput
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
)
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.methods.svdquant import SVDQuant
from evenkeel.quantizers.methods.svdquant_layers import shifts_of
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import snap_weight
from evenkeel.quantizers.saved.report import QuantizationReport, effective_weight
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, kept
from evenkeel.quantizers.workspace.workspace import Workspace

INT4 = Grid.parse("int4-g8")


def quantized(
    net: nn.Module, calls: CalibrationSet | None, method: SVDQuant | RoundToNearest
) -> tuple[nn.Module, QuantizationReport]:
    space = Workspace(net, calls)
    method.quantize(space)
    return space.result(str(method), method.as_dict())


def nearest(x: Tensor) -> Tensor:
    return snap_weight(x, INT4)[0]


# ---------------------------------------------------------------- a dense implementation


class Attention(nn.Module):
    """Self-attention and cross-attention as diffusers names them, without the attention."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(text, width)
        self.to_v, self.to_out = nn.Linear(text, width), nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        mixed = self.to_q(x) + (self.to_k(text) * self.to_v(text)).mean(-2, keepdim=True)
        return self.to_out[0](mixed.tanh())


class FeedForward(nn.Module):
    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        act.proj = nn.Linear(width, 2 * width)  # type: ignore[assignment]
        self.net = nn.ModuleList([act, nn.Dropout(0.0), nn.Linear(2 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](self.net[0].proj(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(16, 16), Attention(16, 24)
        self.ff = FeedForward(16, nn.GELU())

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, text)
        return x + self.ff(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Net().double().eval()
    with torch.no_grad():
        for index, part in enumerate(made.modules()):
            if isinstance(part, nn.Linear):
                part.weight.copy_(decaying(*part.weight.shape, seed=100 * index) / 4)
    return made


@pytest.fixture(scope="module")
def calls() -> CalibrationSet:
    made = []
    for seed in range(3):
        x = gaussian(2, 9, 16, seed=seed)
        x[..., 5] *= 8  # an outlying channel, which smoothing is for
        made.append(((x, gaussian(2, 5, 24, seed=seed + 50)), {}))
    return kept(made)


def np_round(x: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Symmetric groups along the last axis; plain loops, nothing from the library."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], group):
        part = x[..., start : start + group]
        scale = np.abs(part).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        scale[scale == 0] = 1
        out[..., start : start + group] = np.round(part / scale) * scale
    return out


def np_best(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def np_svdquant(
    x: np.ndarray, w: np.ndarray, rank: int, bits: tuple[int, int], group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors, branch and rounded residual of one matrix on inputs (rows, in), from the paper."""

    def error(s: np.ndarray, low: np.ndarray, rest: np.ndarray) -> float:
        y = np_round(x / s, bits[1], group) @ rest.T + (x / s) @ low.T
        return float(((y - x @ w.T) ** 2).sum())

    best, smooth = np.inf, np.ones(w.shape[1])
    tried = [(0.0, 0.0)]
    tried += [(a / 20, b) for b in (0.0, None) for a in range(1, 20)]
    for alpha, beta in tried:
        power = 1 - alpha if beta is None else beta
        s = np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** power
        low = np_best(w * s, rank)
        off = error(s, low, np_round(w * s - low, bits[0], group))
        if off < best:
            best, smooth = off, s
    target, errors, pairs = w * smooth, [np.inf], []
    low = np_best(target, rank)
    while True:
        rest = np_round(target - low, bits[0], group)
        pairs.append((low, rest))
        errors.append(error(smooth, low, rest))
        if errors[-1] >= errors[-2]:
            return smooth, *pairs[-2]
        low = np_best(target - rest, rank)


@pytest.mark.parametrize("bits", [(4, 4), (3, 4)])
def test_it_agrees_with_an_independent_dense_implementation(
    net: nn.Module, calls: CalibrationSet, bits: tuple[int, int]
) -> None:
    method = SVDQuant(*bits, group=8, rank=3, unsigned=False, skip=("blocks.1",), rows=54)
    made, _ = quantized(net, calls, method)
    space = Workspace(net, calls)
    joined = [
        ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
        ["attn2.to_q"],
        ["attn2.to_k", "attn2.to_v"],
        ["attn2.to_out.0"],
        ["ff.net.0.proj"],
        ["ff.net.2"],
    ]
    for names in ([f"blocks.0.{n}" for n in group] for group in joined):
        x = space.layer_inputs(names, 54)[names[0]].numpy()
        w = np.concatenate([net.get_submodule(n).weight.detach().numpy() for n in names])
        smooth, low, rest = np_svdquant(x, w, 3, bits, 8)
        layers = [made.get_submodule(n) for n in names]
        up = torch.cat([layer.up for layer in layers])
        weight = torch.cat([layer._buffers["weight"] for layer in layers])
        found = layers[0].smoothing
        assert np.allclose(1.0 if found is None else found.numpy(), smooth)
        # The library's factors are float32; everything else here is float64.
        assert np.allclose((up @ layers[0].down).numpy(), low, atol=1e-4)
        assert np.allclose(weight.numpy(), rest, atol=1e-4)


def test_joined_projections_share_one_branch(net: nn.Module, calls: CalibrationSet) -> None:
    made, _ = quantized(net, calls, SVDQuant(group=8, rank=3, grids=2))
    own, cross = made.blocks[0].attn1, made.blocks[0].attn2
    assert own.to_q.down is own.to_k.down is own.to_v.down
    assert torch.equal(own.to_q.smoothing, own.to_v.smoothing)
    assert cross.to_k.down is cross.to_v.down
    assert cross.to_q.down.shape == (3, 16)
    assert cross.to_k.down.shape == (3, 24)
    assert not torch.equal(cross.to_q.down, own.to_q.down)
    alone, _ = quantized(net, calls, SVDQuant(group=8, rank=3, grids=2, shared=False))
    own = alone.blocks[0].attn1
    assert not torch.equal(own.to_q.down, own.to_k.down)
    assert torch.equal(own.to_q.smoothing, own.to_k.smoothing)  # one input, one smoothing


def test_smoothing_and_branch_fold_exactly(net: nn.Module, calls: CalibrationSet) -> None:
    made, report = quantized(net, calls, SVDQuant(8, 16, group=8, rank=3, grids=5))
    call = calls.calls[0]
    expected = call.make(net)
    with torch.no_grad():
        for row in report.quantized:
            new, old = made.get_submodule(row.name), net.get_submodule(row.name)
            smooth = 1.0 if new.smoothing is None else new.smoothing
            new.weight.copy_(old.weight * smooth - new.up @ new.down)  # nothing is rounded now
    assert torch.allclose(call.make(made), expected, rtol=1e-12, atol=1e-12)
    assert any(made.get_submodule(row.name).smoothing is not None for row in report.quantized)


def test_it_beats_rounding_where_outliers_and_strong_directions_are(
    net: nn.Module, calls: CalibrationSet
) -> None:
    expected = [call.make(net) for call in calls.calls]

    def error(method: SVDQuant | RoundToNearest) -> float:
        made, _ = quantized(net, calls, method)
        pairs = zip(calls.calls, expected, strict=True)
        return sum(float((call.make(made) - y).square().sum()) for call, y in pairs) ** 0.5

    plain = error(RoundToNearest(4, 4, group=8, activation="group"))
    smoothed, branched, both = (
        error(SVDQuant(4, 4, group=8, rank=rank, smoothing=smoothing, grids=5, iterations=10))
        for rank, smoothing in ((0, True), (3, False), (3, True))
    )
    assert both < 0.6 * plain
    assert smoothed < plain
    assert branched < plain


def test_gptq_rounds_the_residual_better(net: nn.Module, calls: CalibrationSet) -> None:
    rows = [
        quantized(net, calls, SVDQuant(3, 16, group=8, rank=3, grids=2, rounding=how))[1].quantized
        for how in ("nearest", "gptq")
    ]
    better = [b.output_error < a.output_error for a, b in zip(*rows, strict=True)]
    assert sum(better) >= 0.9 * len(better)


# ---------------------------------------------------------------- unsigned inputs


def unsigned_codes(x: Tensor, bits: int, group: int) -> Tensor:
    """Codes times scales of inputs that are not negative, group by group."""
    parts = x.split(group, -1)
    scales = [part.amax(-1, keepdim=True) / (2**bits - 1) for part in parts]
    rounded = [
        (part / scale).round().clamp(min=0) * scale
        for part, scale in zip(parts, scales, strict=True)
    ]
    return torch.cat(rounded, -1)


def test_a_shifted_input_is_the_folded_bias_of_the_paper(
    net: nn.Module, calls: CalibrationSet
) -> None:
    made, _ = quantized(net, calls, SVDQuant(4, 4, group=8, rank=0, smoothing=False))
    layer = made.blocks[0].ff.net[2]
    x = F.gelu(gaussian(11, 32, seed=4))
    shift = 0.171875
    folded = layer.bias - layer.weight.sum(1) * shift
    expected = F.linear(unsigned_codes(x + shift, 4, 8), layer.weight, folded)
    assert layer.activation.format.name == "uint4"
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-3)


def test_a_shifted_convolution_is_padded_with_the_shift() -> None:
    class ResnetBlock2D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nonlinearity = nn.SiLU()
            self.conv1 = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv1(self.nonlinearity(x))

    torch.manual_seed(0)
    block = ResnetBlock2D().double()
    assert shifts_of(block) == {"conv1": 0.279296875, "conv2": 0.279296875}
    made, _ = quantized(block, None, SVDQuant(group=4, rank=0, smoothing=False))
    x, layer, shift = gaussian(2, 8, 5, 6), made.conv1, 0.279296875
    codes = unsigned_codes((F.silu(x) + shift).movedim(1, -1), 4, 4).movedim(-1, 1)
    padded = F.pad(codes, (1, 1, 1, 1), value=shift)
    folded = layer.bias - layer.weight.sum((1, 2, 3)) * shift
    assert torch.allclose(made(x), F.conv2d(padded, layer.weight, folded), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "kind"), [(F.gelu, "GELU"), (F.silu, "SiLU"), (F.mish, "Mish")]
)
def test_no_input_is_below_its_bound(function: object, kind: str) -> None:
    block = nn.Module()
    block.nonlinearity = getattr(nn, kind)()
    block.__class__ = type("ResnetBlock2D", (nn.Module,), {})
    lowest = float(function(torch.linspace(-8, 0, 100_001, dtype=torch.float64)).amin())
    bound = shifts_of(block)["conv1"]
    assert 0 < bound + lowest < 0.01


def test_smoothed_inputs_are_not_clipped(net: nn.Module, calls: CalibrationSet) -> None:
    made, _ = quantized(net, calls, SVDQuant(group=8, rank=3, grids=5, iterations=1))
    layer = made.blocks[1].ff.net[2]
    assert layer.smoothing is not None
    x = layer.smoothed(torch.full((1, 32), -0.17, dtype=torch.float64))
    assert bool((x + layer.activation.shift >= 0).all())


def test_gated_feed_forwards_are_not_shifted() -> None:
    assert shifts_of(ALL["sdxl"]().model).keys() == {
        f"{block}.{conv}"
        for block in (
            "down_blocks.0.resnets.0",
            "down_blocks.1.resnets.0",
            "up_blocks.0.resnets.0",
            "up_blocks.0.resnets.1",
            "up_blocks.1.resnets.0",
            "up_blocks.1.resnets.1",
            "mid_block.resnets.0",
            "mid_block.resnets.1",
        )
        for conv in ("conv1", "conv2")
    }


# ---------------------------------------------------------------- real denoisers


def calls_of(tiny: TinyPipeline) -> CalibrationSet:
    return calibration_set(
        tiny.pipe,
        tiny.prompts[:1],
        num_inference_steps=2,
        guidance_scale=tiny.guidance_scale,
        calibration_steps=2,
        batch_size=1,
        call=tiny.call,
        progress=False,
    )


def output(found: object) -> Tensor:
    return found[0] if isinstance(found, tuple) else found.sample


@pytest.fixture(scope="module", params=["sdxl", "flux", "pixart_sigma", "sana"])
def done(request: pytest.FixtureRequest) -> tuple[TinyPipeline, nn.Module, QuantizationReport]:
    tiny = ALL[request.param]()
    method = SVDQuant(4, 4, group=16, rank=4, grids=2, iterations=3, rows=64)
    return tiny, *quantized(tiny.model, calls_of(tiny), method)


def test_every_layer_has_a_fate(
    done: tuple[TinyPipeline, nn.Module, QuantizationReport],
) -> None:
    tiny, made, report = done
    kinds = {n for n, m in tiny.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {row.name for row in report.layers} == kinds
    for row in report.kept:
        assert row.reason.endswith(f"of SVDQuant's table for {type(tiny.model).__name__}")
    for row in report.quantized:
        layer = made.get_submodule(row.name)
        assert isinstance(layer, QuantizedLayer)
        assert row.weight_bits == 4
        # Rank 4, or a note that says why not.
        assert (row.rank == 4) != ("no branch" in row.note)
        assert (row.activation_bits == 4) != ("input not rounded" in row.note)
    x, y = (output(calls_of(tiny).calls[0].make(m)) for m in (tiny.model, made))
    assert 0 < float((x - y).norm() / x.norm()) < 0.5


def test_files_give_the_same_bits_back(
    done: tuple[TinyPipeline, nn.Module, QuantizationReport],
    tmp_path: Path,
) -> None:
    tiny, made, report = done
    save_quantized(made, tmp_path)
    again, found = load_quantized(tmp_path)
    # Projections share their branch in memory, and have a copy each from the file.
    assert fingerprint(again) == fingerprint(made)
    call = calls_of(tiny).calls[0]
    assert torch.equal(output(call.make(again)), output(call.make(made)))
    assert found == report
    down = [row.name for row in report.quantized if row.rank]
    for name in down:
        assert torch.equal(again.get_submodule(name).down, made.get_submodule(name).down)


EXPECTED: dict[str, dict[str, tuple[int, int, int]]] = {  # weight bits, activation bits, rank
    "sdxl": {
        "down_blocks.0.resnets.0.conv1": (4, 4, 0),
        "down_blocks.1.resnets.0.conv_shortcut": (16, 16, 0),
        "down_blocks.1.resnets.0.time_emb_proj": (16, 16, 0),
        "mid_block.attentions.0.proj_in": (16, 16, 0),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 4, 4),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": (4, 4, 4),
        "down_blocks.0.downsamplers.0.conv": (16, 16, 0),
        "conv_in": (16, 16, 0),
        "conv_out": (16, 16, 0),
    },
    "flux": {
        "transformer_blocks.0.norm1.linear": (4, 16, 0),
        "single_transformer_blocks.1.norm.linear": (4, 16, 0),
        "single_transformer_blocks.1.proj_out": (4, 4, 4),
        "transformer_blocks.0.ff_context.net.2": (4, 4, 4),
        "norm_out.linear": (16, 16, 0),
        "x_embedder": (16, 16, 0),
    },
    "pixart_sigma": {
        "transformer_blocks.0.attn2.to_k": (16, 16, 0),
        "transformer_blocks.0.attn2.to_q": (4, 4, 4),
        "transformer_blocks.1.ff.net.2": (4, 4, 4),
        "adaln_single.linear": (16, 16, 0),
    },
    "sana": {
        "transformer_blocks.0.ff.conv_depth": (16, 16, 0),
        "transformer_blocks.0.ff.conv_inverted": (4, 4, 0),
        "transformer_blocks.0.attn1.to_v": (4, 4, 4),
    },
}


def test_architectures_are_treated_as_published(
    done: tuple[TinyPipeline, nn.Module, QuantizationReport],
) -> None:
    tiny, _, report = done
    rows = {r.name: (r.weight_bits, r.activation_bits, r.rank) for r in report.layers}
    expected = EXPECTED[tiny.name]
    assert {name: rows[name] for name in expected} == expected


def test_what_shares_an_input_in_flux_shares_its_smoothing() -> None:
    tiny = ALL["flux"]()
    method = SVDQuant(4, 4, group=16, rank=4, grids=2, iterations=1, rows=64)
    made, report = quantized(tiny.model, calls_of(tiny), method)
    single, double = made.single_transformer_blocks[0], made.transformer_blocks[0]
    assert single.attn.to_q.down is single.attn.to_v.down
    assert single.proj_mlp.down is not single.attn.to_q.down
    assert torch.equal(single.proj_mlp.smoothing, single.attn.to_q.smoothing)
    assert double.attn.add_q_proj.down is double.attn.add_v_proj.down
    assert double.attn.add_q_proj.down is not double.attn.to_q.down
    assert double.ff.net[2].activation.format.name == "uint4"
    assert single.proj_out.activation.format.name == "int4"
    notes = {row.name: row.note for row in report.layers}
    assert "splits it in two" in notes["single_transformer_blocks.0.proj_out"]


def test_convolutions_of_one_pixel_are_smoothed() -> None:
    tiny = ALL["sana"]()
    calls, quick = calls_of(tiny), {"group": 16, "grids": 4, "iterations": 1, "rows": 64}
    made, _ = quantized(tiny.model, calls, SVDQuant(4, 4, rank=4, **quick))
    layer = made.transformer_blocks[0].ff.conv_inverted
    assert isinstance(layer, QuantizedConv2d)
    assert layer.smoothing is not None
    old = tiny.model.transformer_blocks[0].ff.conv_inverted
    x = gaussian(1, 32, 3, 3).float()
    expected = F.conv2d(x, effective_weight(layer).float(), old.bias)
    layer.activation = None
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_q_drifts_flux_is_plain_rounding() -> None:
    method = SVDQuant.q_drift_flux()
    assert (method.weight_bits, method.activation_bits, method.calibrated) == (3, 4, False)
    tiny = ALL["flux"]()
    made, report = quantized(tiny.model, None, method)
    plain, _ = quantized(tiny.model, None, RoundToNearest(3, 4, skip=(), activation="group"))
    for row in report.quantized:
        new = made.get_submodule(row.name)
        assert torch.equal(new.weight, plain.get_submodule(row.name).weight)
        assert new.smoothing is None
        assert new.rank == 0


def test_eight_bits_have_one_scale_per_channel_and_token(
    net: nn.Module, calls: CalibrationSet
) -> None:
    made, report = quantized(net, calls, SVDQuant.of_bits("w8a8", rank=3, grids=2, iterations=1))
    assert {row.group for row in report.quantized} == {None}
    layer = made.blocks[0].attn1.to_q
    assert layer.stored[1].scale.shape == (16, 1)
    assert layer.activation.group is None
    _, four = quantized(net, calls, SVDQuant.of_bits("w4a4", rank=3, grids=2, iterations=1))
    assert {row.group for row in four.quantized} == {64}
    for eight, coarse in zip(report.quantized, four.quantized, strict=True):
        assert eight.output_error < 0.2 * coarse.output_error


def test_nvfp4_is_used_for_both_operands(net: nn.Module, calls: CalibrationSet) -> None:
    method = SVDQuant(weight_format="nvfp4", rank=3, grids=2, iterations=2)
    made, report = quantized(net, calls, method)
    layer = made.blocks[0].ff.net[2]
    assert str(layer.stored[0]) == "fp4_e2m1-g16-scale_fp8_e4m3"
    assert layer.activation.as_dict() == DynamicInput(layer.stored[0].format, 16).as_dict()
    assert {row.rank for row in report.quantized} == {3}


def test_a_branch_that_would_carry_everything_is_left_out_with_a_note(
    net: nn.Module, calls: CalibrationSet
) -> None:
    made, report = quantized(net, calls, SVDQuant(group=8, rank=20, grids=2, iterations=1))
    rows = {row.name: row for row in report.quantized}
    assert rows["blocks.0.attn1.to_q"].rank == 0
    assert "rank 20 would carry all of it" in rows["blocks.0.attn1.to_q"].note
    assert made.blocks[0].attn1.to_q.smoothing is not None
    # 32 rows of 24 inputs together, so 20 directions are not all of it.
    assert rows["blocks.0.attn2.to_k"].rank == 20


def test_widths_that_the_group_does_not_divide_are_taken(
    net: nn.Module, calls: CalibrationSet
) -> None:
    made, _ = quantized(net, calls, SVDQuant(group=10, rank=2, grids=2, iterations=1))
    assert made.blocks[0].attn1.to_q.stored[1].scale.shape == (16, 2)
    assert bool(torch.isfinite(calls.calls[0].make(made)).all())


def test_half_precision_models_keep_their_dtype(net: nn.Module, calls: CalibrationSet) -> None:
    half = copy.deepcopy(net).to(torch.bfloat16)
    made = [tuple(x.to(torch.bfloat16) for x in call.arguments) for call in calls.calls]
    quick = SVDQuant(group=8, rank=3, grids=2, iterations=1)
    found, _ = quantized(half, kept([(given, {}) for given in made]), quick)
    layer = found.blocks[0].attn1.to_q
    assert isinstance(layer, QuantizedLinear)
    tensors = (layer.weight, layer.down, layer.up, layer.smoothing, layer.bias)
    assert {t.dtype for t in tensors} == {torch.bfloat16}


# ---------------------------------------------------------------- the configuration


def test_the_configuration_survives_json() -> None:
    method = SVDQuant.of_bits("w3a4", group=32, skip=("a", "b.*"), rounding="gptq")
    assert SVDQuant.from_dict(method.as_dict()) == method
    assert str(method).startswith("svdquant-w3a4-")
    assert SVDQuant().values_per_scale == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_bits": 16}, "2 to 8, got 16"),
        ({"rank": -1}, "rank must be"),
        ({"iterations": 0}, "iterations must be"),
        ({"rounding": "up"}, "one of nearest, gptq"),
        ({"decomposition": "qr"}, "one of exact, randomized"),
        ({"weight_format": "nvfp4", "weight_bits": 8}, "nvfp4 is w4a4"),
        ({"weight_format": "nvfp4", "group": 32}, "nvfp4 is w4a4"),
        ({"group": 0}, "Group must be"),
        ({"group": "channel"}, "Group must be"),
        ({"activation_bits": 1}, "activation_bits"),
    ],
)
def test_bad_configurations_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        SVDQuant(**fields)  # type: ignore[arg-type]
