"""A light hook on the denoiser: it notes that it was called, by whose run, and what it gave."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import Incompatible
from evenkeel.hosts.actuators.keyworded import keyworded
from evenkeel.hosts.pipeline.callers import is_inside
from evenkeel.hosts.pipeline.denoiser_calls import answer_of
from evenkeel.hosts.scheduler.groups import Turn

Answers = list[Tensor]


class Stamp:
    """Notes every call of one denoiser for one correction.

    Args:
        owner: whose runs count; held weakly.
        turn: told before every call whether it is one of these.
        light: nothing acts inside of the denoiser: in a compiled graph it is enough to note the call.

    Attributes:
        token: of the owner; a copied denoiser is recognised by it.
        is_dead: this is a copy, which notes nothing.

    """

    def __init__(self, owner: Any, turn: Turn, *, light: bool) -> None:
        self.token: str = owner.token
        self.is_dead = False
        self._owner = weakref.ref(owner)
        self._turn, self._light = turn, light
        self._here: Any = threading.local()
        self._traced = False
        self._inside: dict[int, bool] = {}

    def __reduce__(self) -> Any:
        return _dead, (self.token,)

    def __deepcopy__(self, memo: Any) -> Stamp:
        return _dead(self.token)

    def clear(self) -> None:
        """A run begins: earlier calls are none of it."""
        self._here.fresh, self._here.taken, self._here.answers = False, None, []
        self._traced = False

    @property
    def answers(self) -> Answers:
        """What the calls since the step before gave, in order."""
        return list(getattr(self._here, "answers", ()))

    def taken(self, timestep: Any) -> bool:
        """Whether the denoiser was called for this step, which uses the calls up.

        One call may serve several steps at the same timestep (the parts of a picture).
        """
        here = self._here
        if getattr(here, "fresh", False) or self._traced:
            here.fresh, self._traced = False, False
            here.taken = _key(timestep)
            return True
        return bool(getattr(here, "taken", None) == _key(timestep))

    @keyworded
    def called(self, denoiser: nn.Module, arguments: Any, keywords: Any) -> None:
        """Before a call."""
        if self._light and torch.compiler.is_compiling():
            self._traced = True
            return
        self._note(denoiser)

    def answered(self, denoiser: nn.Module, arguments: Any, output: Any) -> None:
        """After a call."""
        if self._light and torch.compiler.is_compiling():
            return
        self._keep(output)

    # Kept out of compiled graphs, which know neither threads nor stacks.
    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    def _note(self, denoiser: nn.Module) -> None:
        owner = None if self.is_dead else self._owner()
        if owner is None:
            return
        mine = owner.owns_call()
        if not self._light and _is_compiled(denoiser):
            self._refuse_mixture(denoiser, mine)
        self._turn.mine = mine
        if mine:
            if not getattr(self._here, "fresh", False):
                self._here.answers = []
            self._here.fresh = True

    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    def _keep(self, output: Any) -> None:
        if self.is_dead:
            return
        self._inside.pop(threading.get_ident(), None)
        if output is not None and self._turn.mine:
            self._here.answers.append(answer_of(output).detach())

    def _refuse_mixture(self, denoiser: nn.Module, mine: bool) -> None:
        """A compiled graph is told by all threads at once what it adds: two that differ cannot be in it."""
        here = threading.get_ident()
        for thread, theirs in list(self._inside.items()):
            if thread != here and (mine or theirs) and is_inside(thread, denoiser):
                raise Incompatible(
                    f"this compiled {type(denoiser).__name__} is called in two threads at once, with a "
                    f"correction that acts inside of it. A graph cannot tell them apart: give each thread "
                    f"a torch.compile(module) of its own copy, or do not compile the denoiser."
                )
        self._inside[here] = mine


def _is_compiled(denoiser: nn.Module) -> bool:
    return hasattr(denoiser, "_orig_mod") or denoiser._compiled_call_impl is not None


def _dead(token: str) -> Stamp:
    stamp = Stamp.__new__(Stamp)
    stamp.token, stamp.is_dead = token, True
    stamp._light, stamp._turn = True, Turn()
    stamp._here, stamp._traced, stamp._inside = threading.local(), False, {}
    return stamp


def _key(timestep: Any) -> Any:
    if not isinstance(timestep, Tensor):
        return float(timestep)
    # On a device its place in the schedule tells as much, and need not be waited for.
    return float(timestep) if timestep.device.type == "cpu" else timestep.data_ptr()
