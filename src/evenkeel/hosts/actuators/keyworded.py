"""Hooks with keywords, on a denoiser that several threads call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def keyworded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook (a method) that does nothing where another thread takes it off just now.

    torch looks up in a table whether a hook takes keywords. Taking the hook off empties the table, also for
    a call in another thread that is about to reach it, which then comes without them. Such a call belongs to
    no run that the hook is for: these are over, or it would not be taken off.

    >>> class Hook:
    ...     @keyworded
    ...     def called(self, module, arguments, keywords):
    ...         return keywords
    >>> Hook().called("module", (), {"x": 1}), Hook().called("module", ())
    ({'x': 1}, None)

    """
    count = len(inspect.signature(hook).parameters) - 1

    @functools.wraps(hook)
    def called(self: Any, *given: Any) -> Any:
        return hook(self, *given) if len(given) == count else None

    return called
