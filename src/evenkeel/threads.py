"""How many threads a computation takes: what torch and numpy take by themselves makes them fight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits
from torch import nn

# An operation on fewer numbers is done before a second thread has woken up; where another process has
# that thread's processor, all the others wait for it.
SMALL = 30_000_000


@contextmanager
def sensible_threads(work: nn.Module | int) -> Iterator[None]:
    """Inside, numpy and scipy compute on one thread, and so does torch where the work is small.

    Between two calls of a denoiser the idle threads of one library spin on the processors that the other
    one wants: with both at their defaults a fit takes up to forty times as long as with one thread each.
    A network on another device, or a large one, keeps torch's threads. Afterwards all is as it was.

    Args:
        work: the denoiser of the run, or how many numbers are computed with, on the CPU.

    >>> before = torch.get_num_threads()
    >>> with sensible_threads(nn.Linear(2, 2)):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True

    """
    before = torch.get_num_threads()
    with threadpool_limits(limits=1, user_api="blas"):
        if _numbers(work) < SMALL:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


def _numbers(work: nn.Module | int) -> float:
    if isinstance(work, int):
        return work
    parameters = list(work.parameters())
    on_processor = all(p.device.type == "cpu" for p in parameters)
    return sum(p.numel() for p in parameters) if on_processor else float("inf")
