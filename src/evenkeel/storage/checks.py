"""What a file must look like before anything in it is used: names, types, shapes and ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is only listed must not wait for torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Tensors:
    """What is expected of one tensor.

    Attributes:
        dtype: the only one.
        shape: numbers, or names of sizes: equal names, equal sizes. No size may be 0.
        low, high: bounds of every value, inclusive.
        finite: whether NaN and infinities are refused.
        optional: whether it may be missing.

    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    low: float | None = None
    high: float | None = None
    finite: bool = True
    optional: bool = False


@dataclass(frozen=True)
class Number:
    """What is expected of one number: its type (an int is a float, a bool is neither) and bounds."""

    kind: type[int] | type[float] = float
    low: float | None = None
    high: float | None = None


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensors], **sizes: int
) -> dict[str, int]:
    """Raise ValueError unless these are the expected tensors; returns the sizes by name.

    >>> import torch
    >>> check_tensors({"a": torch.ones(2, 3)}, {"a": Tensors(torch.float32, ("n", 3))})
    {'n': 2}

    """
    missing = {n for n, e in expected.items() if not e.optional} - tensors.keys()
    foreign = tensors.keys() - expected.keys()
    if missing or foreign:
        raise ValueError(f"missing tensors {sorted(missing)}, unknown tensors {sorted(foreign)}")
    for name, wanted in expected.items():
        if name in tensors:
            _check_tensor(name, tensors[name], wanted, sizes)
    return sizes


def _check_tensor(name: str, tensor: Tensor, wanted: Tensors, sizes: dict[str, int]) -> None:
    if tensor.dim() == len(wanted.shape):
        for size, key in zip(tensor.shape, wanted.shape, strict=True):
            if isinstance(key, str):
                sizes.setdefault(key, size)
    shape = tuple(sizes.get(k, k) if isinstance(k, str) else k for k in wanted.shape)
    if tensor.dtype != wanted.dtype or tuple(tensor.shape) != shape or 0 in shape:
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {found}, expected {wanted.dtype} {shape}")
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # float8 cannot be compared
    if wanted.finite and not tensor.isfinite().all():
        raise ValueError(f"{name} has a value that is not finite")
    for bound, broken in ((wanted.low, tensor.lt), (wanted.high, tensor.gt)):
        if bound is not None and bool(broken(bound).any()):
            raise ValueError(f"{name} has a value outside [{wanted.low}, {wanted.high}]")


def check_json(value: Any, expected: Any, at: str = "the header") -> None:
    """Raise ValueError unless a value read from JSON is as expected.

    Args:
        value: as ``json.loads`` gives it.
        expected: ``str``, ``int``, ``float``, ``bool``, ``None``, ``list``, ``dict`` or ``object``
            (anything); a `Number`; a set of the allowed strings; a tuple of alternatives;
            ``[item]``; ``{str: item}`` for a mapping; ``{"key": item}`` for exactly these keys, of
            which those that end in ``?`` may be missing. A float must be finite.
        at: where the value is, for the message.

    >>> check_json({"a": [1, 2]}, {"a": [Number(int, low=1)], "b?": (str, None)})
    >>> check_json({"a": [0]}, {"a": [Number(int, low=1)]}, "fits")
    Traceback (most recent call last):
    ValueError: fits.a.0 is 0, expected int in [1, None]

    """
    if isinstance(expected, tuple):
        if not any(_fits(value, e) for e in expected):
            raise ValueError(f"{at} is {_short(value)}, expected one of {expected}")
    elif isinstance(expected, list):
        check_json(value, list, at)
        for i, item in enumerate(value):
            check_json(item, expected[0], f"{at}.{i}")
    elif isinstance(expected, dict):
        check_json(value, dict, at)
        if str in expected:
            for key, item in value.items():
                check_json(item, expected[str], f"{at}.{key}")
        else:
            _check_keys(value, expected, at)
    elif not _is(value, expected):
        raise ValueError(f"{at} is {_short(value)}, expected {_named(expected)}")


def _check_keys(value: dict[str, Any], expected: dict[str, Any], at: str) -> None:
    items = {key.removesuffix("?"): item for key, item in expected.items()}
    missing = {key for key in expected if not key.endswith("?")} - value.keys()
    if missing or value.keys() - items.keys():
        unknown = sorted(value.keys() - items.keys())
        raise ValueError(f"{at} lacks {sorted(missing)} and has the unknown {unknown}")
    for key, item in value.items():
        check_json(item, items[key], f"{at}.{key}")


def _is(value: Any, expected: Any) -> bool:
    if expected is object:
        return True
    if expected is None or isinstance(expected, (set, frozenset)):
        return value is None if expected is None else isinstance(value, str) and value in expected
    if expected in (int, float):
        expected = Number(expected)
    if not isinstance(expected, Number):
        return isinstance(value, expected)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, float) and (expected.kind is int or not math.isfinite(value)):
        return False
    low = expected.low is None or value >= expected.low
    return low and (expected.high is None or value <= expected.high)


def _fits(value: Any, expected: Any) -> bool:
    try:
        check_json(value, expected)
    except ValueError:
        return False
    return True


def _named(expected: Any) -> str:
    if isinstance(expected, Number):
        bounds = (
            ""
            if expected.low is expected.high is None
            else f" in [{expected.low}, {expected.high}]"
        )
        return expected.kind.__name__ + bounds
    return str(getattr(expected, "__name__", expected))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


LARGEST = 10_000_000  # of a number in a network's configuration: vocabularies have 300,000 entries


def check_configuration(found: Mapping[str, Any], at: str = "the configuration") -> None:
    """Raise ValueError where a number is larger than any network has: it would be built for minutes.

    Infinities pass, schedulers clip at them; so do bases of rotary embeddings.

    >>> check_configuration({"num_layers": 2**31})
    Traceback (most recent call last):
    ValueError: the configuration: num_layers holds a number of 32 bits, expected at most 10000000

    """
    for name, value in found.items():
        for number in () if "theta" in name else _numbers(value):
            endless = isinstance(number, float) and math.isinf(number)
            if not endless and not abs(number) <= LARGEST:
                whole = isinstance(number, int)
                said = f"a number of {int(number).bit_length()} bits" if whole else f"{number:.6g}"
                raise ValueError(f"{at}: {name} holds {said}, expected at most {LARGEST}")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
