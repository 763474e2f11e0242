"""Quantize a pipeline's denoiser with a method that trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.fitting.adapters.pairs import part
from evenkeel.fitting.mixed_order import trajectories as mixed_order
from evenkeel.fitting.training.aligned_call import Trajectories, calls_of
from evenkeel.fitting.training.held_out import HeldOut
from evenkeel.fitting.training.losses import Loss
from evenkeel.fitting.training.same_state import SameState, told_time
from evenkeel.fitting.training.step_weights import StepWeighted
from evenkeel.fitting.training.trainer import TrainingReport, stages_of, train
from evenkeel.hosts.pipeline.denoiser_calls import answer_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers.layers.blocks import Unit
from evenkeel.quantizers.layers.told_timestep import nearest, tell
from evenkeel.quantizers.methods.efficientdm import EfficientDM
from evenkeel.quantizers.methods.merged_training import Student, TrainedMethod
from evenkeel.quantizers.methods.sa_qlora import SAQLoRA
from evenkeel.quantizers.saved.report import QuantizationReport
from evenkeel.quantizers.workspace.workspace import Workspace
from evenkeel.threads import sensible_threads

VALUES = 4096  # of an input that its first range is searched on, per layer and level
_CALIBRATION = 1 << 19  # index of the first run that ranges start from: training never comes so far


def train_quantized(
    run: Run,
    method: TrainedMethod,
    *,
    trajectories: Sequence[Trajectories] = (),
    held_out: Run | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> tuple[nn.Module, QuantizationReport, TrainingReport]:
    """A quantized copy of the run's denoiser that was trained, and reports on its layers and the training.

    Args:
        run: the pipeline as it will be deployed, with prompts to train on.
        method: an element of the catalogue that trains.
        trajectories: where aligned calls come from, one after another for equal shares of the optimizer's
            steps; the method's own if not given.
        held_out: as deployed, with prompts for the pairs that choose and confirm; ``run`` if not given, whose
            prompts then serve with other noise.
        folder: for the state of an interrupted training; None keeps nothing.
        progress: show a bar.

    Raises:
        QuantizationError: what the method refuses; weights that are not float32; several processes; a loss
            that is not finite.
        StorageError: the folder belongs to another training.

    """
    narrow = {p.dtype for p in run.denoiser.parameters()} - {torch.float32}
    if narrow:
        raise QuantizationError(
            f"expected a denoiser in float32, found {', '.join(sorted(map(str, narrow)))}: optimizer steps "
            "are lost in fewer bits. Load the pipeline with torch_dtype=torch.float32."
        )
    chosen = list(trajectories) or trajectories_of(run, method)
    workspace = Workspace(run.denoiser)
    workspace.keep_matching(method.skip)
    levels = tuple(dict.fromkeys(level for t in chosen for level in t.levels))
    with sensible_threads(run.denoiser):
        inputs = inputs_by_level(run.denoiser, workspace, chosen, levels, method.calibration_runs)
        loss: Any = Loss(method.cosine, method.reduction, method.guided)
        if method.weighting == "step-law":
            loss = StepWeighted(loss, run, levels)
        student = Student(run.denoiser, method.starts(workspace, levels, inputs))
        report = train(
            student,
            student.groups(method),
            stages_of(chosen, method.optimizer_steps),
            loss,
            HeldOut(held_out or run, student.finished()),
            weight_decay=method.weight_decay,
            evaluations=method.evaluations,
            folder=folder,
            identity={
                "method": method.as_dict(),
                "trajectories": [t.identity for t in chosen],
                "held out": {
                    **(held_out or run).identity,
                    "texts": (held_out or run).prompts.texts,
                },
            },
            progress=progress,
        )
        for name, layer in student.finished_layers().items():
            unit, notes = Unit(name, (name,), "layer"), {name: report.note}
            workspace.replace(unit, {name: layer}, notes=notes)
    tell(workspace.quantized)
    quantized, layers = workspace.result(str(method), method.as_dict())
    return quantized, layers, report


def trajectories_of(run: Run, method: TrainedMethod) -> list[Trajectories]:
    """The method's own, one for each number of steps that it trains with."""
    whole = part(run, list(range(len(run.prompts))), method.seed)
    whole.batch_size = method.batch_size
    counts = method.schedule(run.num_inference_steps)
    if isinstance(method, SAQLoRA):
        return [*mixed_order.trajectories(whole, method.pairs, counts)]
    found: list[Trajectories] = []
    for steps in counts:
        shown = part(whole, list(range(len(run.prompts))), method.seed)
        shown.num_inference_steps = steps
        advance = method.advance if isinstance(method, EfficientDM) else "full-precision"
        found.append(SameState(shown, advance, method.eta))
    return found


def inputs_by_level(
    denoiser: nn.Module,
    workspace: Workspace,
    trajectories: Sequence[Trajectories],
    levels: Sequence[float],
    runs: int,
) -> dict[str, list[Tensor]]:
    """What enters each open layer of the full-precision denoiser, for each told timestep.

    Args:
        denoiser: in full precision.
        workspace: its open layers are looked at.
        trajectories: whose students' calls are made.
        levels: told timesteps.
        runs: of each of the trajectories.

    Returns:
        By layer, in module order: for each level about 4096 values.

    """
    names = {workspace.layers[name]: name for name in workspace.open}
    found: dict[str, list[list[Tensor]]] = {n: [[] for _ in levels] for n in names.values()}
    share, place = -(-VALUES // runs), 0

    def see(layer: nn.Module, given: Any, named: Any) -> None:
        x = (given[0] if given else next(iter(named.values()))).detach().float().flatten()
        index = torch.linspace(0, len(x) - 1, min(share, len(x)), device=x.device).long()
        found[names[layer]][place].append(x[index])

    for source in trajectories:
        for index in range(runs):
            for call, answer in calls_of(source, _CALIBRATION + index):
                asked = call.student
                place = nearest(levels, told_time(denoiser, asked.arguments, asked.keywords))
                hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in names]
                try:
                    answer.append(answer_of(asked.make(denoiser)))
                finally:
                    for hook in hooks:
                        hook.remove()
    unseen = [n for n, each in found.items() if not all(each)]
    if unseen:
        raise QuantizationError(
            f"no call of the pipeline reaches {unseen[:5]}: their inputs have no range to start from. Skip "
            "these layers."
        )
    return {n: [torch.cat(parts) for parts in each] for n, each in found.items()}
