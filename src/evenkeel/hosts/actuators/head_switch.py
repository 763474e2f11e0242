"""Add the change of a step's head to what the denoiser's head gives.

Nothing is written into the denoiser: its state dict is the same at any moment, whatever ends a run, and a
call that belongs to nobody we know, in another thread or in between, gives what it always gave. The step is
the one that the denoiser is told.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.corrections.head_table import HeadTable, Place
from evenkeel.errors import Incompatible, UnsupportedPipeline
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.actuators.head_rows import Head, border, sizes
from evenkeel.hosts.actuators.heads import find_head, is_plain, layer_of
from evenkeel.hosts.actuators.keyworded import keyworded
from evenkeel.hosts.actuators.told_level import TIME_NAMES, argument_of
from evenkeel.hosts.pipeline.pipelines import forget_graphs
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.hosts.scheduler.places import Places
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw

Change = tuple[Tensor, Tensor]  # (O, F) or a convolution's (O, C, *kernel), and (O,)


class HeadSwitch(Interceptor):
    """Adds every step's change between ``attach`` and ``detach``.

    Args:
        table: heads over noise levels.
        denoiser: whose head is changed.
        head: the layer's name.
        allow_range: keep the original head outside the fitted levels instead of raising.

    Raises:
        Incompatible: the table does not fit this denoiser's head.

    """

    on_denoiser = True

    def __init__(
        self, table: HeadTable, denoiser: nn.Module, head: str, *, allow_range: bool = False
    ) -> None:
        self.table = table
        self.allow_range = allow_range
        self.head = find_head(denoiser, head)
        if tuple(table.weight.shape[2:]) != (self.head.features, self.head.targets):
            raise Incompatible(
                f"the readout changes a head of {tuple(table.weight.shape[2:])} (features, outputs); "
                f"{head} of this {type(denoiser).__name__} has "
                f"{(self.head.features, self.head.targets)}."
            )
        self._denoiser: weakref.ref[nn.Module] | None = weakref.ref(denoiser)
        self._scheduler: weakref.ref[Any] | None = None
        self._handles: list[Any] = []
        self._places: Places | None = None
        self._key: tuple[float, ...] = ()
        self._where: list[Place | None] = []
        self._heads: dict[tuple[int, int], Change | None] = {}
        self._last, self._branch = -1, 0
        self._said = False
        self._law: StepLaw | None = None
        self._here: Any = threading.local()
        self._traced: Change | None = None  # what a compiled graph adds: it knows no threads

    @classmethod
    def of(cls, corrector: Corrector, denoiser: nn.Module) -> HeadSwitch:
        """For the heads that the correction declares.

        Raises:
            Incompatible: it declares none, or one that does not fit.

        """
        heads = corrector.correction.heads
        if heads is None:
            raise Incompatible(
                f"{corrector.correction.name} declares the stage 'head' but no heads (see "
                f"evenkeel.corrections.Correction.heads)."
            )
        return cls(heads.table, denoiser, heads.layer, allow_range=corrector.allow_range)

    @property
    def counts_calls(self) -> bool:
        """Whether a step has a head per guidance branch."""
        return self.table.branches > 1

    def __getstate__(self) -> dict[str, Any]:
        # A copied scheduler must not take a copy of the denoiser along: it switches nothing.
        lost = dict.fromkeys(("_denoiser", "_scheduler", "_places", "_here", "_traced"))
        return {**self.__dict__, **lost, "is_dead": True, "_handles": [], "_heads": {}}

    def attach(self) -> None:
        """Listen to the denoiser; nothing changes before a run begins."""
        denoiser = self._denoiser() if self._denoiser is not None else None
        if denoiser is None or self._handles:
            return
        layer = layer_of(denoiser, self.head)
        forget_graphs(denoiser)
        self._handles = [
            denoiser.register_forward_pre_hook(self._called, with_kwargs=True),
            layer.register_forward_hook(self._add),
        ]

    def detach(self) -> None:
        """Listen no longer; a run that is only paused goes on where it was."""
        if self._handles and self._denoiser is not None and self._denoiser() is not None:
            forget_graphs(self._denoiser())  # type: ignore[arg-type]
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._put(None)

    def begin(self, scheduler: Any) -> None:
        """A new run; which of its steps is taken the denoiser is told."""
        if not self._handles:
            return
        if self._places is None or not self._places.belong_to(scheduler):
            self._places = Places(scheduler)
        self._places.restart()
        self._scheduler = weakref.ref(scheduler)
        sigmas = getattr(scheduler, "sigmas", None)
        key = (*self._places.times, *(sigmas.tolist() if isinstance(sigmas, Tensor) else ()))
        if key != self._key:
            law = probe_scheduler(scheduler)
            self._where = self.table.places(law.alpha[:-1], law.sigma[:-1])
            self._law, self._key, self._heads = law, key, {}
        self._last, self._branch = -1, 0

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """The step's calls have been made."""
        if self._last >= len(self._where) - 1 and self.turn is None:
            self._scheduler = None  # between runs the denoiser is itself
        self._branch = 0
        self._put(None)
        return result

    # Kept out of compiled graphs: a graph per step would be made.
    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    @keyworded
    def _called(self, denoiser: nn.Module, arguments: Any, keywords: Any) -> None:
        self._put(None)
        scheduler = None if self._scheduler is None else self._scheduler()
        if self.is_idle or scheduler is None or self._places is None:
            return
        try:
            told = argument_of(denoiser, arguments, keywords, TIME_NAMES)
        except UnsupportedPipeline:
            told = None
        step = self._places.of_call(scheduler, told)
        if step is None:
            self._say(told)
            return
        self._branch = self._branch if step == self._last else 0
        self._last = step
        branch = min(self._branch, self.table.branches - 1)
        self._branch += 1
        if step < len(self._where):
            like = next(
                (a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)), None
            )
            self._put(self._changed(step, branch, denoiser, like))

    def _put(self, change: Change | None) -> None:
        self._traced = change
        if self._here is not None:
            self._here.change = change

    def _changed(
        self, step: int, branch: int, denoiser: nn.Module, like: Tensor | None
    ) -> Change | None:
        """Where the denoiser computes, and in what; kept for the next run."""
        key = (step, branch)
        if key not in self._heads:
            self._heads[key] = self._made(step, branch, denoiser)
        found = self._heads[key]
        if found is None or like is None or not like.is_floating_point():
            return found
        if found[0].device != like.device or found[0].dtype != like.dtype:
            weight, constant = (part.to(like.device, like.dtype) for part in found)
            self._heads[key] = found = (weight, constant)
        return found

    def _made(self, step: int, branch: int, denoiser: nn.Module) -> Change | None:
        place, law = self._where[step], self._law
        if (
            place is None and law is not None
        ):  # a step that is taken: those that are not do not matter
            levels = law.alpha[:-1], law.sigma[:-1]
            self.table.refuse_outside(self._where, *levels, allow_range=self.allow_range)
        found = self.table.entry_at(place)
        if found is None:
            return None
        layer: Any = layer_of(denoiser, self.head)
        weight, constant = found[0][branch].T.contiguous(), found[1][branch]
        if self.head.kind == "convolution":
            weight = weight.reshape(self.head.targets, -1, *sizes(layer.kernel_size))
        return weight, constant

    def _say(self, told: Any) -> None:
        if not self._said:
            self._said = True
            warnings.warn(
                f"the denoiser was called at time {told}, which is none of the scheduler's timesteps: the "
                f"readout leaves this call alone.",
                UserWarning,
                stacklevel=2,
            )

    def _add(self, layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        tracing = torch.compiler.is_compiling()
        change = self._traced if tracing else getattr(self._here, "change", None)
        if change is None:
            return None
        x = arguments[0]
        weight, constant = (c.to(x.device, x.dtype) for c in change)
        return output + _applied(self.head, layer, x, weight, constant).to(output.dtype)


def _applied(head: Head, layer: Any, x: Tensor, weight: Tensor, constant: Tensor) -> Tensor:
    """What a head of this weight gives in the place of the layer."""
    if head.kind == "linear":
        return F.linear(x, weight, constant)
    kernel = sizes(layer.kernel_size)
    mode = str(layer.padding_mode)
    padded = F.pad(x, border(layer, kernel), mode="constant" if mode == "zeros" else mode)
    convolved = F.conv3d if len(kernel) == 3 else F.conv2d
    stride, dilation = sizes(layer.stride), sizes(layer.dilation)
    return convolved(padded, weight, constant, stride=stride, dilation=dilation)


@torch.no_grad()
def fold(denoiser: nn.Module, table: HeadTable, head: str) -> None:
    """Add a head that is the same at every step to the denoiser's own weights, for good.

    Raises:
        Incompatible: heads differ between steps, the table belongs to another head, or the layer's
            weights cannot be overwritten.

    """
    switch = HeadSwitch(table, denoiser, head)
    layer: Any = layer_of(denoiser, switch.head)
    weight, constant = table.entry(0)
    parts = (table.weight, table.scale, table.constant)
    if not all(torch.equal(part, part[:1, :1].expand_as(part)) for part in parts):
        raise Incompatible(
            "only one change shared by all steps can be folded into a checkpoint; this readout has a "
            "head per step. Fit it with form='shared'."
        )
    if not is_plain(layer):
        raise Incompatible(
            f"{head} of this {type(denoiser).__name__} is held by a quantization backend and cannot "
            f"be overwritten. Apply the readout at run time instead."
        )
    change = weight[0].T.reshape(layer.weight.shape).to(layer.weight.device)
    layer.weight.copy_(layer.weight.float() + change)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.float() + constant[0].to(layer.bias.device))
