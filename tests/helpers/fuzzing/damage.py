"""Ways to damage a file, each reproducible from a generator of random numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]
HUGE = (2**31, 2**40, 10**12, 2**62)
LEAVES = (
    None,
    True,
    "",
    "x" * 5000,
    -1,
    0,
    1,
    0.5,
    -(2**40),
    *HUGE,
    10**400,
    [],
    {},
    [[1]],
    {"a": 1},
)
DEEP = b"[" * 100_000 + b"]" * 100_000


def flip(content: bytes, rng: random.Random) -> bytes:
    """One bit."""
    found = bytearray(content)
    if found:
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def truncate(content: bytes, rng: random.Random) -> bytes:
    """Its end is missing."""
    return content[: rng.randrange(max(1, len(content)))]


def splice(content: bytes, rng: random.Random) -> bytes:
    """Random bytes in between."""
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]


def blank(content: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros."""
    at = rng.randrange(max(1, len(content)))
    size = min(len(content) - at, rng.randrange(1, 4096))
    return content[:at] + bytes(size) + content[at + size :]


def nothing(content: bytes, rng: random.Random) -> bytes:
    """Empty."""
    return b""


def foreign(content: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    return rng.choice(
        (b"not this", b"{}", b"[]", b"null", b"PK\x03\x04" + bytes(100), DEEP, b"\x80\x04.")
    )


def header_size(content: bytes, rng: random.Random) -> bytes:
    """Of safetensors: the length of the header is a lie."""
    return rng.choice((0, 1, len(content), *HUGE, 2**64 - 1)).to_bytes(8, "little") + content[8:]


def _parts(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    size = int.from_bytes(content[:8], "little")
    try:
        found = json.loads(content[8 : 8 + size])
    except ValueError:
        return None
    return (found, content[8 + size :]) if isinstance(found, dict) else None


def _joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensors(content: bytes, rng: random.Random) -> bytes:
    """Of safetensors: two tensors swapped, one zeroed, of another type, shape or place."""
    found = _parts(content)
    if found is None:
        return flip(content, rng)
    header, data = found
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    start, end = header[name]["data_offsets"]
    how = rng.randrange(6)
    if how == 0:
        like = [n for n in names if n != name and header[n]["dtype"] == header[name]["dtype"]]
        equal = [n for n in like if header[n]["shape"] == header[name]["shape"]]
        if equal:
            other = rng.choice(equal)
            header[name], header[other] = header[other], header[name]
            return _joined(header, data)
    if how <= 1:
        return _joined(header, data[:start] + bytes(end - start) + data[end:])
    if how == 2:
        header[name]["dtype"] = rng.choice(("F16", "BF16", "F32", "F64", "I8", "U8", "I64", "BOOL"))
    elif how == 3:
        header[name]["shape"] = rng.choice(
            ([], [rng.choice(HUGE)], [2**31] * 3, header[name]["shape"][::-1])
        )
    elif how == 4:
        header[name]["data_offsets"] = rng.choice(([0, 0], [0, rng.choice(HUGE)], [end, start]))
    else:
        header[rng.choice(("another", ""))] = header.pop(name)
    return _joined(header, data)


def metadata(content: bytes, rng: random.Random) -> bytes:
    """Of safetensors: one entry of what it says beside its tensors."""
    found = _parts(content)
    if found is None or not found[0].get("__metadata__"):
        return flip(content, rng)
    said = found[0]["__metadata__"]
    name = rng.choice(sorted(said))
    try:
        said[name] = edited(said[name].encode(), rng).decode()
    except UnicodeDecodeError:
        said[name] = ""
    return _joined(*found)


def edited(content: bytes, rng: random.Random) -> bytes:
    """Of JSON: one value is another, or gone, or nested without end."""
    try:
        found = json.loads(content)
    except ValueError:
        return flip(content, rng)
    if rng.random() < 0.04:
        return rng.choice((DEEP, b'{"a":' * 100_000 + b"1" + b"}" * 100_000))
    place: Any = [found]
    path: list[tuple[Any, Any]] = [(place, 0)]
    while isinstance(path[-1][0][path[-1][1]], (dict, list)) and path[-1][0][path[-1][1]]:
        inner = path[-1][0][path[-1][1]]
        if len(path) > 1 and rng.random() < 0.1:
            break
        path.append(
            (
                inner,
                rng.choice(sorted(inner)) if isinstance(inner, dict) else rng.randrange(len(inner)),
            )
        )
    holder, key = path[-1]
    value, how = holder[key], rng.random()
    if how < 0.15 and isinstance(holder, dict):
        del holder[key]
    elif how < 0.4 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice(
            (value + 1, -value, value * 2, value * 1e6, float("nan"), float("inf"))
        )
    elif how < 0.4 and isinstance(value, str):
        holder[key] = rng.choice((value + "x", value[::-1], value.upper(), "../" + value, "\ud800"))
    else:
        holder[key] = rng.choice(LEAVES)
    return json.dumps(place[0]).encode()


def counts(content: bytes, rng: random.Random) -> bytes:
    """Of GGUF: version and the numbers of tensors and entries, or a length further on, are lies."""
    at, width = rng.choice(((4, 4), (8, 8), (16, 8), (24, 8), (rng.randrange(24, 2000), 8)))
    value = rng.choice((0, 1, 2**31 - 1, *HUGE, 2**64 - 1)) % 2 ** (8 * width)
    return content[:at] + value.to_bytes(width, "little") + content[at + width :]


ANY: tuple[Damage, ...] = (flip, flip, truncate, splice, blank, nothing, foreign)
SAFETENSORS: tuple[Damage, ...] = (
    *ANY,
    tensors,
    tensors,
    tensors,
    tensors,
    metadata,
    metadata,
    header_size,
)
JSON: tuple[Damage, ...] = (*ANY, edited, edited, edited, edited, edited, edited)
GGUF: tuple[Damage, ...] = (*ANY, counts, counts, counts, counts)


def damages_of(path: Path) -> tuple[Damage, ...]:
    """What can be done to a file of this name."""
    by_suffix = {".safetensors": SAFETENSORS, ".json": JSON, ".gguf": GGUF}
    return by_suffix.get(path.suffix, ANY)


def damage(path: Path, rng: random.Random) -> str:
    """Damage this file; returns how."""
    if rng.random() < 0.03:
        path.unlink()
        if rng.random() < 0.3:
            path.mkdir()
            return "a folder in its place"
        return "missing"
    how = rng.choice(damages_of(path))
    path.write_bytes(how(path.read_bytes(), rng))
    return how.__name__
