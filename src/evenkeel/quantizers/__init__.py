"""Reference quantizers: exact about what the integers can say, indifferent to speed.

``quantize_module`` is plain rounding with an optional low-rank branch: a known quantization error
without calibration data. The methods of the literature each have a file named after them and a class
in :data:`evenkeel.quantizers.methods.catalogue.METHODS`; ``evenkeel.quantize`` runs them on a pipeline.
"""

from __future__ import annotations

from evenkeel.quantizers.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.methods.apply import quantize_module
from evenkeel.quantizers.methods.base import Method
from evenkeel.quantizers.methods.catalogue import METHODS
from evenkeel.quantizers.methods.mixdq import MixDQ
from evenkeel.quantizers.methods.ptq4dit import PTQ4DiT
from evenkeel.quantizers.methods.q_diffusion import QDiffusion
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.methods.spec import DEFAULT_SKIP, QuantizerSpec
from evenkeel.quantizers.methods.svdquant import SVDQuant
from evenkeel.quantizers.methods.vidit_q import ViDiTQ
from evenkeel.quantizers.numbers.uniform import fake_quantize, quantize_weight, scale_of
from evenkeel.quantizers.rounding.low_rank import best_low_rank
from evenkeel.quantizers.saved.folder import load_quantized, save_quantized
from evenkeel.quantizers.saved.report import LayerReport, QuantizationReport

__all__ = [
    "DEFAULT_SKIP",
    "METHODS",
    "LayerReport",
    "Method",
    "MixDQ",
    "PTQ4DiT",
    "QDiffusion",
    "QuantizationReport",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizerSpec",
    "RoundToNearest",
    "SVDQuant",
    "ViDiTQ",
    "best_low_rank",
    "fake_quantize",
    "load_quantized",
    "quantize_module",
    "quantize_weight",
    "save_quantized",
    "scale_of",
]
