"""The one trainer: an optimizer step per aligned call, kept by held-out final samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.errors import QuantizationError
from evenkeel.fitting.training.aligned_call import AlignedCall, Trajectories, calls_of
from evenkeel.fitting.training.checkpoint import Checkpoint
from evenkeel.fitting.training.freed_memory import freed_memory_kept
from evenkeel.fitting.training.held_out import HeldOut
from evenkeel.hosts.pipeline.denoiser_calls import answer_of
from evenkeel.hosts.processes import processes
from evenkeel.threads import sensible_threads

KEPT_EVERY = 30.0  # seconds between checkpoints, at least


class Trainee(Protocol):
    """What is trained."""

    @property
    def network(self) -> nn.Module:
        """A denoiser, differentiable in what is trained; nothing else in it takes gradients."""

    def settle(self) -> None:
        """Called after each optimizer step."""

    def finished(self) -> nn.Module:
        """A denoiser that computes what the network does now, as it will be used."""


@dataclass(frozen=True)
class Stage:
    """So many runs of one kind, one after another."""

    trajectories: Trajectories
    epochs: int


@dataclass(frozen=True)
class TrainingReport:
    """What was trained, and what held-out final samples say.

    Attributes:
        optimizer_steps: made.
        losses: mean of each run of a pipeline.
        evaluated: runs after which the held-out error was measured.
        gains: dB by which the squared error of final samples was below the start's there, mean over the
            pairs that choose.
        chosen: index into ``evaluated`` of the state with the largest; -1 is the start.
        gain, bound: dB of the chosen one on pairs that confirm, and its one-sided 95 % lower bound.
        confirmed: whether the bound is above zero; else the start was given back.
        start: mean squared error of the start's final samples on the pairs that choose.

    """

    optimizer_steps: int
    losses: tuple[float, ...]
    evaluated: tuple[int, ...]
    gains: tuple[float, ...]
    chosen: int
    gain: float
    bound: float
    confirmed: bool
    start: float

    def as_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""
        return asdict(self)

    @property
    def note(self) -> str:
        """In a few words, for the report on a layer."""
        if not self.confirmed:
            return f"as before training: {self.optimizer_steps} steps brought nothing that holds"
        return f"trained: final samples {self.gain:+.2f} dB (95 % bound {self.bound:+.2f})"

    def text(self) -> str:
        """Two sentences."""
        if not self.confirmed:
            best = f"{max(self.gains):+.2f} dB" if self.gains else "none measured"
            return (
                f"nothing helped, the start is given back: after {self.optimizer_steps} optimizer steps the "
                f"best state changes held-out final samples by {best} where states are chosen"
                + (
                    f", {self.gain:+.2f} dB (95 % bound {self.bound:+.2f}) on others."
                    if self.gain
                    else "."
                )
            )
        return (
            f"{self.optimizer_steps} optimizer steps bring held-out final samples {self.gain:+.2f} dB nearer "
            f"to full precision (95 % bound {self.bound:+.2f}); kept is the state after "
            f"{self.evaluated[self.chosen]} of {len(self.losses)} runs."
        )


def stages_of(trajectories: Sequence[Trajectories], optimizer_steps: int) -> list[Stage]:
    """Each for about the same share of the optimizer's steps, in whole runs, at least one each."""
    share = optimizer_steps / len(trajectories)
    return [Stage(t, max(1, round(share / t.calls)) if share else 0) for t in trajectories]


def train(
    trainee: Trainee,
    groups: list[dict[str, Any]],
    stages: Sequence[Stage],
    loss: Callable[[AlignedCall, Tensor], Tensor],
    held_out: HeldOut,
    *,
    weight_decay: float = 0.01,
    evaluations: int = 10,
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
    progress: bool = True,
) -> TrainingReport:
    """Train, and leave the trainee in the best state by held-out final samples, or in its start.

    AdamW; rates fall to zero in a straight line. All randomness is in the trajectories' seeds, so a run
    that is killed and started again with the same folder ends in the same bits.

    Args:
        trainee: what is trained, in its start.
        groups: parameters and rates, as an optimizer takes them.
        stages: runs in order.
        loss: of one aligned call.
        held_out: pairs that choose and confirm.
        weight_decay: of AdamW.
        evaluations: how often the held-out error is measured, evenly over the runs, the last one included.
        folder: where the state is kept meanwhile; None keeps nothing.
        identity: what tells this training from another.
        progress: show a bar.

    Raises:
        QuantizationError: the loss is not finite, or there are several processes.
        StorageError: the folder belongs to another training.

    """
    if processes().count > 1:
        raise QuantizationError(
            f"training is one process, found {processes().count}: start it without torchrun."
        )
    network = trainee.network
    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    place = next(iter(network.parameters())).device
    accelerator = Accelerator(cpu=place.type == "cpu", mixed_precision="no")
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    checkpoint = Checkpoint(folder, identity or {})
    plan = [(stage.trajectories, e) for stage in stages for e in range(stage.epochs)]
    total = sum(stage.epochs * stage.trajectories.calls for stage in stages)
    asked = {round((i + 1) * len(plan) / evaluations) for i in range(evaluations)} - {0}
    said: dict[str, Any] = {"epoch": 0, "step": 0, "losses": [], "evaluated": [], "gains": []}
    best: dict[str, Tensor] = {}
    kept = checkpoint.read(parameters, optimizer)
    if kept is not None:
        said, best = kept
    prepared: Any = accelerator.prepare_optimizer(optimizer)
    written = time.monotonic()
    with (
        sensible_threads(network),
        freed_memory_kept(),
        tqdm(total=total, initial=said["step"], unit="step", disable=not progress) as bar,
    ):
        for trajectories, epoch in plan[said["epoch"] :]:
            losses = []
            for call, answer in calls_of(trajectories, epoch):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - said["step"] / total)
                with torch.enable_grad():
                    output = answer_of(
                        network(*call.student.arguments, **dict(call.student.keywords))
                    )
                    value = loss(call, output)
                    accelerator.backward(value)
                answer.append(output.detach())
                prepared.step()
                prepared.zero_grad()
                trainee.settle()
                losses.append(value.detach())
                said["step"] += 1
                bar.update()
            said["epoch"] += 1
            said["losses"].append(_finite(float(torch.stack(losses).mean()), said["epoch"]))
            if said["epoch"] in asked:
                said["evaluated"].append(said["epoch"])
                said["gains"].append(held_out.chosen_by(trainee.finished()))
                if said["gains"][-1] >= max(said["gains"]):
                    best = {n: p.detach().clone() for n, p in parameters.items()}
            if said["epoch"] in asked or time.monotonic() - written > KEPT_EVERY:
                checkpoint.write(said, parameters, optimizer, best)
                written = time.monotonic()
            shown = f"{said['gains'][-1]:+.2f} dB" if said["gains"] else "not yet"
            bar.set_postfix(loss=f"{said['losses'][-1]:.4g}", held_out=shown)
    gains = said["gains"]
    chosen = max(range(len(gains)), key=gains.__getitem__, default=-1)
    if chosen >= 0 and gains[chosen] <= 0:
        chosen = -1
    gained, bound = 0.0, 0.0
    if chosen >= 0:
        _put(parameters, best)
        gained, bound = held_out.confirmed(trainee.finished())
    if not bound > 0:
        _put(parameters, start)
    return TrainingReport(
        optimizer_steps=said["step"],
        losses=tuple(said["losses"]),
        evaluated=tuple(said["evaluated"]),
        gains=tuple(gains),
        chosen=chosen if bound > 0 else -1,
        gain=gained,
        bound=bound,
        confirmed=bound > 0,
        start=held_out.start,
    )


def _put(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _finite(loss: float, epoch: int) -> float:
    if not math.isfinite(loss):
        raise QuantizationError(
            f"the loss of run {epoch} is {loss}: training diverges. Lower the rates (activation_rate, "
            "adapter_rate), and compute in float32."
        )
    return loss
