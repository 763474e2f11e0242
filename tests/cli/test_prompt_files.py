"""Prompt files as people have them: what is no prompt never becomes one."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from evenkeel.cli import sources
from evenkeel.cli.prompt_files import read_prompts
from evenkeel.cli.sources import _first
from evenkeel.errors import EvenkeelError
from evenkeel.zoo.pictures import KINDS

TWO = ["a cat on a mat", "two dogs, in the rain"]
TAKES = {"prompt", "negative_prompt", "image", "mask_image", "prompt_embeds", "height"}


def read(folder: Path, content: bytes | str, name: str = "p.txt", **options: Any) -> Any:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(str(file), TAKES, **options)


PARTI = "Prompt\tCategory\tChallenge\tNote\n" + "".join(f"{p}\tAnimals\tBasic\t\n" for p in TWO)
DRAWBENCH = 'Prompts,Category\na cat on a mat,Colors\n"two dogs, in the rain",Counting\n'
MJHQ = json.dumps({f"id{i}": {"category": "x", "prompt": p} for i, p in enumerate(TWO)}, indent=1)
GENEVAL = "".join(json.dumps({"tag": "one", "include": [{}], "prompt": p}) + "\n" for p in TWO)
AS_PEOPLE_HAVE_THEM: dict[str, tuple[str, bytes | str]] = {
    "lines": ("p.txt", "\n".join(TWO)),
    "no ending": ("prompts", "\n".join(TWO)),
    "Windows": ("p.txt", "\r\n\r\n".join(TWO) + "\r\n"),
    "old Mac": ("p.txt", "\r".join(TWO)),
    "Notepad": ("p.txt", b"\xef\xbb\xbf" + "\r\n".join(TWO).encode()),
    "PowerShell": ("p.txt", "\r\n".join(TWO).encode("utf-16")),
    "UTF-32": ("p.txt", "\n".join(TWO).encode("utf-32")),
    "PartiPrompts": ("PartiPrompts.tsv", PARTI),
    "PartiPrompts as text": ("p.txt", PARTI),
    "PartiPrompts, Windows, marked": (
        "p.tsv",
        b"\xef\xbb\xbf" + PARTI.replace("\n", "\r\n").encode(),
    ),
    "DrawBench": ("DrawBench.csv", DRAWBENCH),
    "DrawBench as text": ("p.txt", DRAWBENCH),
    "Excel in Europe": ("p.csv", 'Nr;Prompt\n1;a cat on a mat\n2;"two dogs, in the rain"\n'),
    "DPG-Bench": ("dpg.csv", 'item_id,text\n1,a cat on a mat\n2,"two dogs, in the rain"\n'),
    "one column": ("p.csv", 'prompt\na cat on a mat\n"two dogs, in the rain"\n'),
    "one column as text": ("p.txt", "Prompt\n" + "\n".join(TWO)),
    "MJHQ": ("meta_data.json", MJHQ),
    "MJHQ as text": ("p.txt", MJHQ),
    "JSON list": ("p.json", json.dumps(TWO)),
    "JSON list as text": ("p.txt", json.dumps(TWO, indent=2)),
    "JSON list, marked": ("p.json", b"\xef\xbb\xbf" + json.dumps(TWO).encode()),
    "JSON objects": ("p.json", json.dumps([{"prompt": p, "seed": 1} for p in TWO])),
    "JSON columns": ("p.json", json.dumps({"prompt": TWO, "category": ["a", "b"], "n": 2})),
    "JSON in a list called prompts": ("p.json", json.dumps({"version": 1, "prompts": TWO})),
    "COCO": (
        "captions.json",
        json.dumps({"info": {}, "annotations": [{"caption": p} for p in TWO]}),
    ),
    "GenEval": ("evaluation_metadata.jsonl", GENEVAL),
    "JSON lines as text": ("p.txt", GENEVAL),
    "JSON lines of texts": ("p.jsonl", "\n".join(map(json.dumps, TWO))),
}


@pytest.mark.parametrize("case", AS_PEOPLE_HAVE_THEM)
def test_files_as_people_have_them(tmp_path: Path, case: str) -> None:
    name, content = AS_PEOPLE_HAVE_THEM[case]
    assert read(tmp_path, content, name).texts == TWO


REFUSED: dict[str, tuple[str, bytes | str, str]] = {
    "Latin-1": ("p.txt", "caf\xe9\ntwo".encode("latin-1"), "UTF-8"),
    "UTF-16 without its mark": ("p.txt", "\n".join(TWO).encode("utf-16-le"), "UTF-8"),
    "half of UTF-16": ("p.txt", b"\xff\xfea", "UTF-8"),
    "a picture": ("p.txt", b"\x89PNG\r\n\x1a\n\0\0", "cannot be read"),
    "nothing": ("p.txt", " \n\r\n", "no prompts"),
    "names alone": ("p.csv", "prompt,category\n", "no prompts"),
    "columns without names": ("p.txt", "a cat\tAnimals\na dog\tAnimals\n", "tabs"),
    "no column of prompts": ("p.tsv", "Sentence\tKind\na cat\tx\n", "sentence, kind"),
    "CSV without names": ("p.csv", '"a cat, on a mat"\n"a dog"\n', "a cat, on a mat"),
    "too many columns": ("p.csv", "prompt,category\na cat, on a mat,x\n", "3 columns"),
    "an open quote": ("p.csv", 'prompt,category\n"a cat,x\na dog,y\n', "no table"),
    "an empty cell": ("p.csv", "prompt,category\n,x\n", "row 1"),
    "half of a JSON file": ("p.txt", json.dumps(TWO)[:-4], "neither JSON"),
    "half of JSON lines": ("p.jsonl", GENEVAL[:-8], "neither JSON"),
    "JSON without prompts": ("p.json", '{"a": 1, "b": 2}', "a, b"),
    "a prompt that is none": ("p.json", '[{"prompt": null}]', "row 1"),
    "not every row": ("p.json", '[{"prompt": "a"}, {"text": "b"}]', "every row"),
    "deep": ("p.json", "[" * 100_000, "nested|neither"),
    "a number": ("p.json", "[1.5]", "float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_can_read_as_prompts_is_refused(tmp_path: Path, case: str) -> None:
    name, content, expected = REFUSED[case]
    with pytest.raises(
        EvenkeelError, match=f"(?s)p\\.[a-z]+.*({expected})|({expected}).*p\\.[a-z]+"
    ):
        read(tmp_path, content, name)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for source in (str(tmp_path), str(tmp_path / "none.txt"), str(tmp_path / "none.safetensors")):
        with pytest.raises(EvenkeelError, match="cannot be read"):
            read_prompts(source, TAKES)


plain = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.lists(plain, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=4)
)
@example(texts=['say "hi"', "a; b, c | d", "[photo] of {one|two}"])
def test_every_form_gives_the_same_prompts_or_is_refused(tmp_path: Path, texts: list[str]) -> None:
    quoted = "".join('"' + t.replace('"', '""') + '",x\n' for t in texts)
    forms = {
        "p.csv": f"prompt,kind\n{quoted}",
        "p.json": json.dumps(texts),
        "p.jsonl": "\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in texts),
    }
    for name, content in forms.items():
        assert read(tmp_path, content, name).texts == texts
    try:
        found = read(tmp_path, "\n".join(texts)).texts
    except EvenkeelError:
        return  # it looks like JSON, or like a table
    assert found == texts or texts[0].strip('"').lower() in ("prompt", "prompts", "text")


def test_columns_that_the_pipeline_takes_go_with_the_prompts(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [
        {"prompt": p, "negative_prompt": f"no {i}", "image": f"{i}.png", "height": 3}
        for i, p in enumerate(TWO)
    ]
    found = read(tmp_path, json.dumps(rows), "p.json")
    given = found[1:].arguments({"prompt": None})
    assert given["negative_prompt"] == ["no 1"] and given["image"][0].getpixel((0, 0)) == (1, 0, 0)
    assert set(given) == {"prompt", "negative_prompt", "image"}
    for broken in ({"negative_prompt": None}, {"image": "none.png"}, {"image": "p.json"}):
        with pytest.raises(EvenkeelError, match="row 2"):
            read(tmp_path, json.dumps([rows[0], {**rows[1], **broken}]), "p.json")


def test_embeddings_come_as_tensors_with_their_texts_beside(tmp_path: Path) -> None:
    file, tensors = str(tmp_path / "p.safetensors"), {"prompt_embeds": torch.rand(2, 3, 4)}
    save_file(tensors, file)
    found = read_prompts(file, TAKES)
    assert found.texts == ["0", "1"] and found.embedded
    save_file(tensors, file, {"prompts": json.dumps(TWO)})
    assert read_prompts(file, TAKES)[1:].texts == TWO[1:]
    given = read_prompts(file, TAKES)[1:].arguments({"prompt": None})
    assert given["prompt"] is None and torch.equal(
        given["prompt_embeds"], tensors["prompt_embeds"][1:]
    )
    for names, text in (({"weight": torch.ones(2)}, None), (tensors, '["one"]'), (tensors, "{")):
        save_file(names, file, None if text is None else {"prompts": text})
        with pytest.raises(EvenkeelError):
            read_prompts(file, TAKES)


def test_labels_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(tmp_path, "3\n7\n", labels=True).values == (3, 7)
    assert read(tmp_path, "class_label,name\n3,cat\n", "p.csv", labels=True).values == (3,)
    with pytest.raises(EvenkeelError, match="class labels"):
        read(tmp_path, "cat\n", labels=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff" + "\n".join(TWO)))
    assert read_prompts("-", TAKES).texts == TWO


def test_rows_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "call_parameters", lambda pipeline: {"prompt"})
    file = tmp_path / "many.txt"
    file.write_text("\n".join(f"p{i}" for i in range(10)))

    def read(rows: str, n: int | None = None) -> list[str]:
        return list(sources.load_prompts(f"{file}{rows}", None, n, 0).values)

    assert read("#:4") == ["p0", "p1", "p2", "p3"] and read("#8:") == ["p8", "p9"]
    assert read("#4:8", 2) == ["p4", "p5"] and len(read("")) == 10
    with pytest.raises(EvenkeelError, match="no prompts in the rows of"):
        read("#10:20")
    with pytest.raises(EvenkeelError, match="holds 2 prompts, 3 were asked for"):
        read("#8:", 3)
    (tmp_path / "many.txt#0:1").write_text("odd")
    assert read("#0:1") == ["odd"]


@pytest.mark.parametrize(
    ("holds", "count", "images", "fitted", "measured", "unseen"),
    [
        (16, None, 16, range(12), range(12, 16), "prompts and noise"),
        (16, None, 2, range(14), range(14, 16), "prompts and noise"),
        (16, 4, 16, range(4), range(4, 16), "prompts and noise"),
        (16, 16, 8, range(16), range(8), "noise"),
        (3, None, 16, range(3), range(3), "noise"),
        (16, None, 0, range(16), range(0), "noise"),
    ],
)
def test_restore_measures_on_prompts_that_it_does_not_fit_on(
    tmp_path, holds, count, images, fitted, measured, unseen
):
    from argparse import Namespace

    from evenkeel.cli.restoring import _prompts

    class Pipeline:
        def __call__(self, prompt: Any = None) -> None: ...

    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(holds)))
    asked = Namespace(prompts=str(file), count=count, images=images, seed=0)
    fit, others, said = _prompts(asked, Pipeline())
    assert fit.texts == [f"prompt {i}" for i in fitted]
    assert others.texts == [f"prompt {i}" for i in measured]
    assert said == unseen
    if holds == 3:
        with pytest.raises(EvenkeelError, match="holds 3 prompts, 4 were asked for"):
            _prompts(Namespace(**{**vars(asked), "count": 4}), Pipeline())


@pytest.mark.parametrize("name", KINDS)
def test_more_of_a_twins_prompts_are_the_same_ones_and_others(name: str) -> None:
    few, many = (_first(n, KINDS[name], 3) for n in (8, 300))
    assert len(few) == 8 and len(many) == 300 and many[:8] == few
