"""The documentation site: ``scripts/docs``. Sources are the checkout's own pages and docstrings."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "src")]

import generated_pages  # noqa: E402

import evenkeel  # noqa: E402

project, author = "evenkeel", "evenkeel contributors"
copyright = author
release = version = evenkeel.__version__
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# From the checkout's root, so that links between its folders are links between pages.
include_patterns = [
    "docs/*.md",
    "docs/generated/**",
    "*.md",
    "benchmarks/*.md",
    "experiments/*.md",
    "experiments/*/*/*.md",
    "integrations/comfyui/*.md",
]
exclude_patterns = ["README.md", "**/.*", ".*", "src", "tests", "zoo", "dist", "build"]

html_theme = "furo"
html_title = f"evenkeel {version}"
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
default_role = "code"
nitpicky = False
autodoc_typehints = "none"  # the signature shows them
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["toc.not_included"]  # tables of all rows, reached from the page about them


def as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: equations stay as they stand, and no sign in a sentence is markup."""
    out, before, literal = [], "", False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and literal and indent <= literal - 1:
            literal = False
        starts = bool(line.strip()) and not literal and out[-1:] == [""] and before.strip()
        if starts and indent >= len(before) - len(before.lstrip()) + 4:
            if not before.rstrip().endswith("::"):
                out += [" " * (len(before) - len(before.lstrip())) + ".. code-block:: text", ""]
            literal = indent
        out.append(line if literal or ">>>" in line else escaped(line))
        if line.strip():
            before = line
    lines[:] = out


def escaped(line):
    """Without what reStructuredText would take for markup, outside of code."""
    parts = re.split(r"(``[^`]*``|:\w+:`[^`]*`)", line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([|*])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", parts[i])
    return "".join(parts)


def setup(app):
    """Write the pages that are made from the code before any page is read."""
    app.connect("config-inited", lambda *_: generated_pages.write(ROOT / "docs" / "generated"))
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
