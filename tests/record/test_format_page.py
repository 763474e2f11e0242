"""docs/record-format.md is enough to read our files: its code is run and its tables are compared."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import pixart_sigma

from evenkeel import calibrate, fit_readout
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.record import save
from evenkeel.record.closed_loop import ClosedLoop

PAGE = (Path(__file__).parents[2] / "docs" / "record-format.md").read_text()
KINDS = ("record", "record in closed loop", "readout")
JSON_TYPES: dict[str, Any] = {
    "text": str,
    "integer": int,
    "number": (int, float),
    "true or false": bool,
    "null": type(None),
    "object": dict,
    "list of numbers": list,
    "list of integers": list,
    "list of objects": list,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a real calibration, with and without closed loop, and of a readout."""
    folder, tiny = tmp_path_factory.mktemp("files"), pixart_sigma()
    quantized, _ = quantize_module(tiny.model, QuantizerSpec(4))
    options: dict[str, Any] = {"quantized": quantized, "num_inference_steps": 2, "progress": False}
    options |= {"prompts": tiny.prompts, "guidance_scale": tiny.guidance_scale, "call": tiny.call}
    record = calibrate(tiny.pipe, closed_loop=True, **options)
    assert set(record.closed_loop.corrections) == {"tac", "tac-ibc", "stepbaq"}
    readout = fit_readout(tiny.pipe, **options)
    assert readout.evidence is not None
    plain = replace(record, closed_loop=ClosedLoop())
    return {
        "record": plain.save(folder / "record"),
        "record in closed loop": record.save(folder / "loop"),
        "readout": save(readout, folder / "readout"),
    }


def reader() -> Any:
    """The page's own reader."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert "evenkeel." not in source and "import evenkeel" not in source
    space: dict[str, Any] = {}
    exec(source, space)
    return space["read"]


def tables(first: str, text: str = PAGE) -> list[list[str]]:
    """Rows of every table whose first column is called so."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif inside:
            rows += [] if set(line) <= set("|-: ") else [cells]
        else:
            inside = cells[0] == first
    return rows


def names_of(cell: str) -> list[str]:
    """``a.x``, ``.y`` as a.x, a.y."""
    found: list[str] = re.findall(r"`([^`]+)`", cell)
    prefix = found[0].rpartition(".")[0]
    return [prefix + name if name.startswith(".") else name for name in found]


def tensors_of(section: str) -> dict[str, tuple[str, str, bool]]:
    """Name -> shape, dtype, optional, of the section's table of tensors."""
    text = PAGE.split(f"## The {section}'s tensors")[1].split("\n## ")[0]
    return {
        name: (row[1], row[2], "(optional)" in row[0])
        for row in tables("tensor", text)
        for name in names_of(row[0])
    }


def fits(shape: tuple[int, ...], said: str, sizes: dict[str, int]) -> bool:
    """Whether a shape is as the page says; names of sizes take the first value that they meet."""
    words = said.split(", ")
    if words[-1] == "...":
        shape, words = shape[: len(words) - 1], words[:-1]
    if len(shape) != len(words):
        return False
    for size, word in zip(shape, words, strict=True):
        t = sizes.get("T", 0)
        wanted = {"T(T+1)/2": t * (t + 1) // 2, "T+1": t + 1}.get(word)
        if wanted is None:
            wanted = int(word) if word.isdigit() else sizes.setdefault(word, size)
        if size != wanted:
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_what_the_page_computes(files: dict[str, Path], kind: str) -> None:
    metadata, tensors = reader()(files[kind])
    assert metadata["format"] == f"evenkeel-{kind.split()[0]}" and tensors


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_reader_refuses_what_was_changed(
    files: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    content = bytearray(files[kind].read_bytes())
    content[-1] ^= 1
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match="was changed"):
        reader()(tmp_path / "bad")


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_is_what_the_page_lists(files: dict[str, Path], kind: str) -> None:
    metadata, _ = reader()(files[kind])
    column = 1 + (kind == "readout")
    said = {names_of(row[0])[0]: row[column] for row in tables("metadata") if row[column]}
    assert metadata.keys() == said.keys()
    for name in ("format", "schema_version"):
        assert metadata[name] == said[name].strip("`")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_what_the_page_lists(files: dict[str, Path], kind: str) -> None:
    _, tensors = reader()(files[kind])
    said = tensors_of(kind.split()[0])
    optional = {name for name, row in said.items() if row[2]}
    assert said.keys() - optional <= tensors.keys() <= said.keys()
    sizes: dict[str, int] = {}
    for name in sorted(tensors, key=lambda n: list(said).index(n)):
        shape, dtype, _ = said[name]
        assert str(tensors[name].dtype) == dtype, name
        assert fits(tensors[name].shape, shape, sizes), f"{name}: {tensors[name].shape}, {shape}"
    if kind == "record":
        assert tensors.keys() == {n for n in said if not n.startswith("closed_loop.")}
    else:  # the real files hold everything that the page knows
        assert tensors.keys() == said.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_what_the_page_lists(files: dict[str, Path], kind: str) -> None:
    metadata, _ = reader()(files[kind])
    found = json.loads(metadata["provenance"])
    for text in ("closed_loop", "readout"):
        nested = json.loads(metadata.get(text, "{}"))
        flat = nested.items() if text == "closed_loop" else [(text, nested)] if nested else ()
        found |= {f"{part}.{key}": v for part, keys in flat for key, v in keys.items()}
    said = {name: row[1] for row in tables("field") for name in names_of(row[0])}
    own: dict[str, tuple[str, ...]]
    own = {
        "record": (),
        "readout": ("readout.",),
        "record in closed loop": ("tac.", "tac-ibc.", "stepbaq."),
    }
    assert found.keys() == {n for n in said if "." not in n or n.startswith(own[kind])}
    for name, value in found.items():
        kinds = [said[name]] if said[name] in JSON_TYPES else said[name].split(" or ")
        assert any(isinstance(value, JSON_TYPES[k]) for k in kinds), f"{name}: {value!r}"


def test_the_comparison_can_fail() -> None:
    assert tensors_of("record")["law.alpha"] == ("T+1", "float64", True)
    assert fits((3, 6), "T, T(T+1)/2", {}) and not fits((3, 5), "T, T(T+1)/2", {})
    assert not fits((3,), "T, C", {}) and not fits((2, 3), "T, C", {"T": 3})
    assert fits((3, 9, 9), "T, ...", {"T": 3}) and not fits((2, 9), "T, ...", {"T": 3})
