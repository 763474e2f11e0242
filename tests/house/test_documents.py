"""What the pages name exists, what they link to is there, and their tables are tables."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    p for folder in (".", "docs", "benchmarks", "experiments") for p in (ROOT / folder).glob("*.md")
)
every = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
FOLDERS = ("src", "tests", "docs", "benchmarks", "experiments", "examples", "scripts")


def text_of(page):
    """Without code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def broken_tables(text):
    """Rows without a head and a rule above them, and rows of another width."""
    found, above, width = [], [], 0
    for line in [*text.splitlines(), ""]:
        if not line.startswith("|"):
            if len(above) == 1:
                found.append(above[0])
            above = []
            continue
        cells = len(re.sub(r"\\\||`[^`]*`", "", line).strip().strip("|").split("|"))
        if not above:
            width = cells
        elif (len(above) == 1 and set(line) - set("|-: ")) or cells != width:
            found.append(line)
        above.append(line)
    return found


def missing_links(page, text):
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [
        t
        for t in targets
        # Building the site makes docs/generated.
        if not re.match(r"[a-z]+:|#|generated/", t)
        and not (page.parent / t.partition("#")[0]).exists()
    ]


def missing_paths(text):
    """Files and folders of the checkout that are named in code, as seen from its root."""
    named = re.findall(r"`([A-Za-z0-9_./-]+)`", text)
    inside = [n for n in named if n.split("/")[0] in FOLDERS and "/" in n]
    return [n for n in inside if not (ROOT / n).exists()]


def missing_names(text):
    """Dotted names of this library that cannot be looked up."""
    return [
        n for n in re.findall(r"\bevenkeel(?:\.[A-Za-z_][A-Za-z_0-9]*)+", text) if not is_there(n)
    ]


def is_there(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@every
def test_tables_are_whole(page):
    assert broken_tables(text_of(page)) == []


@every
def test_links_lead_somewhere(page):
    assert missing_links(page, text_of(page)) == []


@every
def test_paths_exist(page):
    assert missing_paths(text_of(page)) == []


@every
def test_names_exist(page):
    # Commands in code blocks, too.
    assert missing_names(page.read_text()) == []


def test_each_check_can_fail():
    head = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert broken_tables(head) == []
    assert broken_tables(head + "\n| 3 | 4 |\n") == ["| 3 | 4 |"]
    assert broken_tables(head + "\n| 3 | 4 |\n| 5 | 6 |\n") == ["| 5 | 6 |"]
    assert broken_tables(head + "| 3 |\n") == ["| 3 |"]
    assert missing_links(PAGES[0], "[a](nowhere.md#b) [c](https://x.y) [d](#e)") == ["nowhere.md#b"]
    assert missing_paths("`src/evenkeel` `src/nothing.py` `w4a16`") == ["src/nothing.py"]
    assert missing_names("evenkeel.calibrate evenkeel.record.Record.load evenkeel.x.y") == [
        "evenkeel.x.y"
    ]
    assert len(PAGES) > 10
