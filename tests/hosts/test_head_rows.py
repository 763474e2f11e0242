"""Rows that enter a head, and what its layer may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_layers import (
    d,
    noise,
    on_meta,
    seen,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.actuators.head_rows import Head, outputs_as_rows, rows_as_outputs, rows_of
from evenkeel.hosts.actuators.heads import find_head, is_plain, is_reordered, layer_of
from evenkeel.quantizers.methods.spec import QuantizerSpec

# ---- rows


def _of(layer: nn.Module) -> Head:
    return find_head(nn.ModuleDict({"conv_out": layer}))


_PADDINGS = ["zeros", "reflect", "replicate", "circular"]
_PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    kernel=_PAIR,
    stride=_PAIR,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    mode=st.sampled_from(_PADDINGS),
    bias=st.booleans(),
)
def test_rows_of_a_convolution_times_its_weight_are_the_convolution(
    kernel, stride, dilation, padding, mode, bias
):
    geometry = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}
    layer = nn.Conv2d(3, 5, kernel, **geometry, bias=bias, dtype=torch.float64)
    _matches(layer, noise(2, 3, 7, 6).double())


# torch says that it copies; the result is what counts here.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", _PADDINGS)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(1, 4), (3, 2)])
def test_padding_by_name(kernel, padding, mode):
    geometry = {"padding": padding, "padding_mode": mode, "dilation": (2, 1)}
    layer = nn.Conv2d(3, 5, kernel, **geometry, dtype=torch.float64)
    _matches(layer, noise(2, 3, 7, 6).double())


def test_points_of_three_axes():
    _matches(nn.Conv3d(3, 5, 1, dtype=torch.float64), noise(2, 3, 2, 4, 5).double())


def _matches(layer: Any, h: Tensor) -> None:
    head = _of(layer)
    assert head.has_bias == (layer.bias is not None)
    with torch.no_grad():
        out = layer(h)
        rows = rows_of(head, layer, h) @ layer.weight.flatten(1).T
    rows = rows if layer.bias is None else rows + layer.bias.detach()
    assert rows.shape[-1] == head.targets
    torch.testing.assert_close(rows, outputs_as_rows(head, out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows_as_outputs(head, rows, out), out, rtol=1e-12, atol=1e-12)


def test_the_order_of_features_matters():
    """The companion: rows in another order do not reproduce the convolution."""
    layer = nn.Conv2d(3, 5, 3, bias=False)
    head, h = _of(layer), noise(2, 3, 6, 6)
    rows = rows_of(head, layer, h).unflatten(-1, (3, 9)).transpose(-1, -2).flatten(-2)
    wrong = rows_as_outputs(head, (rows @ layer.weight.flatten(1).T).detach(), layer(h))
    assert (wrong - layer(h)).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(2, 8), (2, 7, 8), (2, 3, 4, 5, 8)])
def test_tokens_of_any_number_of_axes(shape):
    layer = nn.Linear(8, 3)
    head, h = _of(layer), noise(*shape)
    rows, out = rows_of(head, layer, h), layer(h)
    assert rows.shape == (2, h[0].numel() // 8, 8)
    assert torch.equal(rows_as_outputs(head, outputs_as_rows(head, out), out), out)
    torch.testing.assert_close(rows_as_outputs(head, layer(rows), out), out)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_round_trip_of_rows_and_outputs(kind):
    head = Head("x", kind, 9, 3, True, (0, 1, 2))
    out = noise(2, 3, 4, 3)  # three columns on either axis
    rows = outputs_as_rows(head, out)
    assert rows.shape == (2, 12, 3)
    assert torch.equal(rows_as_outputs(head, rows, out), out)
    other = {"linear": "convolution", "convolution": "linear"}[kind]
    assert not torch.equal(rows, outputs_as_rows(Head("x", other, 9, 3, True, ()), out))


def test_dtype_is_kept():
    layer = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.bfloat16)
    assert rows_of(_of(layer), layer, noise(1, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


# ---- layers of other makes


class _Packed:
    """A layer as a quantization backend may write it: sizes, and no weight of that shape."""

    @staticmethod
    def linear() -> nn.Module:
        layer = nn.Module()
        layer.in_features, layer.out_features, layer.bias = 8, 4, None
        return layer

    @staticmethod
    def convolution() -> nn.Module:
        layer = nn.Module()
        layer.in_channels, layer.out_channels, layer.kernel_size = 8, 4, 3
        layer.stride, layer.padding, layer.dilation, layer.padding_mode = 1, 1, 1, "zeros"
        return layer


def test_quantized_layers_are_heads_and_not_plain():
    spec = QuantizerSpec(8, 8)
    linear = spec.layer(nn.Linear(32, 4))
    convolution = spec.layer(nn.Conv2d(4, 6, 3, padding=1))
    assert _of(linear) == Head("conv_out", "linear", 32, 4, True, (0, 1, 2, 3))
    assert _of(convolution) == Head("conv_out", "convolution", 36, 6, True, tuple(range(6)))
    assert rows_of(_of(convolution), convolution, noise(1, 4, 5, 5)).shape == (1, 25, 36)
    assert not is_plain(linear) and not is_plain(convolution)


def test_layers_that_only_know_their_sizes():
    linear, convolution = _Packed.linear(), _Packed.convolution()
    assert _of(linear) == Head("conv_out", "linear", 8, 4, False, (0, 1, 2, 3))
    assert _of(convolution) == Head("conv_out", "convolution", 72, 4, False, (0, 1, 2, 3))
    rows = rows_of(_of(convolution), convolution, noise(2, 8, 5, 5))
    expected = F.unfold(noise(2, 8, 5, 5), 3, padding=1).transpose(1, 2)
    assert torch.equal(rows, expected)
    assert not is_plain(linear)


class _SubclassedLinear(nn.Linear):
    pass


class _SubclassedParameter(nn.Parameter):
    pass


def _with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(weight) if type(weight) is Tensor else weight
    return layer


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 4), nn.Linear(8, 4, bias=False), nn.Conv2d(3, 4, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_layers(layer, dtype):
    assert is_plain(layer.to(dtype))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.Linear(8, 4, device="meta"),
        _SubclassedLinear(8, 4),
        _with_weight(_SubclassedParameter(torch.zeros(4, 8))),
        _with_weight(torch.zeros(4, 8).to(torch.float8_e4m3fn)),
        _with_weight(torch.zeros(4, 8).to_sparse()),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)),
    ],
)
def test_layers_that_cannot_be_overwritten(layer):
    assert not is_plain(layer)


# What torch.compile imports when it is first called.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_compiled_denoisers_and_layers_are_looked_through():
    model = nn.ModuleDict({"proj_out": nn.Linear(8, 4)})
    head = find_head(torch.compile(model))
    assert head == find_head(model)
    assert layer_of(torch.compile(model), head) is model["proj_out"]
    wrapped = nn.ModuleDict({"proj_out": torch.compile(model["proj_out"])})
    assert find_head(wrapped) == head
    assert layer_of(wrapped, head) is model["proj_out"]


# ---- is the output only reordered?


def test_reordered_means_the_same_values():
    out = noise(2, 6, 4)
    assert is_reordered(out, out.flip(1).transpose(1, 2).double())
    assert is_reordered(out, out[:, 2:])
    assert not is_reordered(out, out + 1e-3)
    assert not is_reordered(out, out.tanh()[:, 2:])
    assert not is_reordered(out, out[:, :1].expand(2, 6, 4))  # each value there, but not as often


def test_an_output_that_is_changed_afterwards_shows():
    """What a name given by the user cannot be checked for, one call can."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "norm_num_groups": 4}
    model = d.TransformerTemporalModel(in_channels=16, **sizes).eval()
    layer = layer_of(model, find_head(model, "proj_out"))
    _, out, prediction = seen(layer, lambda: model(noise(2, 16, 4, 4), num_frames=2).sample)
    assert prediction.numel() == out.numel()
    assert not is_reordered(out, prediction)


def test_stable_cascade_only_shuffles_pixels():
    last = on_meta("StableCascadeUNet").clf
    assert [type(part) for part in last][1:] == [nn.Conv2d, nn.PixelShuffle]
    out = noise(2, 16, 3, 3)
    assert is_reordered(out, nn.PixelShuffle(2)(out))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"time_embedding_type": "fourier"}, "divides"),
        ({"up_block_types": ("SkipUpBlock2D",) * 4}, "skip connection"),
    ],
)
def test_configurations_that_change_the_output(config, reason):
    with torch.device("meta"), pytest.raises(UnsupportedPipeline, match=reason):
        find_head(d.UNet2DModel(**config))


# ---- errors


def test_no_head():
    with pytest.raises(UnsupportedPipeline, match=r"components are 0, 1\. Name the last layer"):
        find_head(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    with pytest.raises(UnsupportedPipeline, match="components are none"):
        find_head(nn.Module())


def test_several_heads():
    both = nn.ModuleDict({"proj_out": nn.Linear(8, 4), "final_linear": nn.Linear(8, 4)})
    with pytest.raises(UnsupportedPipeline, match="several layers could be it: proj_out, final"):
        find_head(both)
    assert find_head(both, "final_linear").name == "final_linear"


def test_several_final_layers_of_z_image():
    with torch.device("meta"):
        sizes = {"all_patch_size": (2, 4), "all_f_patch_size": (1, 1), "n_layers": 1}
        model = d.ZImageTransformer2DModel(**sizes)
    with pytest.raises(UnsupportedPipeline, match=r"several .* all_final_layer\.4-1\.linear"):
        find_head(model)
    assert find_head(model, "all_final_layer.4-1.linear").targets == 16 * 16


@pytest.mark.parametrize(("name", "found"), [("nowhere.at_all", "not in it"), ("act", "a ReLU")])
def test_a_name_that_is_no_layer(name, found):
    model = nn.ModuleDict({"proj_out": nn.Linear(8, 4), "act": nn.ReLU()})
    with pytest.raises(UnsupportedPipeline, match=f"'{name}' is {found}"):
        find_head(model, name)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 4, 3, groups=2), "in 2 groups"),
        (nn.ConvTranspose2d(8, 4, 3), "transposed"),
        (nn.Conv1d(8, 4, 1), "over 1 axes"),
        (nn.Conv3d(8, 4, 3), r"over 3 axes with kernel \(3, 3, 3\)"),
        (nn.Conv3d(8, 4, 1, stride=2), "over 3 axes"),
        (nn.Conv3d(8, 4, 1, padding=1), "over 3 axes"),
    ],
)
def test_convolutions_that_have_no_rows(layer, reason):
    with pytest.raises(UnsupportedPipeline, match=reason):
        _of(layer)


def test_a_layer_that_another_denoiser_does_not_have():
    with pytest.raises(UnsupportedPipeline, match="no layer called 'proj_out'"):
        layer_of(nn.ReLU(), Head("proj_out", "linear", 8, 4, True, ()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 4), (2, 5, 7)),
        (nn.Linear(8, 4), (8,)),
        (nn.Conv2d(3, 4, 3), (2, 4, 8, 8)),
        (nn.Conv2d(3, 4, 3), (3, 8, 8)),
        (nn.Conv3d(3, 4, 1), (2, 3, 8, 8)),
    ],
)
def test_inputs_that_do_not_fit(layer, shape):
    with pytest.raises(UnsupportedPipeline, match="its input is"):
        rows_of(_of(layer), layer, torch.zeros(shape))


def test_outputs_that_do_not_fit():
    head = Head("proj_out", "linear", 8, 4, True, (0, 1, 2, 3))
    with pytest.raises(UnsupportedPipeline, match="gives 4 values along axis -1"):
        outputs_as_rows(head, torch.zeros(2, 4, 5))
    with pytest.raises(UnsupportedPipeline, match=r"holds rows \(2, 5, 4\); got \(2, 6, 4\)"):
        rows_as_outputs(head, torch.zeros(2, 6, 4), torch.zeros(2, 5, 4))
