"""README: one screen, and its program runs as it stands (with fewer prompts and steps)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_a_screen_or_two_and_its_tables_are_short() -> None:
    assert len(TEXT.splitlines()) < 100
    tables = re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE)
    assert tables and all(len(table.splitlines()) <= 7 for table in tables)


def test_its_first_numbers_are_those_that_were_measured() -> None:
    found = json.loads((ROOT / "experiments" / "front_page.json").read_text(encoding="utf-8"))
    before, after = (f"{found[arm]['value']:.1f}" for arm in ("quantized", "restored"))
    change = "{value:+.1f} [{low:+.1f}, {high:+.1f}], {n} other images".format(**found["change"])
    for text in (TEXT, (ROOT / "docs" / "index.md").read_text(encoding="utf-8")):
        assert f"{before} to {after} dB" in " ".join(text.split())
    assert change in " ".join(TEXT.split())


def test_its_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shorter = program.replace("prompts(32", "prompts(4").replace('steps": 20', 'steps": 3')
    assert shorter.count("4, seed") == 1 and 'steps": 3' in shorter
    made: dict[str, object] = {}
    exec(compile(shorter, "README.md", "exec"), made)
    assert made["pipe"].transformer is made["quantized"]  # type: ignore[attr-defined]
    assert (tmp_path / "adapters.safetensors").is_file()
