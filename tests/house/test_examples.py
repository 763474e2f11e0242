"""Examples and docstrings run as they stand."""

import doctest
import importlib
import runpy
from pathlib import Path

import pytest

import evenkeel

ROOT = Path(evenkeel.__file__).parent
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
MODULES = sorted(
    ".".join(("evenkeel", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for p in ROOT.rglob("*.py")
    if ">>>" in p.read_text()
)


def often(path):
    """The longest in turn with other long tests."""
    return (
        pytest.param(path, marks=pytest.mark.rarely) if path.stem == "compare_quantizers" else path
    )


@pytest.mark.parametrize("path", [*map(often, EXAMPLES)], ids=lambda p: p.name)
def test_example_runs(path, capsys):
    for package in ("bitsandbytes", "comfy_kitchen", "gguf", "torchao"):
        if f"import {package}" in path.read_text() or f"from {package}" in path.read_text():
            pytest.importorskip(package)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out != ""


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_examples():
    assert len(EXAMPLES) >= 1
    assert len(MODULES) >= 5
