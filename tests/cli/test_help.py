"""The command's help: what people want first, and examples that run as they are printed."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from evenkeel.cli import build_parser, main

FIRST = ["restore", "compare", "quantize", "sample", "zoo"]
# In this order each finds what it needs. Of the others the words are checked, and the commands have tests.
ORDER = ["calibrate", "inspect", "quantize", "plan", "reproduce", "zoo list", "zoo path"]


def _parsers() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parsers = dict(found.choices)
    (actions,) = (
        a for a in parsers.pop("zoo")._actions if isinstance(a, argparse._SubParsersAction)
    )
    return parsers | {f"zoo {name}": p for name, p in actions.choices.items()}


EXAMPLES = {
    name: (parser.epilog or "").splitlines()[-1].strip() for name, parser in _parsers().items()
}


def test_help_shows_what_people_want_first() -> None:
    text = build_parser().format_help()
    wanted, experts = text.split("what people want first:")[1].split("for experts:")
    assert [line.split()[0] for line in wanted.splitlines() if line[:3].strip()] == FIRST
    listed = [
        line.split()[0] for line in experts.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert sorted({*listed, *FIRST}) == sorted({name.split()[0] for name in EXAMPLES})
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_a_command_line(name: str) -> None:
    words = shlex.split(EXAMPLES[name])
    assert words[0] == "evenkeel" and " ".join(words[1:]).startswith(name)
    options = build_parser().parse_args(words[1:])
    assert callable(options.run)


@pytest.mark.rarely
@pytest.mark.slow
def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ORDER:
        code = main(shlex.split(EXAMPLES[name])[1:])
        said = capsys.readouterr()
        assert code == 0, f"{EXAMPLES[name]}: {said.err}"
        assert said.out.strip(), name
    for place in ("record.safetensors", "quantized"):
        assert (tmp_path / place).exists(), place
