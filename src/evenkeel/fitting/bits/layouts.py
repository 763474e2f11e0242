"""Formats per layer of other backends, and the file in which each takes them."""

from __future__ import annotations

import copy
import importlib
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.fitting.bits.families import BITS, GROUPS, Family
from evenkeel.hosts.backends.catalogue import bytes_of
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest


class _Layout(Family):
    """Linear layers alone, weights alone, as the backend's own package rounds them."""

    package: str

    def __init__(self, base: RoundToNearest) -> None:
        super().__init__(base)
        if (base.activation_bits, base.rank, base.rounding) != (16, 0, "nearest"):
            raise QuantizationError(
                f"a layout for {self.name} says how weights are stored, and the backend rounds them: "
                "expected activation_bits 16, rank 0 and rounding 'nearest', got "
                f"{base.activation_bits}, {base.rank} and {base.rounding!r}."
            )
        try:
            importlib.import_module(self.package)
        except ImportError as e:
            raise QuantizationError(
                f"what {self.name} makes of a weight is found by asking it, and {self.package} is not "
                "installed: pip install 'evenkeel[backends]'."
            ) from e

    def bytes_of(self, built: Any, choice: str) -> int:
        bias = getattr(built, "bias", None)
        return bytes_of(built) - (0 if bias is None else bias.numel() * bias.element_size())


class GGUF(_Layout):
    """One type of block per tensor: those that the gguf package can make, without K types.

    The file has a line ``pattern=type`` for every tensor with two or more axes: ``llama-quantize
    --tensor-type-file``, or joined by commas stable-diffusion.cpp's ``--tensor-type-rules``. Names are
    those of the diffusers class; whoever renames tensors on the way renames them here.
    """

    name, file, package = "gguf", "tensor-types.txt", "gguf"
    types = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")

    def choices(self, layer: nn.Module) -> list[str]:
        fits = type(layer) is nn.Linear and layer.in_features % 32 == 0
        return list(self.types) if fits else []

    def build(self, name: str, layer: nn.Module, choice: str) -> Any:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        kind = gguf.GGMLQuantizationType[choice.upper()]
        weight = layer.get_parameter("weight").detach()
        blocks = torch.from_numpy(gguf.quants.quantize(weight.float().cpu().numpy(), kind))
        new: Any = GGUFLinear(
            weight.shape[1],
            weight.shape[0],
            layer.bias is not None,
            compute_dtype=weight.dtype,
            device="meta",
        )
        new.weight = GGUFParameter(blocks.to(weight.device), quant_type=kind)
        new.bias = layer.bias
        return new.requires_grad_(False)

    def written(self, denoiser: nn.Module, choices: Mapping[str, str]) -> str:
        lines = []
        for name, tensor in denoiser.named_parameters():
            kind = choices.get(name.removesuffix(".weight"))
            if tensor.ndim > 1:
                lines.append(f"^({_PREFIX})?{re.escape(name)}$={kind or 'f16'}")
        return "\n".join(lines) + "\n"


class TorchAO(_Layout):
    """``int4-g32``: torchao's ``IntxWeightOnlyConfig`` of every layer, in one ``FqnToConfig``.

    The file is what ``torchao.core.config.config_from_dict`` reads; ``quantize_(model, config, None)`` or
    ``TorchAoConfig(config)`` of diffusers applies it. Until an engine packs them torchao keeps these codes
    in int8: bytes here are of packed codes and 16-bit scales.
    """

    name, file, package = "torchao", "torchao.json", "torchao"

    def choices(self, layer: nn.Module) -> list[str]:
        if type(layer) is not nn.Linear:
            return []
        return [f"int{b}-g{g}" for b in BITS for g in GROUPS if layer.in_features % g == 0]

    def config(self, choice: str) -> Any:
        """What torchao does with one layer."""
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        bits, group = choice.split("-g")
        return IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, bits), granularity=PerGroup(int(group))
        )

    def build(self, name: str, layer: nn.Module, choice: str) -> Any:
        from torchao.quantization import quantize_

        new = nn.Sequential(copy.deepcopy(layer).requires_grad_(False))
        quantize_(new, self.config(choice))
        return new[0]

    def bytes_of(self, built: Any, choice: str) -> int:
        group = int(choice.split("-g")[1])
        count = int(built.out_features) * int(built.in_features)
        return -(-count * self.bits_of(choice) // 8) + 2 * count // group

    def written(self, denoiser: nn.Module, choices: Mapping[str, str]) -> str:
        from torchao.core.config import config_to_dict
        from torchao.quantization import FqnToConfig

        found = FqnToConfig({name: self.config(choice) for name, choice in choices.items()})
        return json.dumps(config_to_dict(found), indent=1) + "\n"


class SDNQ(_Layout):
    """``uint4-g32``: sdnq's weight type and group size of every layer.

    The file has the keywords of ``sdnq.SDNQConfig`` and ``sdnq.sdnq_post_load_quant``.
    """

    name, file, package = "sdnq", "sdnq.json", "sdnq"

    def choices(self, layer: nn.Module) -> list[str]:
        if type(layer) is not nn.Linear:
            return []
        return [f"uint{b}-g{g}" for b in BITS for g in GROUPS if layer.in_features % g == 0]

    def build(self, name: str, layer: nn.Module, choice: str) -> Any:
        from sdnq import sdnq_post_load_quant

        net = nn.Sequential(copy.deepcopy(layer).requires_grad_(False))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            sdnq_post_load_quant(net, **_SDNQ, **self._how(choice))
        return net[0]

    def weight(self, built: Any, dtype: torch.dtype) -> Tensor:
        # Asked by one-hot inputs, every type and shape would be compiled first.
        parts = {k: v for k, v in built.named_parameters(recurse=False) if k != "bias"}
        found: Tensor = built.sdnq_dequantizer(**parts, skip_compile=True, dtype=torch.float32)
        return found

    def _how(self, choice: str) -> dict[str, Any]:
        kind, group = choice.split("-g")
        return {"weights_dtype": kind, "group_size": int(group)}

    def written(self, denoiser: nn.Module, choices: Mapping[str, str]) -> str:
        kept = [
            f"{name}.weight"
            for name, module in denoiser.named_modules()
            if name and name not in choices and "weight" in module._parameters
        ]
        each = {f"{name}.weight": self._how(c) for name, c in choices.items()}
        common = max(sorted(set(choices.values())), key=[*choices.values()].count)
        found = {
            **_SDNQ,
            **self._how(common),
            "modules_to_not_convert": kept,
            "modules_quant_config": each,
        }
        return json.dumps(found, indent=1) + "\n"


_PREFIX = r"model\.diffusion_model\."  # of a denoiser's tensors, in stable-diffusion.cpp
# Nothing is left out for its size, or for its name.
_SDNQ: dict[str, Any] = {
    "add_skip_keys": False,
    "minimum_allowed_numel": 0,
    "minimum_allowed_channel_size": 0,
}


LAYOUTS: dict[str, type[Family]] = {kind.name: kind for kind in (GGUF, TorchAO, SDNQ)}
