"""What diffusers' own ``save_pretrained`` writes of a quantized denoiser, and how it loads it again.

The weights are written as they are in memory (``save_quantized`` writes packed codes), each layer's grid and
scales beside them, and a description of all layers into ``config.json``. Without this library diffusers
refuses the folder: it knows no quantization method of this name.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.quantized_layers import EXTRA, QuantizedLayer
from evenkeel.quantizers.layers.replacing import swap
from evenkeel.quantizers.layers.timed_inputs import TimedInput
from evenkeel.quantizers.layers.told_timestep import tell
from evenkeel.quantizers.saved.layer_files import read_layer
from evenkeel.quantizers.saved.report import QuantizationReport, attach

VERSION = 1
_ACTIVATION = "activation."


class Method(str, Enum):
    """The name in ``config.json``, as diffusers compares and prints it."""

    EVENKEEL = "evenkeel"

    def __str__(self) -> str:
        return self.value


class EvenkeelConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` holds under ``quantization_config``.

    Args:
        layers: by name, the rounding of the input, and the shapes of all tensors.
        report: of the quantization.
        version: of this format.
        quant_method: ``evenkeel``.

    Raises:
        QuantizationError: another version.

    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        report: Mapping[str, Any],
        version: int = VERSION,
        quant_method: str = Method.EVENKEEL,
    ) -> None:
        if version != VERSION or quant_method != Method.EVENKEEL:
            raise QuantizationError(
                f"expected quantization_config of evenkeel, version {VERSION}; found {quant_method}, "
                f"{version}. Use the version of evenkeel that it was saved with."
            )
        self.quant_method = Method.EVENKEEL
        self.version, self.layers, self.report = version, dict(layers), dict(report)

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {**vars(self), "quant_method": self.quant_method.value}

    def __repr__(self) -> str:
        return f"EvenkeelConfig({len(self.layers)} layers, {self.report.get('quantizer')})"

    @classmethod
    def of(cls, module: nn.Module, report: QuantizationReport) -> EvenkeelConfig:
        """Of a quantized network as it is now."""
        parts = {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLayer)}
        layers = {
            name: {
                "activation": None if layer.activation is None else layer.activation.as_dict(),
                "tensors": {n: list(t.shape) for n, t in layer.named_buffers()},
            }
            for name, layer in parts.items()
        }
        return cls(layers, report.as_dict())


class EvenkeelQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Hangs on a quantized network as ``hf_quantizer``, where diffusers looks for it."""

    use_keep_in_fp32_modules = False

    def __init__(self, quantization_config: EvenkeelConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.module: Any = None

    @classmethod
    def on(cls, module: nn.Module) -> EvenkeelQuantizer:
        """One that is to hang on this network."""
        found = cls(EvenkeelConfig({}, {}))
        found.module = module
        return found

    @property
    def is_serializable(self) -> bool:
        """Asked when saving begins: the configuration is brought up to what the network is by now.

        Raises:
            QuantizationError: adapters hang beside its layers, or it carries no report.

        """
        config = EvenkeelConfig.of(self.module, _checked_report(self.module))
        self.module.register_to_config(quantization_config=config)
        self.quantization_config = config
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the layers are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Its layers are ordinary ones to torch.compile."""
        return True

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """What is no tensor of a layer but says what these tensors mean."""
        return param_name.endswith(f".{EXTRA}")

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Hand the description to its layer."""
        layer = model.get_submodule(param_name.removesuffix(f".{EXTRA}"))
        assert isinstance(layer, QuantizedLayer)
        layer.set_description(param_value)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        raise QuantizationError(
            f"the full-precision weights of this {type(model).__name__} are not in it: rounding has no "
            f"inverse. Load the network that was quantized."
        )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, found in self.quantization_config.layers.items():
            try:
                old = model.get_submodule(name)
                swap(model, old, _empty(found, old))
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                raise QuantizationError(
                    f"config.json describes a quantized layer {name!r} that does not fit this "
                    f"{type(model).__name__}: {e}. Use the diffusers version that it was saved with."
                ) from e

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, part in model.named_modules():
            if isinstance(part, QuantizedLayer) and any(t.is_meta for t in part.buffers()):
                raise QuantizationError(
                    f"the folder lacks tensors of the quantized layer {name!r}; save the model again."
                )
        if any(isinstance(part, TimedInput) for part in model.modules()):
            tell(model)
        self.module = model
        attach(QuantizationReport.from_dict(self.quantization_config.report), model)


def register() -> None:
    """Let diffusers load what it saved of this library's quantized networks."""
    auto.AUTO_QUANTIZER_MAPPING[Method.EVENKEEL.value] = EvenkeelQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.EVENKEEL.value] = EvenkeelConfig


register()


def _checked_report(module: nn.Module) -> QuantizationReport:
    found = getattr(module, "evenkeel_report", None)
    if not isinstance(found, QuantizationReport):
        raise QuantizationError(
            f"this {type(module).__name__} has quantized layers and carries no report; save what "
            "quantize_module or quantize returned, or a copy of it."
        )
    if any(hasattr(part, "base_layer") for part in module.modules()):
        raise QuantizationError(
            f"this {type(module).__name__} has adapters beside its layers, which would change the names of "
            "all tensors: save them by themselves (save_lora_weights, save_lora_adapter), take them off "
            "(unload_lora_weights, delete_adapters) and save the network then."
        )
    return found


def _empty(found: Mapping[str, Any], like: nn.Module) -> QuantizedLayer:
    """A layer of this description whose tensors are still to come."""
    tensors = {
        # Scales are checked where a layer is made; ones are scales.
        name: torch.ones(shape)
        if name.startswith(_ACTIVATION)
        else torch.empty(shape, device="meta")
        for name, shape in found["tensors"].items()
    }
    description = {"weight": {"grid": None}, "activation": found["activation"]}
    return read_layer(description, tensors, like).to("meta")
