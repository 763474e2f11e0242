"""How many threads a run computes with: what torch and numpy take by themselves makes them fight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits
from torch import nn

# A matrix product of a network below this is done before a second thread has woken up.
SMALL = 30_000_000  # parameters


@contextmanager
def sensible_threads(network: nn.Module) -> Iterator[None]:
    """Inside, numpy and scipy compute on one thread, and so does torch where the network is small.

    Between two calls of a denoiser the idle threads of one library spin on the processors that the other
    one wants: with both at their defaults a fit takes up to forty times as long as with one thread each.
    A network on another device, or a large one, keeps torch's threads. Afterwards all is as it was.

    Args:
        network: the denoiser of the run.

    >>> before = torch.get_num_threads()
    >>> with sensible_threads(nn.Linear(2, 2)):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True

    """
    parameters = list(network.parameters())
    on_processor = all(p.device.type == "cpu" for p in parameters)
    small = on_processor and sum(p.numel() for p in parameters) < SMALL
    before = torch.get_num_threads()
    with threadpool_limits(limits=1, user_api="blas"):
        if small:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
