"""Reference quantizers: exact about what the integers can say, indifferent to speed.

The methods of the literature each have a file named after them and a class in
:data:`evenkeel.quantizers.methods.catalogue.METHODS`. ``evenkeel.quantize`` runs them on a pipeline;
``quantize_module`` runs those that need no calibration on any module. ``QuantizerSpec`` is plain
rounding, with or without a low-rank branch, said in one word. The module that comes out carries its
report. Rooms stand one on the other: numbers, rounding, layers, saved, workspace, methods.
"""

from __future__ import annotations

from evenkeel.quantizers.layers.input_quantizers import fake_quantize
from evenkeel.quantizers.layers.patterns import DEFAULT_SKIP
from evenkeel.quantizers.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.methods.base import Method, quantize_module
from evenkeel.quantizers.methods.catalogue import METHODS
from evenkeel.quantizers.methods.efficientdm import EfficientDM
from evenkeel.quantizers.methods.mixdq import MixDQ
from evenkeel.quantizers.methods.ptq4dit import PTQ4DiT
from evenkeel.quantizers.methods.q_diffusion import QDiffusion
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.methods.sa_ptq import SAPTQ
from evenkeel.quantizers.methods.sa_qlora import SAQLoRA
from evenkeel.quantizers.methods.spec import QuantizerSpec
from evenkeel.quantizers.methods.svdquant import SVDQuant
from evenkeel.quantizers.methods.vidit_q import ViDiTQ
from evenkeel.quantizers.rounding.low_rank_refinement import best_low_rank
from evenkeel.quantizers.saved.folder import load_quantized, save_quantized
from evenkeel.quantizers.saved.report import LayerReport, QuantizationReport

__all__ = [
    "DEFAULT_SKIP",
    "METHODS",
    "SAPTQ",
    "EfficientDM",
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
    "SAQLoRA",
    "SVDQuant",
    "ViDiTQ",
    "best_low_rank",
    "fake_quantize",
    "load_quantized",
    "quantize_module",
    "save_quantized",
]
