"""Reference quantizers: exact about what the integers can say, indifferent to speed.

What lives here is plain round-to-nearest with optional low-rank branch (``uniform.py``,
``low_rank.py``), enough to give a denoiser a known quantization error without calibration data.
"""

from __future__ import annotations

# Named post-training methods (SVDQuant, MixDQ, ViDiT-Q, Q-Diffusion, ...) each get a file of their
# own in this folder, named as in the literature, and reuse `uniform.py`, `layers.py`, `report.py`.
from evenkeel.quantizers.apply import quantize_module
from evenkeel.quantizers.files import load_quantized, save_quantized
from evenkeel.quantizers.layers import QuantizedConv2d, QuantizedLinear
from evenkeel.quantizers.low_rank import best_low_rank
from evenkeel.quantizers.report import LayerReport, QuantizationReport
from evenkeel.quantizers.spec import DEFAULT_SKIP, QuantizerSpec
from evenkeel.quantizers.uniform import fake_quantize, quantize_weight, scale_of

__all__ = [
    "DEFAULT_SKIP",
    "LayerReport",
    "QuantizationReport",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizerSpec",
    "best_low_rank",
    "fake_quantize",
    "load_quantized",
    "quantize_module",
    "quantize_weight",
    "save_quantized",
    "scale_of",
]
