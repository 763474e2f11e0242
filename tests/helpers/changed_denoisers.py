"""Copies of a denoiser with a known error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def twin(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the denoiser whose prediction goes through ``change``."""
    copied: Any = copy.deepcopy(model)
    inner = copied.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        found = out if isinstance(out, tuple) else (out.sample,)
        changed = (change(found[0]), *found[1:])
        return changed if isinstance(out, tuple) else type(out)(sample=changed[0])

    copied.forward = forward
    copied.evenkeel_quantizer = "twin"
    return copied
