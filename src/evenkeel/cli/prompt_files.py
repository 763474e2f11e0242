"""Prompt files as people have them: lines, CSV and TSV, JSON and JSON lines, tensors of embeddings."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from evenkeel.errors import EvenkeelError
from evenkeel.hosts.pipeline.prompts import Prompts, text_names

FORMS = (
    "one prompt per line; CSV or TSV with a column called prompt; a JSON list, or JSON lines, of texts or "
    "of objects with a prompt; or .safetensors with prompt_embeds and what belongs to them"
)
# Columns that hold prompts, the first that is there: PartiPrompts, DrawBench, DPG-Bench, COCO...
_PROMPT = ("prompt", "prompts", "caption", "captions", "text")
_LABEL = ("class_label", "class_labels", "label", "class")
_WRAPPED = ("prompts", "captions", "annotations", "data", "rows")  # lists of rows inside an object
_PICTURES = ("image", "mask_image", "control_image")
_MARKS = {  # longest first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_JSON = re.compile(r'\s*(\[\s*["{\[\]]|\{\s*["}])')
Row = dict[str, Any]


def read_prompts(source: str, parameters: Collection[str], labels: bool = False) -> Prompts:
    """The prompts of a file (``-``: standard input), with the inputs that it holds for each of them.

    Beside ``prompt``, columns that the pipeline takes per prompt are read: further texts
    (``negative_prompt``, ``prompt_2``), and paths of pictures (``image``, ``mask_image``,
    ``control_image``) from the file's folder. Other columns are left alone.

    Args:
        source: of the prompts.
        parameters: names of the arguments that the pipeline's call takes.
        labels: they are class labels.

    Raises:
        EvenkeelError: the file cannot be read, or nobody can tell what in it is a prompt.

    """
    if source.endswith(".safetensors"):
        return _embeddings(source, parameters)
    rows = _rows(source, _text(source))
    if not rows:
        raise EvenkeelError(f"{source} holds no prompts; expected {FORMS}.")
    return _prompts(source, rows, parameters, labels)


def _text(source: str) -> str:
    try:
        if source == "-":
            content = getattr(sys.stdin, "buffer", sys.stdin).read()
        else:
            content = Path(source).read_bytes()
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogateescape")
        code = next((code for mark, code in _MARKS.items() if content.startswith(mark)), "utf-8")
        text = str(content, code)
    except (OSError, ValueError) as e:
        raise EvenkeelError(
            f"the prompts file {source!r} cannot be read: {e}. Save it as text in UTF-8."
        ) from e
    odd = next((c for c in text if ord(c) < 32 and c not in "\t\n\r\f\v"), None)
    if odd is not None:
        raise EvenkeelError(
            f"the prompts file {source!r} holds the character {odd!r}: it is no text, or text in another "
            f"encoding (UTF-16 without its mark?). Save it as text in UTF-8."
        )
    return text


def _rows(source: str, text: str) -> list[Row]:
    """One entry per prompt, by the names of the columns in lower case."""
    kind = Path(source).suffix.lower()
    if kind in (".json", ".jsonl", ".ndjson") or _JSON.match(text):
        return _of_json(source, text)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = "\t" if kind == ".tsv" else _delimiter(first)
    if kind in (".csv", ".tsv") or delimiter:
        return _of_table(source, text, delimiter or ",")
    rows: list[Row] = []
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if "\t" in line.strip():
            raise EvenkeelError(
                f"line {number} of {source} has columns, set apart by tabs, and no first line that names "
                f"them. Give the prompts' column the name prompt, or keep that column alone."
            )
        if line.strip():
            rows.append({"prompt": line.strip()})
    return rows[_plain(first) in _PROMPT :]


def _plain(name: str) -> str:
    return name.strip().strip('"').strip().lower()


def _delimiter(first: str) -> str:
    """What sets the names in a first line apart; "" where it names no prompts."""
    known = {*_PROMPT, *_LABEL}
    for delimiter in "\t,;|":
        names = [_plain(name) for name in first.split(delimiter)]
        if len(names) > 1 and known & {*names} and all(len(name) < 64 for name in names):
            return delimiter
    return ""


def _of_table(source: str, text: str, delimiter: str) -> list[Row]:
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except csv.Error as e:
        raise EvenkeelError(
            f"{source} is no table of prompts: {e}, near line {reader.line_num}."
        ) from e
    (_, head), *body = lines or [(0, [])]
    names = [_plain(name) for name in head]
    rows = []
    for number, line in body:
        if len(line) > len(names) and any(cell.strip() for cell in line[len(names) :]):
            raise EvenkeelError(
                f"line {number} of {source} has {len(line)} columns, its first line names {len(names)}: "
                f"{', '.join(names)}. Put texts that contain {delimiter!r} into double quotes."
            )
        rows.append({name: cell.strip() for name, cell in zip(names, line, strict=False)})
    return rows


def _of_json(source: str, text: str) -> list[Row]:
    try:
        return _rows_in(json.loads(text))
    except json.JSONDecodeError as whole:
        try:
            return [
                row for line in text.splitlines() if line.strip() for row in _one(json.loads(line))
            ]
        except ValueError:
            raise EvenkeelError(f"{source} is neither JSON ({whole}) nor JSON lines.") from whole
        except RecursionError as e:
            raise EvenkeelError(f"{source} is nested too deeply to be a list of prompts.") from e
    except RecursionError as e:
        raise EvenkeelError(f"{source} is nested too deeply to be a list of prompts.") from e
    except _NoRows as e:
        raise EvenkeelError(f"{source} holds {e}; expected {FORMS}.") from e


class _NoRows(ValueError):
    """JSON in which no rows are found."""


def _one(value: Any) -> list[Row]:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return [{"prompt": value}]
    if isinstance(value, dict):
        return [{str(key).strip().lower(): v for key, v in value.items()}]
    raise _NoRows(f"{type(value).__name__} where a prompt belongs")


def _rows_in(value: Any) -> list[Row]:
    if isinstance(value, list):
        return [row for each in value for row in _one(each)]
    if not isinstance(value, dict):
        return _one(value)
    if value and all(isinstance(v, dict) for v in value.values()):  # by id, as MJHQ has them
        return [row for each in value.values() for row in _one(each)]
    (row,) = _one(value)
    columns = {k: v for k, v in row.items() if isinstance(v, list)}
    name = next((n for n in _PROMPT if n in columns), None)
    if name is not None and all(not isinstance(v, dict) for v in columns[name]):
        count = len(columns[name])
        if any(len(v) != count for k, v in columns.items() if k in _PROMPT):
            raise _NoRows("columns of different lengths")
        fitting = {k: v for k, v in columns.items() if len(v) == count}
        return [{k: v[i] for k, v in fitting.items()} for i in range(count)]
    inside = next((columns[n] for n in _WRAPPED if n in columns), None)
    if inside is not None:
        return _rows_in(inside)
    if not {*row} & {*_PROMPT, *_LABEL}:
        raise _NoRows(f"an object with {', '.join(map(str, [*value][:8])) or 'nothing'} in it")
    return [row]


def _prompts(
    source: str, rows: Sequence[Row], parameters: Collection[str], labels: bool
) -> Prompts:
    known = (*_LABEL, *_PROMPT) if labels else _PROMPT
    name = next((n for n in known if all(n in row for row in rows)), None)
    if name is None:
        found = ", ".join(dict.fromkeys(key for row in rows for key in row))
        raise EvenkeelError(
            f"{source} has no {'class label' if labels else 'prompt'} in every row: expected one of "
            f"{', '.join(known)}; its columns are {found or 'without names'}."
        )
    values: list[Any] = []
    for number, row in enumerate(rows, 1):
        values.append(_label(row[name], source) if labels else _cell(row, name, source, number))
    inputs: dict[str, list[Any]] = {}
    for column in sorted({key for row in rows for key in row} & {*parameters}):
        if column in text_names():
            inputs[column] = [_cell(row, column, source, i) for i, row in enumerate(rows, 1)]
        elif column in _PICTURES:
            inputs[column] = [_picture(row, column, source, i) for i, row in enumerate(rows, 1)]
    return Prompts.of(values, **inputs)


def _cell(row: Row, name: str, source: str, number: int) -> str:
    value = row.get(name)
    if not isinstance(value, str) or (name in _PROMPT and not value.strip()):
        raise EvenkeelError(
            f"row {number} of {source} has {value!r:.40} for {name}; expected a text in every row."
        )
    return value


def _label(value: Any, source: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise EvenkeelError(
            f"{source} holds {value!r:.40}; this pipeline takes class labels: expected one number per "
            f"line."
        ) from None


def _picture(row: Row, name: str, source: str, number: int) -> Image.Image:
    path = Path(source if source != "-" else ".").parent / _cell(row, name, source, number)
    try:
        with Image.open(path) as picture:
            return picture.convert("L" if "mask" in name else "RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise EvenkeelError(
            f"row {number} of {source} names {path} as {name}, which is no picture: {e}."
        ) from e


def _embeddings(source: str, parameters: Collection[str]) -> Prompts:
    """Tensors by the names of the pipeline's arguments; the texts may be among the metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = json.loads((file.metadata() or {}).get("prompts", "null"))
    except (OSError, ValueError, RecursionError, SafetensorError) as e:
        raise EvenkeelError(f"the prompts file {source!r} cannot be read: {e}.") from e
    foreign = sorted({*tensors} - {*parameters})
    if foreign or not tensors:
        raise EvenkeelError(
            f"{source} holds {', '.join(foreign) or 'no tensors'}; expected tensors with the names of "
            f"arguments that the pipeline takes per prompt: "
            f"{', '.join(sorted(p for p in parameters if 'embeds' in p or 'mask' in p)) or 'none'}."
        )
    if said is not None and not (isinstance(said, list) and all(isinstance(s, str) for s in said)):
        raise EvenkeelError(f"the metadata of {source} has prompts that are no list of texts.")
    return Prompts.of(said, **tensors)
