"""Grids as text and JSON, what they refuse, and codes packed for files."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from grid_texts import TEXTS, every
from hypothesis import given, settings
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import NF4, Codebook, Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import codes_of, fit, snap
from evenkeel.storage.packing import pack, unpack

law = settings(derandomize=True, max_examples=60, deadline=None)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(seed: int = 0) -> Tensor:
    """Three rows of different size, of a width that few groups divide, with an outlier, a zero
    group for every group size up to 8, and a zero row.
    """
    x = gaussian(4, 83, seed=seed) * torch.tensor([1.0, 1e-4, 300.0, 0.0])[:, None]
    x[0, 20] = 50.0
    x[1, 32:48] = 0.0
    return x


# ---------------------------------------------------------------- refusals


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_a_count(grid: Grid, bad: float) -> None:
    x = sample()
    x[1, :3] = bad
    with pytest.raises(QuantizationError, match=r"The q layer holds 3 of 332 .* wider dtype"):
        fit(x, grid, "the q layer")


@every
def test_nan_is_not_hidden_by_snapping(grid: Grid) -> None:
    x = sample()
    scales = fit(x, grid)
    x[0, 5] = float("nan")
    assert snap(x, grid, scales).isnan().nonzero().tolist() == [[0, 5]]
    with pytest.raises(QuantizationError, match="1 of 332"):
        codes_of(x, grid, scales)


@pytest.mark.parametrize(
    "x", [torch.ones(3, dtype=torch.int64), torch.tensor(1.0), torch.ones(2, 0)]
)
def test_only_floating_point_with_a_last_dimension(x: Tensor) -> None:
    with pytest.raises(QuantizationError, match="floating point and not empty"):
        fit(x, Grid(Integer(4)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": 0}, "at least 1"),
        ({"group": 2.0}, "integer"),
        ({"group": 4, "per_tensor": True}, "one scale"),
        ({"range": "max"}, "'percentile'"),
        ({"exponent": 2.4}, "'mse' only"),
        ({"range": "mse", "exponent": 0.0}, "positive"),
        ({"range": "mse", "exponent": float("nan")}, "positive"),
        ({"scale": "fp16"}, "'e8m0'"),
        ({"zero_point": True, "scale": "e8m0"}, "float32 scales"),
        ({"zero_point": True, "format": NF4}, "integer format"),
    ],
)
def test_fields_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        Grid(**{"format": Integer(4), **fields})


# ---------------------------------------------------------------- text and JSON


@every
def test_text_and_json_and_back(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid
    assert Grid.from_dict(json.loads(json.dumps(grid.as_dict()))) == grid


def test_texts_are_canonical() -> None:
    texts = [t for t in TEXTS if not t.startswith(("nv", "mx"))]
    assert [str(Grid.parse(t)) for t in texts] == texts
    assert Grid(Integer(4), zero_point=True) == Grid(Integer(4, signed=False), zero_point=True)


@pytest.mark.parametrize(
    "text", ["", "int4-g", "int4-64", "int4-mse-zero", "int4-g4-tensor", "int4 "]
)
def test_other_texts_show_the_grammar(text: str) -> None:
    with pytest.raises(QuantizationError, match="the grammar is <format>"):
        Grid.parse(text)


def test_dictionaries_are_exact() -> None:
    fields = Grid(Integer(4)).as_dict()
    with pytest.raises(QuantizationError, match=r"missing \['group'\]"):
        Grid.from_dict({k: v for k, v in fields.items() if k != "group"})
    with pytest.raises(QuantizationError, match=r"unknown \['colour'\]"):
        Grid.from_dict({**fields, "colour": 1})
    with pytest.raises(QuantizationError, match="no number format 'own'"):
        Grid(Codebook("own", (-1.0, 1.0))).as_dict()
    with pytest.raises(QuantizationError, match="another one"):
        Grid(Codebook("nf4", (-1.0, 1.0))).as_dict()


# ---------------------------------------------------------------- packing


@law
@given(st.integers(2, 8), st.integers(0, 70), st.integers(0, 5))
def test_packing_is_dense_and_lossless(width_bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << width_bits, (count,), generator=generator, dtype=torch.uint8)
    packed = pack(codes, width_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-count * width_bits // 8),)
    assert torch.equal(unpack(packed, width_bits, count), codes)


@pytest.mark.parametrize("width_bits", range(2, 9))
def test_packing_is_the_bit_stream_of_numpy(width_bits: int) -> None:
    codes = torch.arange(300, dtype=torch.int64).remainder(1 << width_bits).to(torch.uint8)
    stream = np.unpackbits(codes.numpy()[:, None], axis=1, count=width_bits, bitorder="little")
    expected = np.packbits(stream, bitorder="little")
    assert pack(codes.reshape(3, 100), width_bits).numpy().tolist() == expected.tolist()


def test_packing_refuses_what_does_not_fit() -> None:
    codes = torch.tensor([1, 16], dtype=torch.uint8)
    with pytest.raises(QuantizationError, match="to pack"):
        pack(codes, 4)
    with pytest.raises(QuantizationError, match="to pack"):
        pack(codes.long(), 8)
    with pytest.raises(QuantizationError, match="are 3 bytes"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)
