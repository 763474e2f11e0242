"""Number formats: bit for bit what torch and ml_dtypes say, and the laws of rounding."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import (
    NF4,
    Codebook,
    Float,
    Format,
    Integer,
    format_named,
    power_of_two_below,
)

law = settings(derandomize=True, max_examples=60, deadline=None)

INTEGERS = [Integer(bits, signed) for bits in range(2, 9) for signed in (True, False)]
FLOATS = [Float(4, 3), Float(5, 2), Float(2, 3), Float(3, 2), Float(2, 1)]
FORMATS: list[Format] = [*INTEGERS, *FLOATS, NF4, Codebook("lopsided", (-1.0, 0.25, 3.0))]
TORCH = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
ML_DTYPES = {
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp6_e2m3": "float6_e2m3fn",
    "fp6_e3m2": "float6_e3m2fn",
    "fp4_e2m1": "float4_e2m1fn",
}

every = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
floating = pytest.mark.parametrize("form", FLOATS, ids=lambda f: f.name)


def values(form: Format) -> Tensor:
    """All values of the format, from its codes; those without a value are left out."""
    found = []
    for code in range(1 << form.bits):
        try:
            found.append(form.decode(torch.tensor([code], dtype=torch.uint8)))
        except QuantizationError:
            continue
    return torch.cat(found)


def probes(form: Format) -> Tensor:
    """Values, ties, the float32 neighbours of both, far outliers, and a dense random cloud."""
    exact = values(form).unique()
    ties = (exact[1:] + exact[:-1]) / 2
    corners = torch.cat([exact, ties, -exact, -ties])
    up = torch.nextafter(corners, torch.tensor(float("inf")))
    down = torch.nextafter(corners, torch.tensor(-float("inf")))
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(10_000, generator=generator) * form.largest
    small = cloud * 10.0 ** (-8 * torch.rand(10_000, generator=generator))
    far = torch.tensor([1e-45, -1e-40, 1e-20, 1e30, -1e30, 3.4e38, -3.4e38])
    return torch.cat([corners, up, down, cloud, small, far, torch.tensor([0.0, -0.0])])


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def saturated(x: Tensor, form: Format) -> Tensor:
    return x.clamp(-form.largest, form.largest)


# ---------------------------------------------------------------- against other implementations


@pytest.mark.parametrize("form", FLOATS[:2], ids=lambda f: f.name)
def test_rounds_as_torch_casts(form: Float) -> None:
    x = probes(form)
    expected = saturated(x, form).to(TORCH[form.name]).float()
    assert torch.equal(bits(form.round(x)), bits(expected))


@pytest.mark.parametrize("form", FLOATS[:2], ids=lambda f: f.name)
def test_codes_are_those_of_torch(form: Float) -> None:
    x = saturated(probes(form), form).to(TORCH[form.name])
    assert torch.equal(form.encode(x.float()), x.view(torch.uint8))
    assert torch.equal(bits(form.decode(x.view(torch.uint8))), bits(x.float()))


@floating
def test_rounds_as_ml_dtypes_casts(form: Float) -> None:
    other = getattr(pytest.importorskip("ml_dtypes"), ML_DTYPES[form.name])
    x = probes(form)
    expected = saturated(x, form).numpy().astype(other).astype(np.float32)
    assert torch.equal(bits(form.round(x)), bits(torch.from_numpy(expected)))


@floating
def test_codes_are_those_of_ml_dtypes(form: Float) -> None:
    other = getattr(pytest.importorskip("ml_dtypes"), ML_DTYPES[form.name])
    cast = saturated(probes(form), form).numpy().astype(other)
    raw = torch.from_numpy(cast.view(np.uint8))
    assert torch.equal(form.encode(torch.from_numpy(cast.astype(np.float32))), raw)
    assert torch.equal(bits(form.decode(raw)), bits(torch.from_numpy(cast.astype(np.float32))))


@floating
def test_range_is_that_of_ml_dtypes(form: Float) -> None:
    other = pytest.importorskip("ml_dtypes")
    info = other.finfo(getattr(other, ML_DTYPES[form.name]))
    assert (form.bits, form.largest) == (info.bits, float(info.max))
    assert form.smallest == float(info.smallest_subnormal)


@floating
def test_float64_is_rounded_once(form: Float) -> None:
    """Through float32 a value just above a tie would become the tie and then go down."""
    exact = values(form).double().unique()
    above = exact[exact >= 0]
    ties = (above[1:] + above[:-1]) / 2
    assert torch.equal(form.round(ties * (1 + 1e-12)), above[1:])
    assert torch.equal(form.round(ties * (1 - 1e-12)), above[:-1])
    assert torch.equal((ties * (1 + 1e-12)).float().double(), ties)


def test_fp4_says_what_the_specification_lists() -> None:
    expected = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    found = values(Float(2, 1)).unique().tolist()
    assert found == [*(-v for v in reversed(expected)), 0.0, *expected]


PUBLISHED_NF4 = [  # QLoRA, appendix E, and bitsandbytes
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_is_the_published_table() -> None:
    np.testing.assert_allclose(NF4.levels, PUBLISHED_NF4, rtol=0, atol=1e-6)
    assert (NF4.levels[0], NF4.levels[7], NF4.levels[15]) == (-1.0, 0.0, 1.0)


def test_integers_round_as_numpy_does() -> None:
    x = torch.linspace(-300, 300, 4801)  # eighths, with every tie
    for form in INTEGERS:
        expected = np.clip(np.rint(x.numpy()), form.lowest, form.largest)
        assert torch.equal(form.round(x), torch.from_numpy(expected))


# ---------------------------------------------------------------- laws


@every
def test_nearest_of_all_values(form: Format) -> None:
    x = probes(form).double()
    x = x[x.abs() < 1e6]
    distance = (x[:, None] - values(form).double()).abs().amin(1)
    assert torch.equal((form.round(x) - x).abs(), distance)


@every
def test_rounding_twice_changes_nothing(form: Format) -> None:
    once = form.round(probes(form))
    assert torch.equal(bits(form.round(once)), bits(once))


@every
def test_codes_and_back_bit_for_bit(form: Format) -> None:
    rounded = form.round(probes(form))
    codes = form.encode(rounded)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 1 << form.bits
    assert torch.equal(bits(form.decode(codes)), bits(rounded))


@every
def test_every_value_has_one_code(form: Format) -> None:
    found = values(form)
    assert len(form.encode(found).unique()) == len(found)
    assert (form.encode(found).long() < 1 << form.bits).all()
    assert (found.amin(), found.abs().amax()) == (form.lowest, form.largest)


@pytest.mark.parametrize(
    "form", [f for f in FORMATS if f.lowest < 0 and f not in FORMATS[-2:]], ids=lambda f: f.name
)
def test_odd_symmetry(form: Format) -> None:
    x = probes(form)
    assert torch.equal(form.round(-x), -form.round(x))


def test_nf4_and_unsigned_are_not_odd() -> None:
    x = torch.tensor([0.09])
    assert NF4.round(-x) != -NF4.round(x)
    assert Integer(4, signed=False).round(torch.tensor([-3.0])) == 0


@every
def test_rounding_never_turns_an_order_around(form: Format) -> None:
    assert (form.round(probes(form).sort().values).diff() >= 0).all()


@floating
def test_relative_error_of_normal_numbers(form: Float) -> None:
    x = probes(form)
    normal = (x.abs() >= form.smallest * 2**form.mantissa_bits) & (x.abs() <= form.largest)
    error = ((form.round(x) - x) / x).abs()[normal]
    bound = 2.0 ** -(form.mantissa_bits + 1)
    assert 0.9 * bound / (1 + bound) < error.max() <= bound


@floating
def test_doubling_passes_through_normal_numbers(form: Float) -> None:
    x = values(form)[: 1 << (form.bits - 1)] * 1.03
    x = x[(x >= form.smallest * 2**form.mantissa_bits) & (x <= form.largest / 2.2)]
    assert len(x) > 0
    assert torch.equal(form.round(2 * x), 2 * form.round(x))


def test_ties_go_to_the_even_code() -> None:
    for form in FLOATS:
        positive = values(form)[: len(values(form)) // 2]
        ties = (positive[1:] + positive[:-1]) / 2
        assert (form.encode(form.round(ties)) % 2 == 0).all()


def test_a_tie_of_a_codebook_goes_down() -> None:
    book = Codebook("b", (-1.0, 0.0, 1.0))
    assert book.round(torch.tensor([-0.5, 0.5])).tolist() == [-1.0, 0.0]


def test_integers_have_one_zero_and_floats_two() -> None:
    x = torch.tensor([-0.1])
    assert not torch.signbit(Integer(4).round(x)).any()
    assert torch.signbit(Float(2, 1).round(x)).all()


@law
@given(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False).filter(bool))
def test_power_of_two_below(value: float) -> None:
    x = torch.tensor([value])
    for found, of in ((power_of_two_below(x), x), (power_of_two_below(x.double()), x.double())):
        ratio = of.abs().double() / found.double()
        assert 1 <= ratio < 2
        assert np.frexp(found.item())[0] == 0.5


# ---------------------------------------------------------------- names and refusals


@pytest.mark.parametrize("form", [*INTEGERS, *FLOATS, NF4], ids=lambda f: f.name)
def test_found_again_by_name(form: Format) -> None:
    assert format_named(form.name) == form


@pytest.mark.parametrize("name", ["int9", "int1", "fp8", "INT4", "int4 ", "", "uint16"])
def test_an_unknown_name_lists_what_exists(name: str) -> None:
    with pytest.raises(QuantizationError, match=r"uint2 to uint8.*nf4.*fp4_e2m1"):
        format_named(name)


@every
def test_nan_stays_nan_and_has_no_code(form: Format) -> None:
    x = torch.tensor([form.largest, float("nan")])
    assert form.round(x).isnan().tolist() == [False, True]
    with pytest.raises(QuantizationError, match="1 of 2 values"):
        form.encode(x)


@every
def test_infinity_saturates(form: Format) -> None:
    x = torch.tensor([float("inf"), -float("inf")])
    assert form.round(x).tolist() == [values(form).max(), form.lowest]


@every
def test_values_in_between_are_not_encoded(form: Format) -> None:
    with pytest.raises(QuantizationError, match="Round them first"):
        form.encode(torch.tensor([0.123]))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_only_wide_numbers_are_rounded(form: Format, dtype: torch.dtype) -> None:
    with pytest.raises(QuantizationError, match=r"\.float\(\)"):
        form.round(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize(
    ("form", "code"),
    [(Integer(4), 8), (Integer(4), 16), (Float(4, 3), 127), (Float(5, 2), 124), (NF4, 16)],
)
def test_codes_without_a_value_are_refused(form: Format, code: int) -> None:
    with pytest.raises(QuantizationError, match=f"such as {code}"):
        form.decode(torch.tensor([0, code], dtype=torch.uint8))


def test_codes_are_bytes() -> None:
    with pytest.raises(QuantizationError, match="uint8"):
        NF4.decode(torch.tensor([0]))


@pytest.mark.parametrize("width", [1, 9, True, 4.0])
def test_integers_have_two_to_eight_bits(width: int) -> None:
    with pytest.raises(QuantizationError, match="2 to 8 bits"):
        Integer(width)


def test_other_floats_and_unordered_codebooks_are_refused() -> None:
    with pytest.raises(QuantizationError, match="no format e3m4"):
        Float(3, 4)
    with pytest.raises(QuantizationError, match="rising"):
        Codebook("b", (0.0, 1.0, 1.0))
    with pytest.raises(QuantizationError, match="2 to 256"):
        Codebook("b", (0.0,))


@every
def test_shapes_strides_and_empty_tensors_pass(form: Format) -> None:
    x = torch.linspace(-2, 2, 24).reshape(2, 3, 4).permute(2, 0, 1)
    rounded = form.round(x)
    assert torch.equal(rounded, form.round(x.contiguous()))
    assert torch.equal(form.decode(form.encode(rounded)), rounded)
    assert form.decode(form.encode(form.round(torch.zeros(0)))).shape == (0,)
