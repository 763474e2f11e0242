"""Reference quantizers: exact about what the integers can say, indifferent to speed.

``quantize_module`` is plain rounding with an optional low-rank branch: a known quantization error
without calibration data. The methods of the literature each have a file named after them and a class
in :data:`evenkeel.quantizers.methods.METHODS`; ``evenkeel.quantize`` runs them on a pipeline.
"""

from __future__ import annotations

from evenkeel.quantizers.apply import quantize_module
from evenkeel.quantizers.files import load_quantized, save_quantized
from evenkeel.quantizers.layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.low_rank import best_low_rank
from evenkeel.quantizers.method import Method
from evenkeel.quantizers.methods import METHODS
from evenkeel.quantizers.mixdq import MixDQ
from evenkeel.quantizers.ptq4dit import PTQ4DiT
from evenkeel.quantizers.q_diffusion import QDiffusion
from evenkeel.quantizers.report import LayerReport, QuantizationReport
from evenkeel.quantizers.round_to_nearest import RoundToNearest
from evenkeel.quantizers.spec import DEFAULT_SKIP, QuantizerSpec
from evenkeel.quantizers.svdquant import SVDQuant
from evenkeel.quantizers.uniform import fake_quantize, quantize_weight, scale_of
from evenkeel.quantizers.vidit_q import ViDiTQ

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
