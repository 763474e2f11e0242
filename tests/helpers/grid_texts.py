"""Grids that tests of grids run through."""

from __future__ import annotations

import pytest

from evenkeel.quantizers.numbers.grids import Grid

TEXTS = [
    "int2",
    "int3-g32",
    "int4-g7",
    "int8-tensor",
    "uint4",
    "uint4-zero",
    "uint8-tensor-zero",
    "uint3-g5-zero-mse2.4",
    "int4-g16-mse",
    "int4-percentile",
    "uint8-zero-percentile",
    "fp8_e4m3",
    "fp8_e5m2-g16",
    "fp6_e2m3-g32-scale_e8m0",
    "fp6_e3m2-tensor",
    "fp4_e2m1-g16-mse",
    "nf4-g64",
    "nf4-g8-mse",
    "nvfp4",
    "mxfp4",
    "int8-g32-scale_e8m0",
]
GRIDS = [Grid.parse(text) for text in TEXTS]
every = pytest.mark.parametrize("grid", GRIDS, ids=str)
