"""No damaged, foreign or forged record is ever let through."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from synthetic_record import (
    STEPS,
    WHOLE,
    same,
)
from torch import Tensor

from evenkeel.errors import EvenkeelError, RecordError
from evenkeel.record import (
    Record,
)
from evenkeel.storage import digest


def flip_bit(content: bytearray, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    content[position] ^= 1 << rng.randrange(8)
    return bytes(content)


def truncate(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content[: rng.randrange(len(content))])


def edit_header(content: bytearray, rng: random.Random) -> bytes:
    """Change one character of the JSON header, keeping its length."""
    size = int.from_bytes(content[:8], "little")
    position = 8 + rng.randrange(size)
    content[position] = rng.choice(b'0123456789"{}[],:x')
    return bytes(content)


def swap_tensors(content: bytearray, rng: random.Random) -> bytes:
    """Exchange two tensors of the same shape; the file stays a valid safetensors file."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = [n for n in header if n.startswith("moments.") and n != "moments.central"]
    a, b = rng.sample(names, 2)
    header[a], header[b] = header[b], header[a]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(content[8 + size :])


def splice(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return bytes(content[:start] + rng.randbytes(rng.randrange(1, 40)) + content[start:])


DAMAGE = (flip_bit, truncate, edit_header, swap_tensors, splice)


def outcome(path: Path, original: Record) -> str:
    try:
        loaded = Record.load(path)
    except RecordError as e:
        return "refused" if str(path) in str(e) else f"refused without naming the file: {e}"
    return "identical" if same(loaded, original) else "DIFFERENT CONTENT ACCEPTED"


def test_two_hundred_damaged_files_are_refused_or_harmless(tmp_path: Path) -> None:
    content = WHOLE.save(tmp_path / "good").read_bytes()
    path = tmp_path / "bad"
    seen: Counter[tuple[str, str]] = Counter()
    for seed in range(200):
        damage = DAMAGE[seed % len(DAMAGE)]
        path.write_bytes(damage(bytearray(content), random.Random(seed)))
        seen[damage.__name__, outcome(path, WHOLE)] += 1
    assert {result for _, result in seen} <= {"refused", "identical"}, seen
    for damage in DAMAGE:
        assert seen[damage.__name__, "refused"] >= 30, seen


def test_every_bit_of_the_first_kilobyte_matters_or_is_harmless(tmp_path: Path) -> None:
    content = WHOLE.save(tmp_path / "good").read_bytes()
    path, seen = tmp_path / "bad", Counter[str]()
    for position in range(0, 1024, 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        seen[outcome(path, WHOLE)] += 1
    assert set(seen) <= {"refused", "identical"}, seen


class _Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, write: str) -> None:
    path, proof = tmp_path / "record.safetensors", tmp_path / "executed"
    trap = {"provenance": _Trap(proof)}
    {
        "pickle": lambda: path.write_bytes(pickle.dumps(trap)),
        "torch": lambda: torch.save(trap, path),
    }[write]()
    with pytest.raises(RecordError, match="not a readable safetensors file"):
        Record.load(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(trap))  # the trap works
    assert proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        b"PK\x03\x04 a zip file",
        (4).to_bytes(8, "little") + b"null",
        (2).to_bytes(8, "little") + b"{}",
        (26).to_bytes(8, "little") + b'{"__metadata__":{"a":1.5}}',
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
    ids=["empty", "zeros", "ones", "zip", "null", "no tensors", "number as text", "deep nesting"],
)
def test_files_that_are_something_else_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"readable safetensors|not an evenkeel record"):
        Record.load(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(RecordError, match="is not a file"):
            Record.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save_bytes({"weight": torch.ones(2)}, {"format": "pt"}))
    with pytest.raises(RecordError, match="not an evenkeel record"):
        Record.load(path)


def forged(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A changed record with a digest that matches: only its meaning is wrong."""
    content = WHOLE.save(path).read_bytes()
    tensors = load_bytes(content)
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    header = json.loads(metadata["provenance"])
    change(tensors, header)
    text = json.dumps(header, sort_keys=True)
    whole = text + metadata["closed_loop"]
    metadata |= {"provenance": text, "digest": digest(whole, tensors)}
    path.write_bytes(save_bytes(tensors, metadata))
    return path


def test_forging_without_a_change_gives_a_valid_record(tmp_path: Path) -> None:
    assert same(Record.load(forged(tmp_path / "r", lambda t, h: None)), WHOLE)


FORGERIES: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], object]] = {
    "missing tensor": lambda t, h: t.pop("moments.s_xe"),
    "missing means": lambda t, h: t.pop("moments.mean_e"),
    "unknown tensor": lambda t, h: t.update(extra=torch.ones(1)),
    "renamed tensor": lambda t, h: t.update({"moment.gram": t.pop("gram")}),
    "another dtype": lambda t, h: t.update(gram=t["gram"].double()),
    "float seeds": lambda t, h: t.update(seeds=t["seeds"].double()),
    "another shape": lambda t, h: t.update({"moments.s_xx": t["moments.s_xx"][:, :2].clone()}),
    "flat moments": lambda t, h: t.update({"moments.mean_e": torch.ones(3).double()}),
    "scalar means": lambda t, h: t.update({"moments.mean_e": torch.ones(()).double()}),
    "scalar spectrum": lambda t, h: t.update(spectrum=torch.ones((), dtype=torch.int64)),
    "too few orders": lambda t, h: t.update(
        {"moments.central": t["moments.central"][..., :5].clone()}
    ),
    "short gram": lambda t, h: t.update(gram=t["gram"][:, :4].clone()),
    "fewer prompts": lambda t, h: t.update(seeds=t["seeds"][:2].clone()),
    "coarser histogram": lambda t, h: t.update(histogram=t["histogram"][:, :, :7].clone()),
    "coarser residual": lambda t, h: t.update(residual=t["residual"][:, :, :7].clone()),
    "float residual": lambda t, h: t.update(residual=t["residual"].double()),
    "half a law": lambda t, h: t.pop("law.alpha"),
    "law of other length": lambda t, h: t.update({"law.sigma": t["law.sigma"][:-1].clone()}),
    "not finite": lambda t, h: t["moments.s_xx"].fill_(float("nan")),
    "no prompts": lambda t, h: t.update({n: v[:0].clone() for n, v in t.items()}),
    "missing field": lambda t, h: h.pop("prediction"),
    "unknown field": lambda t, h: h.update(command="rm"),
    "text for a number": lambda t, h: h.update(elements="16"),
    "no elements": lambda t, h: h.update(elements=0),
    "number for a list": lambda t, h: h.update(sigma=3.0),
    "list of text": lambda t, h: h.update(sigma=["a", "b", "c"]),
    "too many levels": lambda t, h: h.update(alpha=[1.0] * 9),
    "levels not finite": lambda t, h: h.update(alpha=[float("nan")] * STEPS),
    "list for a layout": lambda t, h: h.update(layout=[4, 1, 2, 1]),
    "half a layout": lambda t, h: h.update(layout={"ndim": 4}),
    "text for a scale": lambda t, h: h.update(guidance_scale="high"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_malformed_record_with_a_matching_digest_is_refused(tmp_path: Path, forgery: str) -> None:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        FORGERIES[forgery](tensors, header)

    path = forged(tmp_path / "r", change)
    with pytest.raises(RecordError, match="not a valid record"):
        Record.load(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{", "[" * 100_000])
def test_a_header_that_is_no_provenance_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r"
    tensors = load_bytes(WHOLE.save(path).read_bytes())
    metadata = {"format": "evenkeel-record", "schema_version": "2", "provenance": text}
    metadata["closed_loop"] = "{}"
    metadata["digest"] = digest(text + "{}", tensors)
    path.write_bytes(save_bytes(tensors, metadata))
    with pytest.raises(RecordError, match="not a valid record"):
        Record.load(path)


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    metadata = {"format": "evenkeel-record", "schema_version": "2", "provenance": "{}"}
    path.write_bytes(save_bytes({"gram": torch.ones(2, dtype=torch.bfloat16)}, metadata))
    with pytest.raises(RecordError, match="digest"):
        Record.load(path)


@pytest.mark.parametrize("version", ["0", "1", "one"])
def test_another_schema_version_is_named(tmp_path: Path, version: str) -> None:
    path = tmp_path / "r"
    content = WHOLE.save(path).read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"] | {"schema_version": version}
    path.write_bytes(save_bytes(load_bytes(content), metadata))
    with pytest.raises(RecordError, match=f"schema version {version}, this library reads 2"):
        Record.load(path)


def test_record_errors_are_caught_as_evenkeel_errors_and_value_errors(tmp_path: Path) -> None:
    assert issubclass(RecordError, EvenkeelError) and issubclass(RecordError, ValueError)
