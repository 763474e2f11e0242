"""What is said about the package in several places agrees; the built wheel works without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import evenkeel

ROOT = Path(__file__).parents[2]


def _version(place: str, pattern: str) -> str:
    (found,) = re.findall(pattern, (ROOT / place).read_text(), re.MULTILINE)
    return str(found)


def test_one_version_everywhere() -> None:
    found = {
        _version("pyproject.toml", r'^version = "(.+)"'),
        _version("integrations/comfyui/pyproject.toml", r'^version = "(.+)"'),
        _version("integrations/comfyui/pyproject.toml", r'"evenkeel>=(.+)"'),
        _version("CITATION.cff", r"^version: (.+)"),
        re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0],
    }
    assert found == {evenkeel.__version__}


def test_the_library_is_typed_and_knows_no_comfyui() -> None:
    assert (Path(evenkeel.__file__).parent / "py.typed").is_file()
    for path in Path(evenkeel.__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (comfy|folder_paths)\b", path.read_text(), re.M), (
            path
        )


def test_the_forge_does_what_ci_does() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "run: ./.ci/run" in text and "run: ./scripts/wheel" in text
    assert os.access(ROOT / "scripts/wheel", os.X_OK)


@pytest.mark.rarely
@pytest.mark.slow
def test_the_main_paths_run_from_the_wheel(tmp_path: Path) -> None:
    """With the dependencies of this environment lent, so that it takes seconds; RELEASE.md has the whole."""
    copy = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "zoo", "experiments", "dist", ".*_cache", "tests"
    )
    shutil.copytree(ROOT, copy, ignore=left_out)
    shutil.copytree(ROOT / "src/evenkeel/zoo", copy / "src/evenkeel/zoo", dirs_exist_ok=True)
    lent = {"EVENKEEL_LENT": sysconfig.get_path("purelib"), "EVENKEEL_WHEEL_ONLY": "1"}
    done = subprocess.run(
        [copy / "scripts/wheel"],
        env={**os.environ, **lent, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "main paths run" in done.stdout
