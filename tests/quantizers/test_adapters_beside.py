"""peft and diffusers put LoRAs beside simulated layers; fusing one into a rounded weight is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from made_adapters import made_adapters
from tiny_pipelines import ALL, generate
from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.fitting.adapters.effective_weight import effective_weight, rounds_inputs
from evenkeel.hosts.actuators.beside import with_adapters
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.quantizers.layers.input_quantizers import StaticInput
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
)
from evenkeel.quantizers.layers.timed_inputs import TimedInput
from evenkeel.record.lora_file import FILE, peft_files, write_lora

SPECS = ("w3a16-g16", "w3a4-g16-r4")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_diffusers_adds_beside_quantized_layers_and_will_not_fuse(tmp_path, name, spec):
    tiny = ALL[name]()
    adapters = made_adapters(tiny.model, type(tiny.pipe).__name__, denoiser=tiny.denoiser)
    write_lora(adapters, tmp_path / FILE)
    quantized = quantize_module(tiny.model, QuantizerSpec.parse(spec))[0]
    kinds = {type(layer) for layer in quantized.modules()}
    assert kinds >= ({QuantizedLinear, QuantizedConv2d} if name == "sdxl" else {QuantizedLinear})
    setattr(tiny.pipe, tiny.denoiser, quantized)
    plain = generate(tiny, steps=2)
    layers = [(n, m) for n, m in quantized.named_modules() if isinstance(m, QuantizedLayer)]
    before = {name: layer.weight.clone() for name, layer in layers}
    with with_adapters(quantized, adapters):
        ours = generate(tiny, steps=2)
    tiny.pipe.load_lora_weights(tmp_path)
    theirs = generate(tiny, steps=2)
    assert (theirs - ours).norm() < 1e-4 * (ours - plain).norm()
    for safely in (False, True):
        with pytest.raises(QuantizationError, match="beside the layer"):
            tiny.pipe.fuse_lora(safe_fusing=safely)
        rounded = (m for m in quantized.modules() if hasattr(m, "base_layer"))
        assert not any(m.merged for m in rounded if isinstance(m.base_layer, QuantizedLayer))
        with pytest.warns(UserWarning, match="Already unmerged"):
            tiny.pipe.unfuse_lora()  # of layers that are not quantized
        assert (generate(tiny, steps=2) - theirs).norm() < 1e-4 * (theirs - plain).norm()
    tiny.pipe.unload_lora_weights()
    assert (generate(tiny, steps=2) - plain).norm() < 1e-4 * (theirs - plain).norm()
    after = {n: m.weight for n, m in quantized.named_modules() if isinstance(m, QuantizedLayer)}
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


def test_peft_adds_and_will_not_merge(tmp_path):
    from peft import PeftModel

    tiny = ALL["dit"]()
    for name, content in peft_files(made_adapters(tiny.model, "DiTPipeline")).items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a16-g16"))[0]
    model = PeftModel.from_pretrained(quantized, tmp_path)
    with pytest.raises(QuantizationError, match="lies on no grid"):
        model.merge_and_unload()
    with pytest.raises(QuantizationError, match="lies on no grid"):
        model.merge_adapter()


def test_a_weight_reads_like_any_tensor_and_the_layer_is_what_it_was():
    layer = QuantizedLinear(torch.arange(24.0).reshape(3, 8), torch.ones(3))
    x = torch.ones(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad[0], layer.weight.sum(0))
    assert type(layer.weight * 1) is torch.Tensor
    state = layer.state_dict()
    assert type(state["weight"]) is torch.Tensor
    again = copy.deepcopy(layer).to(torch.float64)
    assert again.weight.dtype == torch.float64
    layer.weight.data.zero_()  # a copy
    assert torch.equal(layer.weight, torch.arange(24.0).reshape(3, 8))
    convolution = QuantizedConv2d(nn.Conv2d(4, 6, 3, padding=1), torch.ones(6, 4, 3, 3))
    assert isinstance(copy.deepcopy(convolution), nn.Conv2d)
    assert type(QuantizedConv2d(4, 2, 3, 1, 1, bias=False)) is nn.Conv2d


@pytest.mark.parametrize("kind", ["static", "timed"])
def test_a_weight_behind_a_range_fixed_beforehand_is_found_whole(kind):
    scale, zero = torch.tensor([0.01, 0.02]), torch.tensor([8.0, 8.0])
    made = {
        "static": StaticInput(4, scale[:1], zero[:1]),
        "timed": TimedInput(4, (900.0, 100.0), scale, zero),
    }[kind]
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear(weight, torch.ones(3), activation=made)
    # A one in the input is far outside of what such a range holds, and outside of a denoiser no step is told.
    torch.testing.assert_close(effective_weight(layer), weight)
    assert rounds_inputs(layer)
    assert layer.activation is made
    assert not rounds_inputs(QuantizedLinear(weight, torch.ones(3)))
