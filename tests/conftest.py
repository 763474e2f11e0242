"""Fixtures for all tests; modules that tests share lie in ``helpers``."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
import tqdm


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, and sums to the bit need as many in child processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_thread_survives() -> Iterator[None]:
    """Every strand that a test started has returned when it ends."""
    before = _our_threads()
    yield
    deadline = time.monotonic() + 5
    while _our_threads() - before and time.monotonic() < deadline:
        time.sleep(0.001)  # a finished strand still has to return from its last line
    assert _our_threads() - before == set()


def _our_threads() -> set[threading.Thread]:
    """Without the one that tqdm starts for the progress bars of other libraries."""
    return {t for t in threading.enumerate() if not isinstance(t, tqdm.TMonitor)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--rarely SEED``: which quarter of the tests marked ``rarely`` to run."""
    parser.addoption(
        "--rarely",
        default="0",
        help="a number: run one quarter of the tests marked rarely, four numbers in a row run them all; or "
        "'all', or 'none'",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked ``rarely`` whose turn it is not; files that start processes come first.

    These have few tests and take long: last, one of them would keep a single worker busy.
    """
    starts = {path: "subprocess" in path.read_text() for path in {i.path for i in items}}
    items.sort(key=lambda i: not starts[i.path])
    seed = config.getoption("--rarely")
    if seed == "all":
        return
    rare = sorted((i for i in items if i.get_closest_marker("rarely")), key=lambda i: i.nodeid)
    turn = rare[int(seed) % 4 :: 4] if seed != "none" else []
    left_out = {*rare} - {*turn}
    config.hook.pytest_deselected(items=[i for i in items if i in left_out])
    items[:] = [i for i in items if i not in left_out]
