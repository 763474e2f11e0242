"""What is done per denoiser call or step stays on the denoiser's device: a look at the source.

``tests/fitting/test_transfers.py`` counts what leaves while it runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import evenkeel

HOUSE = Path(evenkeel.__file__).parent

# Functions that see tensors of the denoiser's device, by file. Everything inside is meant but what
# runs on the CPU once the values are there.
PER_CALL = {
    "statistics/exact.py": (
        "working", "two_sum", "pair_sum", "add_pairs", "sum_pair", "product_pair", "_blocks", "check",
        "_words",
    ),
    "statistics/row_sums.py": ("add", "_open", "_alone", "_add_in_place"),
    "statistics/moments.py": ("pending",),
    "statistics/error_structure.py": ("pending_gram", "pending_spectrum"),
    "statistics/histogram.py": ("pending", "framed", "in_cells"),
    "statistics/residual.py": ("pending",),
    "statistics/marginals.py": ("add",),
    "corrections/reconstruction.py": ("pending",),
    "hosts/pipeline/denoiser_calls.py": ("finite", "pending_shares", "answer_of", "branches_of"),
    "hosts/scheduler/tape.py": ("before", "edit", "after"),
    "fitting/calibration/step_statistics.py": ("take",),
    "fitting/calibration/batch.py": ("see",),
    "fitting/lockstep/call.py": ("before", "branches"),
    "fitting/readout/head_call.py": ("before", "_pending", "after"),
    "fitting/readout/head_run.py": ("_denoise", "_capture", "_at_head", "rows", "_solve"),
    "fitting/readout/strategies.py": ("take", "_take_in", "_without", "_answer"),
    "fitting/readout/solve.py": ("take_in", "see"),
    "fitting/closed_loop/fit_tac.py": ("_of_branch", "_sums", "_mean_error", "state"),
    "fitting/closed_loop/fit_stepbaq.py": ("pending_error", "_quartiles"),
    "fitting/closed_loop/paused_call.py": ("edit", "after", "finite", "step_branches"),
    "fitting/refit/site.py": ("look", "_linear_error", "_convolution_error"),
}  # fmt: skip
ON_THE_CPU = ("finish", "known", "arrived")  # called with values that have arrived
METHODS = {"double", "cpu", "item", "numpy", "tolist", "nonzero", "unique", "bincount", "float64"}
CALLS = {"bool", "float"}
#: ``fold_index`` is made on the CPU, shares have arrived.
ALLOWED = {
    ("fitting/refit/site.py", "look", "nonzero"),
    ("fitting/readout/head_call.py", "_pending", "tolist"),
}


def functions(path: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse((HOUSE / path).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in PER_CALL[path]:
            yield node


def inside(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and child.name in ON_THE_CPU:
            continue
        yield child
        yield from inside(child)


def leaving(node: ast.AST) -> Iterator[str]:
    """Names in a function that bring something to the host, or ask for float64."""
    for part in inside(node):
        if isinstance(part, ast.Attribute) and part.attr in METHODS:
            yield part.attr
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in CALLS:
            yield part.func.id


@pytest.mark.parametrize("path", PER_CALL)
def test_nothing_is_brought_to_the_host_per_call(path: str) -> None:
    found = list(functions(path))
    assert {f.name for f in found} == set(PER_CALL[path]), (
        "a function was renamed: name it here too"
    )
    wrong = [
        f"{path}:{f.lineno} {f.name}: {name}"
        for f in found
        for name in leaving(f)
        if (path, f.name, name) not in ALLOWED and not _tells_dtypes(path, f.name, name)
    ]
    assert not wrong, wrong


def _tells_dtypes(path: str, name: str, what: str) -> bool:
    """Whether float64 is only asked about there: which way the sums go, or how precise a dtype is."""
    return what == "float64" and (path, name) in {
        ("statistics/exact.py", "sum_pair"),
        ("statistics/exact.py", "product_pair"),
        ("statistics/moments.py", "pending"),
        ("statistics/histogram.py", "framed"),
    }


def test_the_look_finds_what_it_looks_for() -> None:
    source = """
def f(x):
    a = x.cpu().double()
    def finish(y):
        return float(y.item())
    return bool(a.any())
"""
    (node,) = ast.parse(source).body
    assert sorted(leaving(node)) == ["bool", "cpu", "double"]


def test_float64_is_made_of_device_values_in_one_place() -> None:
    """Only ``exact`` may ask for the working dtype; others go through it."""
    users = [
        str(path.relative_to(HOUSE))
        for path in HOUSE.rglob("*.py")
        if "working_dtype" in path.read_text()
    ]
    assert sorted(users) == ["statistics/exact.py", "statistics/normal_equations.py"]


#: Float64 of what is on the CPU whatever the denoiser's device: moments, tables, what was brought home.
ON_THE_CPU_ALREADY = {
    "corrections/head_table.py", "corrections/ptqd.py", "corrections/stepbaq.py", "corrections/tac.py",
    "corrections/tcec.py", "fitting/adapters/final_samples.py", "fitting/calibration/batch.py",
    "fitting/lockstep/joined.py", "fitting/refit/site.py", "metrics/jackknife.py",
    "metrics/picture_statistics.py", "metrics/precision_recall.py", "quantizers/rounding/gptq.py",
}  # fmt: skip
ROOMS = ("corrections", "fitting", "hosts", "low_rank", "metrics", "quantizers")


def asking_for_float64(source: str) -> Iterator[int]:
    """Lines that turn a tensor into float64 without making sure that its device knows that."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        given = {ast.unparse(a) for a in (*node.args, *(k.value for k in node.keywords))}
        wide = node.func.attr == "double" or (
            node.func.attr in ("to", "sum", "type") and "torch.float64" in given
        )
        origin = ast.unparse(node.func.value)
        if wide and not any(at in origin for at in (".cpu()", "at_home(", "wide", ".numpy(")):
            yield node.lineno


@pytest.mark.parametrize("room", ROOMS)
def test_float64_is_asked_for_where_there_is_one(room: str) -> None:
    found = [
        f"{name}:{line}"
        for path in sorted((HOUSE / room).rglob("*.py"))
        if (name := str(path.relative_to(HOUSE))) not in ON_THE_CPU_ALREADY
        for line in asking_for_float64(path.read_text())
    ]
    assert not found, found


def test_the_look_for_float64_finds_it() -> None:
    lines = ["x.double()", "x.to(torch.float64)", "x.sum(dtype=torch.float64)", "x.cpu().double()"]
    assert [*asking_for_float64("\n".join(lines))] == [1, 2, 3]
