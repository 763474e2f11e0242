"""What a file says is checked before it is used: names, types, shapes, ranges."""

import pytest
import torch

from evenkeel.storage import Number, Tensors, check_json, check_tensors

EXPECTED = {
    "a": Tensors(torch.float32, ("n", "n", 2), low=0.0, high=9.0),
    "b": Tensors(torch.int64, ("n",), optional=True),
    "c": Tensors(torch.float32, (1,), finite=False, optional=True),
    "d": Tensors(torch.float8_e4m3fn, ("m",), optional=True),
}


def good():
    return {
        "a": torch.ones(3, 3, 2),
        "b": torch.arange(3),
        "c": torch.tensor([float("nan")]),
        "d": torch.ones(4).to(torch.float8_e4m3fn),
    }


def test_what_fits_is_let_through_and_gives_its_sizes():
    assert check_tensors(good(), EXPECTED) == {"n": 3, "m": 4}
    assert check_tensors({"a": torch.zeros(1, 1, 2)}, EXPECTED) == {"n": 1}


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("a", torch.ones(3, 2, 2), r"a is torch.float32 \(3, 2, 2\), expected .* \(3, 3, 2\)"),
        ("a", torch.ones(3, 3), "a is"),
        ("a", torch.ones(3, 3, 2).double(), "a is torch.float64"),
        ("a", torch.ones(0, 0, 2), "a is"),
        ("a", torch.full((3, 3, 2), float("nan")), "not finite"),
        ("a", torch.full((3, 3, 2), float("inf")), "not finite"),
        ("a", torch.full((3, 3, 2), -1.0), "outside"),
        ("a", torch.full((3, 3, 2), 10.0), "outside"),
        ("b", torch.arange(4), "b is"),
        ("d", torch.tensor([float("nan")]).to(torch.float8_e4m3fn), "not finite"),
        ("extra", torch.ones(1), "unknown tensors"),
        ("a", None, "missing tensors"),
    ],
)
def test_what_does_not_fit_is_named(name, tensor, match):
    tensors = good() | {name: tensor}
    if tensor is None:
        del tensors[name]
    with pytest.raises(ValueError, match=match):
        check_tensors(tensors, EXPECTED)


def test_a_size_that_is_known_is_not_taken_from_the_file():
    with pytest.raises(ValueError, match="expected"):
        check_tensors(good(), EXPECTED, n=2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, int),
        (1, float),
        (1.5, float),
        (True, bool),
        ("x", str),
        (None, None),
        (None, (str, None)),
        ([1, 2], [int]),
        ([], [int]),
        ({"x": 1}, {str: int}),
        ({"x": 1}, {"x": int, "y?": str}),
        ({"x": object()}, {"x": object}),
        ("a", {"a", "b"}),
        (2, Number(int, low=1, high=2)),
        (10**400, int),
    ],
)
def test_json_that_fits(value, expected):
    check_json(value, expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, int),
        (True, int),
        (True, float),
        ("1", float),
        (float("nan"), float),
        (float("-inf"), float),
        (1, str),
        (1, None),
        (1, (str, None)),
        ([1, "2"], [int]),
        ({"x": "1"}, {str: int}),
        ([], {str: int}),
        ({}, {"x": int}),
        ({"x": 1, "z": 1}, {"x": int, "y?": str}),
        ("c", {"a", "b"}),
        ([], {"a", "b"}),
        (3, Number(int, low=1, high=2)),
        (0, Number(int, low=1, high=2)),
    ],
)
def test_json_that_does_not_fit(value, expected):
    with pytest.raises(ValueError, match="the header"):
        check_json(value, expected)


def test_the_message_says_where():
    with pytest.raises(ValueError, match=r"report.layers.1.bits is 'x', expected int"):
        check_json({"layers": [{"bits": 1}, {"bits": "x"}]}, {"layers": [{"bits": int}]}, "report")
