"""The rooms of the quantizers stand one on the other: no import runs back up, and none in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import evenkeel.quantizers

ROOT = Path(evenkeel.quantizers.__file__).parent
PACKAGE = "evenkeel.quantizers"
ROOMS = ("numbers", "rounding", "layers", "saved", "workspace", "methods")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *(p for p in parts if p != "__init__")))


def imported(source: str) -> Iterable[str]:
    """Every module of the package that is named: for type checking and inside functions, too."""
    for node in ast.walk(ast.parse(source)):
        found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found = [str(node.module), *(f"{node.module}.{a.name}" for a in node.names)]
        yield from (f for f in found if f.startswith(f"{PACKAGE}."))


FILES = {name_of(p): p for p in ROOT.rglob("*.py")}
GRAPH = {
    name: {i for i in imported(path.read_text()) if i in FILES} for name, path in FILES.items()
}


def back_up(graph: Mapping[str, Iterable[str]]) -> list[str]:
    room = {name: [*name.split("."), ""][2] for name in graph}
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if room[name] and ROOMS.index(room[other]) > ROOMS.index(room[name])
    ]


def test_no_module_comes_back_to_itself() -> None:
    assert len(GRAPH) > 30
    assert sum(map(len, GRAPH.values())) > 100
    order = list(TopologicalSorter(GRAPH).static_order())
    assert order[-1] == PACKAGE


def test_rooms_stand_one_on_the_other() -> None:
    assert {name.split(".")[2] for name in GRAPH if name != PACKAGE} == set(ROOMS)
    assert back_up(GRAPH) == []


def test_a_circle_would_be_found() -> None:
    below, above = f"{PACKAGE}.saved.report", f"{PACKAGE}.methods.base"
    source = f"def later():\n    from {above} import Method\n"
    assert above in set(imported(source))
    graph = {**GRAPH, below: {*GRAPH[below], above}}
    assert back_up(graph) == [f"{below} imports {above}"]
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())
