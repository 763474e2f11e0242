"""The timestep that a denoiser is told, for layers inside that depend on it.

Nothing is counted and nothing is kept between calls: each call of the denoiser notes what it was told
where only its own thread sees it, so calls in any order, from several threads, of the original and of
copies do not disturb each other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError

NAMES = ("timestep", "timesteps", "t")
_TOLD: ContextVar[Told | None] = ContextVar("told timestep", default=None)
_SUBCLASSES: dict[type, type] = {}


class Told:
    """The timesteps of one call, one per row of the batch, or one for all.

    >>> Told(torch.tensor([700, 700])).entry((900.0, 600.0, 300.0))
    1
    >>> Told(torch.tensor([700, 310])).entry((900.0, 600.0, 300.0))
    (1, 2)

    """

    def __init__(self, timestep: Any) -> None:
        given = torch.as_tensor(timestep).detach()
        if given.ndim > 1:
            raise QuantizationError(
                f"expected one timestep, or one per row; the denoiser was told a tensor of shape "
                f"{tuple(given.shape)}. Scales of inputs per sampling step cannot be looked up."
            )
        times = given.cpu().double().flatten().tolist()
        self.times: tuple[float, ...] = tuple(times[:1] if len(set(times)) == 1 else times)
        self._entries: dict[tuple[float, ...], int | tuple[int, ...]] = {}

    def entry(self, levels: tuple[float, ...]) -> int | tuple[int, ...]:
        """Place of the nearest of ``levels``, one for all rows or one for each; of two the first."""
        found = self._entries.get(levels)
        if found is None:
            each = tuple(nearest(levels, time) for time in self.times)
            found = self._entries[levels] = each[0] if len(set(each)) == 1 else each
        return found


def nearest(levels: Sequence[float], time: float) -> int:
    """Place of the level nearest to ``time``, which a network knows its noise by.

    >>> nearest((900.0, 600.0), 700.0)
    1
    """
    return min(range(len(levels)), key=lambda i: abs(levels[i] - time))


def told() -> Told:
    """What the denoiser that is computing in this thread was told.

    Raises:
        QuantizationError: none is.

    """
    found = _TOLD.get()
    if found is None:
        raise QuantizationError(
            "this layer rounds its input on scales of its own for each sampling step, and the denoiser's "
            "timestep is not known here: call the denoiser as a whole."
        )
    return found


def tell(denoiser: nn.Module) -> None:
    """From now on this denoiser, and copies of it, note for their layers which timestep they are told.

    The instance gets a subclass of its own class with the same name, as ``deepcopy``, saving and the
    inspection of signatures need it.

    Raises:
        QuantizationError: its ``forward`` takes no timestep.

    """
    base = type(denoiser)
    if getattr(base, "_evenkeel_told", False):
        return
    if base not in _SUBCLASSES:
        _SUBCLASSES[base] = _subclass(base)
    denoiser.__class__ = _SUBCLASSES[base]


def _subclass(base: type) -> type:
    inner: Any = base.forward  # type: ignore[attr-defined]
    taken = list(inspect.signature(inner).parameters)[1:]
    name = next((n for n in taken if n in NAMES), None)
    if name is None:
        raise QuantizationError(
            f"expected a denoiser whose forward takes one of {NAMES}; {base.__name__} takes {taken}. "
            "Inputs cannot have scales of their own for each sampling step."
        )
    place = taken.index(name)

    @functools.wraps(inner)
    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = keywords[name] if name in keywords else arguments[place]
        mark = _TOLD.set(Told(given))
        try:
            return inner(self, *arguments, **keywords)
        finally:
            _TOLD.reset(mark)

    members = {
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_evenkeel_told": True,
    }
    return type(base.__name__, (base,), members)


def spread(table: Tensor, entry: int | tuple[int, ...], x: Tensor) -> Tensor:
    """(levels,) -> the entry of a call, or of each of its rows, so that it broadcasts over ``x``.

    Raises:
        QuantizationError: rows of different timesteps, and ``x`` has not one row for each.

    """
    if isinstance(entry, int):
        return table[entry]
    if len(entry) != len(x):
        raise QuantizationError(
            f"the denoiser was told {len(entry)} different timesteps, and {len(x)} rows enter a layer whose "
            "scales depend on them: which row has which is not known. Call it once per timestep."
        )
    return table[list(entry)].reshape(-1, *(1,) * (x.ndim - 1))
