"""Denoisers quantized by real backends, one function per backend and format.

Each takes a denoiser and gives a quantized copy; ``skip`` names layers that stay plain. Imports are
inside: a backend that is not installed is somebody else's business until it is asked for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def linears(model: nn.Module, skip: tuple[str, ...] = ()) -> list[tuple[str, nn.Linear]]:
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not any(part in name for part in skip)
    ]


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module], skip: Any) -> nn.Module:
    """A copy with every linear layer exchanged."""
    model = copy.deepcopy(model)
    for name, layer in linears(model, skip):
        model.set_submodule(name, make(layer))
    return model.eval()


# ---- torchao


def _torchao(model: nn.Module, config: Any, skip: tuple[str, ...]) -> nn.Module:
    from torchao.quantization import quantize_

    model = copy.deepcopy(model)
    kept = dict(linears(model, skip))
    quantize_(model, config, lambda module, name: name in kept)
    return model.eval()


def torchao_int8(model: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(model, Int8WeightOnlyConfig(), skip)


def torchao_int8_dynamic(model: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(model, Int8DynamicActivationInt8WeightConfig(), skip)


def torchao_int4(model: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    return _torchao(model, config, skip)


def torchao_fake_w3a4(model: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int3, group_size=16),
        step="prepare",
    )
    return _torchao(model, config, skip)


# ---- bitsandbytes


def _without_repacking(layer: Any) -> Any:
    # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first call and rounds their
    # scales to bfloat16, and asserts on widths that its tiles do not divide. Other CPUs do not.
    layer.support_avx512bf16_for_cpu = False
    return layer


def bitsandbytes_4bit(
    model: nn.Module, skip: tuple[str, ...] = (), *, kind: str, repacking: bool = False
) -> nn.Module:
    import bitsandbytes as bnb

    def make(layer: nn.Linear) -> nn.Module:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=layer.weight.dtype, quant_type=kind)
        data = layer.weight.detach().clone()
        # Its CPU kernel takes wrong scales where the block does not divide the width (64 and 96).
        block = {"quant_type": kind, "blocksize": 32}
        new.weight = bnb.nn.Params4bit(data, requires_grad=False, module=new, **block)
        new.bias = layer.bias
        return new.to("cpu") if repacking else _without_repacking(new.to("cpu"))

    return replaced(model, make, skip)


def bitsandbytes_int8(model: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    import bitsandbytes as bnb

    def make(layer: nn.Linear) -> nn.Module:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        data = layer.weight.detach().clone()
        new.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        return new.to("cpu")

    return replaced(model, make, skip)


# ---- gguf


def _gguf(model: nn.Module, skip: tuple[str, ...] = (), *, kind: str) -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    what = gguf.GGMLQuantizationType[kind]

    def make(layer: nn.Linear) -> nn.Module:
        data = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), what))
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        new = GGUFLinear(*sizes, compute_dtype=torch.float32)
        new.weight = GGUFParameter(data, quant_type=what)
        new.bias = layer.bias
        return new

    return replaced(model, make, skip)


# ---- optimum-quanto


def quanto_unpacked(packed: Tensor, bits: int) -> Tensor:
    """What quanto's extension computes."""
    return torch.cat([(packed >> low) & (2**bits - 1) for low in range(0, 8, bits)])


def _quanto(model: nn.Module, skip: tuple[str, ...] = (), *, kind: str) -> nn.Module:
    from optimum import quanto
    from optimum.quanto.library.extensions import get_extension

    # Its own is compiled at first use, for a minute and a half; tests/hosts/test_backends.py compares.
    get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=quanto_unpacked)
    model = copy.deepcopy(model)
    exclude = [f"*{part}*" for part in skip] or None
    quanto.quantize(model, weights=quanto.qtypes[kind], exclude=exclude)
    quanto.freeze(model)
    return model.eval()


# ---- sdnq


def _sdnq(model: nn.Module, skip: tuple[str, ...] = (), **options: Any) -> nn.Module:
    from sdnq import sdnq_post_load_quant

    model = copy.deepcopy(model)
    options = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0, **options}
    kept = [name for name, _ in linears(model) if any(part in name for part in skip)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # its singular values are estimated from random vectors
        model = sdnq_post_load_quant(
            model, modules_to_not_convert=kept, add_skip_keys=False, **options
        )
    return model.eval()


# ---- comfy-kitchen


def _comfy_kitchen(
    model: nn.Module, skip: tuple[str, ...] = (), *, layout: str, divides: int = 1, **options: Any
) -> nn.Module:
    """Layers whose inputs ``divides`` divides."""
    from comfy_kitchen.tensor import QuantizedTensor

    def weight(layer: nn.Linear) -> Tensor:
        found: Tensor = QuantizedTensor.from_float(layer.weight.detach(), layout, **options)
        return found

    model = copy.deepcopy(model)
    for _, layer in linears(model, skip):
        if layer.in_features % divides == 0:
            layer.weight = nn.Parameter(weight(layer), requires_grad=False)
    return model.eval()


# ---- ModelOpt


def modelopt_w3a4(
    model: nn.Module, skip: tuple[str, ...] = (), *, run: Callable[[nn.Module], Any], rank: int = 0
) -> nn.Module:
    """``run`` calls the denoiser once, as ModelOpt's calibration needs it."""
    import modelopt.torch.quantization as mtq

    weight = {"num_bits": 3, "block_sizes": {-1: 16}}
    activation = {"num_bits": 4, "block_sizes": {-1: 16}, "type": "dynamic"}
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": True},
        {"quantizer_name": "*input_quantizer", "cfg": activation, "enable": True},
        *({"quantizer_name": f"*{part}*", "enable": False} for part in skip),
    ]
    algorithm: Any = {"method": "svdquant", "lowrank": rank} if rank else "max"
    model = copy.deepcopy(model)
    mtq.quantize(model, {"quant_cfg": rules, "algorithm": algorithm}, forward_loop=run)
    return free_of_shapes(model).eval()


def free_of_shapes(model: nn.Module) -> nn.Module:
    """Let ModelOpt's block quantizers take another batch, resolution or prompt length than before.

    They keep the shape of their first input and refuse any other; here they forget it before each.
    """

    def forget(quantizer: nn.Module, arguments: Any) -> None:
        for key in ("_original_shape", "_block_reshape_size", "_padding", "_slices"):
            quantizer.__dict__.pop(key, None)

    for name, module in model.named_modules():
        if name.endswith("input_quantizer"):
            module.register_forward_pre_hook(forget)
    return model


Builder = Callable[..., nn.Module]
_ROTATED = {"convrot_groupsize": 16, "divides": 16}  # 256 where it divides the width

#: package to import, and how to quantize with it.
BACKENDS: dict[str, tuple[str, Builder]] = {
    "torchao int8": ("torchao", torchao_int8),
    "torchao int8 dynamic": ("torchao", torchao_int8_dynamic),
    "torchao int4": ("torchao", torchao_int4),
    "torchao fake w3a4": ("torchao", torchao_fake_w3a4),
    "bitsandbytes int8": ("bitsandbytes", bitsandbytes_int8),
    "bitsandbytes nf4": ("bitsandbytes", functools.partial(bitsandbytes_4bit, kind="nf4")),
    "bitsandbytes fp4": ("bitsandbytes", functools.partial(bitsandbytes_4bit, kind="fp4")),
    "gguf Q8_0": ("gguf", functools.partial(_gguf, kind="Q8_0")),
    "gguf Q5_0": ("gguf", functools.partial(_gguf, kind="Q5_0")),
    "gguf Q4_0": ("gguf", functools.partial(_gguf, kind="Q4_0")),
    "quanto qint8": ("optimum.quanto", functools.partial(_quanto, kind="qint8")),
    "quanto qint4": ("optimum.quanto", functools.partial(_quanto, kind="qint4")),
    "sdnq int8": ("sdnq", functools.partial(_sdnq, weights_dtype="int8", group_size=-1)),
    "sdnq int4": ("sdnq", functools.partial(_sdnq, weights_dtype="int4", group_size=16)),
    "sdnq uint4 svd": (
        "sdnq",
        functools.partial(_sdnq, weights_dtype="uint4", group_size=16, use_svd=True, svd_rank=4),
    ),
    "modelopt w3a4": ("modelopt", modelopt_w3a4),
    **{
        f"comfy-kitchen {name}": (
            "comfy_kitchen",
            functools.partial(_comfy_kitchen, layout=layout, **options),
        )
        for name, layout, options in (
            ("int8", "TensorWiseINT8Layout", {"per_channel": True}),
            (
                "int8 rotated",
                "TensorWiseINT8Layout",
                {**_ROTATED, "per_channel": True, "convrot": True},
            ),
            ("fp8", "TensorCoreFP8Layout", {}),
            ("nvfp4", "TensorCoreNVFP4Layout", {}),
            ("mxfp8", "TensorCoreMXFP8Layout", {}),
            ("w4a8", "AsymW4A8Int8Layout", _ROTATED),
        )
    },
}

#: For widths that 64 divides, which those of the embedded pipeline are not.
WIDE: dict[str, tuple[str, Builder]] = {
    "comfy-kitchen w4a4": (
        "comfy_kitchen",
        functools.partial(
            _comfy_kitchen, layout="TensorCoreConvRotW4A4Layout", convrot_groupsize=64, divides=64
        ),
    )
}
