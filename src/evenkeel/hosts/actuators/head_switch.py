"""Put the head of the coming step into the denoiser: one copy into existing memory per step.

The scheduler tells which step comes next, so nothing is looked up inside the denoiser: its graph, its
hooks and its parameters' addresses stay what they are, compiled or not. A head whose weight cannot be
overwritten (a quantization backend's, or one that offloading keeps elsewhere) gets the change added
beside it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.corrections.head_table import HeadTable
from evenkeel.errors import Incompatible
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.actuators.head_rows import Head, rows_as_outputs, rows_of
from evenkeel.hosts.actuators.heads import find_head, is_plain, layer_of
from evenkeel.hosts.pipeline.pipelines import forget_graphs
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.hosts.scheduler.tape import step_index

Change = tuple[Tensor, Tensor]  # (F, O) and (O,) float32


class HeadSwitch(Interceptor):
    """Selects the head of every step; ``attach`` before the first run, ``detach`` restores bit for bit.

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
        self._denoiser = weakref.ref(denoiser)
        self._place: _Overwritten | _Beside | None = None
        self._calls: Any = None
        self._key: tuple[float, ...] = ()
        self._heads: list[tuple[Tensor, Tensor] | None] = []
        self._index, self._branch, self._checked = 0, 0, False

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
        return {**self.__dict__, "_denoiser": None, "_place": None, "_calls": None}

    def attach(self) -> None:
        """Take hold of the layer; nothing changes before a run begins."""
        denoiser = self._denoiser() if self._denoiser is not None else None
        if denoiser is None or self._place is not None:
            return
        layer = layer_of(denoiser, self.head)
        self._place = (
            _Overwritten(layer, self.head) if is_plain(layer) else self._beside(denoiser, layer)
        )
        if self.counts_calls:
            self._calls = denoiser.register_forward_pre_hook(self._next_branch)

    def detach(self) -> None:
        """Give the layer its own weights back."""
        if self._place is not None:
            self._place.restore()
            self._place = None
        if self._calls is not None:
            self._calls.remove()
            self._calls = None

    def begin(self, scheduler: Any) -> None:
        if self._place is None:
            return
        sigmas = getattr(scheduler, "sigmas", None)
        levels = sigmas.tolist() if isinstance(sigmas, Tensor) else []
        key = (*scheduler.timesteps.tolist(), *levels)
        if isinstance(self._place, _Overwritten) and not is_plain(self._place.layer):
            # Offloaded since (sequentially: its memory is not its own): add beside it instead.
            denoiser = self._denoiser() if self._denoiser is not None else None
            self._place = self._beside(denoiser, self._place.layer)
        if key != self._key:
            law = probe_scheduler(scheduler)
            self._heads = self.table.at(
                law.alpha[:-1], law.sigma[:-1], allow_range=self.allow_range
            )
            self._place.forget()
            self._key = key
        self._index = int(getattr(scheduler, "begin_index", None) or 0)
        self._checked = False
        self._select()

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        if self._checked or self._place is None:
            return
        self._checked = True
        start = step_index(scheduler, timestep)
        if start != self._index:
            raise Incompatible(
                f"this pipeline starts at step {start} of its schedule without telling the scheduler "
                f"(set_begin_index); the head of step {self._index} was in place. Remove the readout "
                f"for this pipeline."
            )

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        self._index += 1
        if self._index < len(self._heads):
            self._select()
        elif self._place is not None:
            # Between runs the denoiser is itself: it can be copied, saved, recognised, offloaded.
            self._place.rest()
        return result

    def _beside(self, denoiser: Any, layer: nn.Module) -> _Beside:
        forget_graphs(denoiser)
        return _Beside(layer, self.head)

    def _select(self) -> None:
        self._branch = 0
        if self.table.branches == 1:
            self._put(0)

    # Counting calls inside a graph would compile it anew for every step.
    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    def _next_branch(self, denoiser: nn.Module, arguments: Any) -> None:
        self._put(min(self._branch, self.table.branches - 1))
        self._branch += 1

    def _put(self, branch: int) -> None:
        if self._place is None or self._index >= len(self._heads):
            return
        change = self._heads[self._index]
        key = (self._index, branch)
        self._place.put(key, None if change is None else (change[0][branch], change[1][branch]))


class _Overwritten:
    """The changed head is copied into the layer's own memory."""

    def __init__(self, layer: nn.Module, head: Head) -> None:
        self.layer: Any = layer
        self.weight = layer.get_parameter("weight").detach().clone()
        self.bias = layer.get_parameter("bias").detach().clone() if head.has_bias else None
        self.ready: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self.current: tuple[int, int] | None = None

    def forget(self) -> None:
        """Another schedule: the prepared heads are not those of its steps."""
        self.ready, self.current = {}, None

    def put(self, key: tuple[int, int], change: Change | None) -> None:
        if key == self.current:
            return
        if key not in self.ready:
            self.ready[key] = self._changed(change)
        self._write(*self.ready[key])
        self.current = key

    def rest(self) -> None:
        """The layer's own weights, until the next run."""
        self._write(self.weight, self.bias)
        self.current = None

    def restore(self) -> None:
        self.rest()
        self.forget()

    def _changed(self, change: Change | None) -> tuple[Tensor, Tensor | None]:
        if change is None:
            return self.weight, self.bias
        delta, constant = change
        weight = self.weight.float() + delta.T.reshape(self.weight.shape).to(self.weight.device)
        bias = None
        if self.bias is not None:
            bias = (self.bias.float() + constant.to(self.bias.device)).to(self.bias.dtype)
        return weight.to(self.weight.dtype), bias

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        # .data: no new version for autograd to check, the same storage for compiled graphs.
        self.layer.weight.data.copy_(weight)
        if bias is not None:
            self.layer.bias.data.copy_(bias)


class _Beside:
    """A second, small layer whose result is added to that of the head."""

    def __init__(self, layer: nn.Module, head: Head) -> None:
        self.layer: Any = layer
        self.head = head
        self.change: Change | None = None
        self.handle = layer.register_forward_hook(self._add)

    def forget(self) -> None:
        """Nothing is prepared here."""

    def put(self, key: tuple[int, int], change: Change | None) -> None:
        self.change = change

    def rest(self) -> None:
        """Nothing is added until the next run."""
        self.change = None

    def restore(self) -> None:
        self.handle.remove()

    def _add(self, layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.change is None:
            return output
        rows = rows_of(self.head, layer, arguments[0])
        delta, constant = (c.to(rows.device, rows.dtype) for c in self.change)
        return output + rows_as_outputs(self.head, rows @ delta + constant, output)


@torch.no_grad()
def fold(denoiser: nn.Module, table: HeadTable, head: str) -> None:
    """Add a head that is the same at every step to the denoiser's own weights, for good.

    Raises:
        Incompatible: heads differ between steps, the table belongs to another head, or the layer's
            weights cannot be overwritten.

    """
    switch = HeadSwitch(table, denoiser, head)
    layer = layer_of(denoiser, switch.head)
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
    place = _Overwritten(layer, switch.head)
    place.put((0, 0), (weight[0], constant[0]))
