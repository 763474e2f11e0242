"""The house's rules about itself: imports point one way, the import is light, exports are real."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evenkeel

ROOT = Path(evenkeel.__file__).parent

# A module may import from its own row of the table in CONTRIBUTING.md and from any row above it.
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().splitlines()
    if line.startswith("| `")
]
LAYERS = [set(re.findall(r"`(\w+)`", row[0])) for row in TABLE]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MATHEMATICS = {
    n for names, row in zip(LAYERS, TABLE, strict=True) if row[2] == "mathematics" for n in names
}
FORBIDDEN_IN_MATHEMATICS = {
    "diffusers",
    "transformers",
    "logging",
    "tqdm",
    "safetensors",
    "json",
    "os",
    "io",
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def imported(path):
    """(line, dotted module) of every import in the file, type-checking ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "evenkeel":
                yield from ((node.lineno, f"evenkeel.{a.name}") for a in node.names)
            else:
                yield node.lineno, node.module


def home(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def violations(path, found):
    level = LEVEL[home(path)]
    for line, module in found:
        parts = module.split(".")
        if (
            parts[0] == "evenkeel"
            and len(parts) > 1
            and parts[1] in LEVEL
            and LEVEL[parts[1]] > level
        ):
            yield f"{path.name}:{line} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert home(path) in LEVEL, f"{path} has no place in the layers"
    assert list(violations(path, imported(path))) == []


def test_the_table_names_every_room_once():
    rooms = [name for names in LAYERS for name in names]
    assert sorted(rooms) == sorted({home(path) for path in FILES})
    assert {"errors", "sampling", "statistics", "corrections", "metrics"} < MATHEMATICS


def test_the_rule_can_fail():
    found = [(1, "evenkeel.cli"), (2, "evenkeel.errors")]
    assert list(violations(ROOT / "record.py", found)) == ["record.py:1 imports evenkeel.cli"]


@pytest.mark.parametrize(
    "path", [p for p in FILES if home(p) in MATHEMATICS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_mathematics_is_free_of_hosts_and_io(path):
    roots = {module.split(".")[0] for _, module in imported(path)}
    assert roots & FORBIDDEN_IN_MATHEMATICS == set()


def test_import_is_light():
    # A fresh interpreter: inside pytest the heavy modules are already loaded.
    code = "import sys, evenkeel; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_exported_names_exist():
    for name in evenkeel.__all__:
        assert getattr(evenkeel, name).__name__ == name
    assert set(evenkeel.__all__) <= set(dir(evenkeel))


def test_no_module_hides_an_exported_name():
    # Importing evenkeel.x sets the attribute x of the package, whatever was exported under it.
    homes = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert homes & set(evenkeel.__all__) == set()


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        evenkeel.nonsense  # noqa: B018


def test_nothing_is_pickled():
    for path in FILES:
        names = {module.split(".")[0] for _, module in imported(path)}
        source = path.read_text()
        assert "pickle" not in names, path
        assert "torch.load(" not in source and "allow_pickle" not in source, path


WRITES = re.compile(
    r"""\.write_(text|bytes)\(|\bsave_file\(|json\.dump\(|open\([^)]*["'][wx]b?["']"""
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_written_by_the_storage_room(path):
    if home(path) != "storage":
        assert WRITES.findall(path.read_text()) == []
