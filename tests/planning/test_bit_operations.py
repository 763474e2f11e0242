"""Bit operations: the multiplications are torch's own count, the bits are the report's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evenkeel import zoo
from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.planning.bit_operations import bit_operations
from evenkeel.planning.blueprint import read_blueprint
from evenkeel.planning.denoiser_inputs import Shapes
from evenkeel.planning.plan import size_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.quantizers.saved.report import QuantizationReport


def report_of(name: str, spec: str) -> QuantizationReport:
    return quantize_module(denoiser_of(zoo.load(name)), QuantizerSpec.parse(spec))[1]


@pytest.mark.parametrize("name", ["ldm-8", "flux-schnell"])
def test_multiplications_are_those_that_torch_counts(name: str) -> None:
    report = report_of(name, "w4a8-g32")
    found = bit_operations(f"zoo:{name}", report)
    assert found is not None
    blueprint = read_blueprint(zoo.path_of(name))
    shapes = Shapes(blueprint, size_of(blueprint, None, None, None), torch.float32)
    denoiser = blueprint.denoiser.float()
    with FlopCounterMode(display=False, depth=20) as counter, torch.no_grad():
        denoiser(**shapes.inputs(1), return_dict=False)
    counted = counter.get_flop_counts()  # by module: products inside attention are of no layer
    layers = sum(
        sum(counted.get(f"{type(denoiser).__name__}.{layer.name}", {}).values())
        for layer in report.layers
    )
    assert found.full_precision == 256 * layers // 2


def test_bits_are_the_reports() -> None:
    plain = report_of("pixart-sigma", "w4a8-g32")
    found = bit_operations("zoo:pixart-sigma", plain)
    branch = bit_operations("zoo:pixart-sigma", report_of("pixart-sigma", "w4a8-g32-r4"))
    layers = tuple(replace(r, weight_bits=16, activation_bits=16) for r in plain.layers)
    whole = bit_operations("zoo:pixart-sigma", replace(plain, layers=layers))
    layers = tuple(replace(r, weight_bits=2, activation_bits=8) for r in plain.layers)
    eighth = bit_operations("zoo:pixart-sigma", replace(plain, layers=layers))
    assert found is not None and branch is not None and whole is not None and eighth is not None
    assert whole.quantized == whole.full_precision == found.full_precision
    assert eighth.quantized * 16 == whole.quantized
    assert eighth.quantized < found.quantized < branch.quantized < whole.quantized


def test_the_size_counts_and_what_is_not_there_is_said() -> None:
    report = report_of("pixart-sigma", "w4a8-g32")
    small, large = (bit_operations("zoo:pixart-sigma", report, height=h, width=h) for h in (32, 64))
    assert small is not None and large is not None
    assert (
        2 < large.full_precision / small.full_precision < 4
    )  # four times the tokens, the same text
    with pytest.raises(UnsupportedPipeline):
        bit_operations("/nowhere", report)
