"""Runs compute with as many threads as they gain from, and leave the process as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from evenkeel import threads
from evenkeel.threads import sensible_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(limits=2, user_api="blas"):
        yield
    torch.set_num_threads(before)


def blas() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_a_small_network_computes_on_one_thread_and_all_is_as_it_was_whatever_happens() -> None:
    assert blas() == {2}
    seen = []

    def interrupted() -> None:
        with sensible_threads(nn.Linear(2, 2)):
            seen.append((torch.get_num_threads(), blas()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [(1, {1})]
    assert torch.get_num_threads() == 2 and blas() == {2}


def test_a_large_network_and_one_on_a_device_keep_torchs_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with sensible_threads(nn.Linear(2, 2, device="meta")):
        assert torch.get_num_threads() == 2 and blas() == {1}
    monkeypatch.setattr(threads, "SMALL", 6)
    with sensible_threads(nn.Linear(2, 2)):
        assert torch.get_num_threads() == 2
