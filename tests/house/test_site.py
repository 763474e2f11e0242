"""The pages that the code writes are whole; the site builds where Sphinx is installed."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evenkeel import errors
from evenkeel.corrections.catalogue import ALL, FORMS
from evenkeel.errors import EvenkeelError
from evenkeel.quantizers import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made() -> Any:
    spec = importlib.util.spec_from_file_location(
        "generated_pages", ROOT / "docs/generated_pages.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page_with_source_and_settings(made: Any) -> None:
    pages = made.corrections()
    assert [*pages] == [*ALL] and [*made.quantizers()] == [*METHODS]
    for name, page in pages.items():
        assert page.startswith(f"# {name}\n") and ".. autoclass:: evenkeel.corrections." in page
    shown = {form for form in FORMS if any(f"| `{form}` |" in page for page in pages.values())}
    # A combination has no settings of its own, and what is made from histograms needs a record with some.
    assert {"q-drift:published", "cnc:published", "ptqd:released"} <= shown


def test_every_error_says_why_and_what_to_do(made: Any) -> None:
    page = made.errors_page()
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, EvenkeelError) and kind is not EvenkeelError:
            (part,) = re.findall(rf"^## {kind.__name__}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.M)
            assert "To do:" in part, kind


def test_public_names_are_documented(made: Any) -> None:
    for name in made.MODULES:
        module = importlib.import_module(name)
        for each in made.public(module):
            thing = getattr(module, each)
            assert not callable(thing) or inspect.getdoc(thing), f"{name}.{each}"


def test_links_between_pages_stay_within_the_site() -> None:
    conf = (ROOT / "docs/conf.py").read_text()
    (patterns,) = re.findall(r"^include_patterns = (\[.*?\])", conf, re.DOTALL | re.MULTILINE)
    pages = {
        page
        for pattern in ast.literal_eval(patterns)
        for page in ROOT.glob(pattern)
        if page.suffix == ".md"
    }
    for page in pages - {ROOT / "README.md"}:
        for target in re.findall(r"\]\(([^)\s#:]+\.md)[)#]", page.read_text()):
            assert (page.parent / target).resolve() in pages, f"{page.name}: {target}"


@pytest.mark.rarely
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="pip install 'evenkeel[docs]'")
    asked = ["--fail-on-warning", "--keep-going", "-q", "-c", "docs", "-b", "html", ".", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *map(str, asked)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "docs/generated/corrections/q-drift.html").is_file()
