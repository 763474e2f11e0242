"""A denoiser for runs of which only the scheduler's side is of interest."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from evenkeel.hosts.pipeline.pipelines import uncompiled


def echo(denoiser: nn.Module) -> nn.Module:
    """A stand-in that computes its first answer and gives that to every other call of the same shapes.

    It is a shallow copy, with the same class, settings and parameters, and calls of the denoiser itself, in
    whatever thread, are not touched.

    >>> net = nn.Linear(2, 1)
    >>> stand_in, x = echo(net), Tensor([[1.0, 1.0]])
    >>> bool(stand_in(x) == stand_in(5 * x)), bool(net(x) == net(5 * x))
    (True, False)

    """
    own = uncompiled(denoiser)
    known: dict[Any, Any] = {}

    def forward(*arguments: Any, **named: Any) -> Any:
        values, form = tree_flatten((arguments, named))
        key = (str(form), *(v.shape if isinstance(v, Tensor) else None for v in values))
        if key not in known:
            known[key] = own.forward(*arguments, **named)
        return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, known[key])

    stand_in = copy.copy(own)
    stand_in.forward = forward
    return stand_in
