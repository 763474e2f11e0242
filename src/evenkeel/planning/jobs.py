"""Denoiser calls and files of every job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from torch import nn

from evenkeel.corrections.readout import TABLE
from evenkeel.fitting.refit.refit_branches import FOLDS
from evenkeel.hosts.actuators.heads import find_head
from evenkeel.quantizers.layers.patterns import DEFAULT_SKIP, first_match
from evenkeel.record.schema import expected_tensors
from evenkeel.statistics.moments import moments_schema
from evenkeel.storage import Tensors, json_safe

_NAME = 90  # bytes of a tensor's entry in the header of its file, about
_PROVENANCE = 900  # bytes of what a file says of its origin beside levels and scheduler, about
_RINGS = 8  # of a spectrum


@dataclass(frozen=True)
class Asked:
    """What the jobs are asked for.

    Attributes:
        prompts, batch_size: how many, and how many a pipeline call.
        steps: of the scheduler.
        calls: of the denoiser per step.
        latent: (channels, ...) of a prompt's state.
        scheduler: its configuration.
        histograms: whether a record keeps them.
        processes: that share the prompts.
        stacked: whether a denoiser call holds both branches of guidance.

    """

    prompts: int
    batch_size: int
    steps: int
    calls: int
    latent: tuple[int, ...]
    scheduler: Mapping[str, Any]
    histograms: bool = True
    processes: int = 1
    stacked: bool = False

    @property
    def batches(self) -> int:
        """Of one process."""
        return ceil(ceil(self.prompts / self.batch_size) / self.processes)

    @property
    def per_batch(self) -> int:
        """Denoiser calls of one batch."""
        return self.steps * self.calls

    @property
    def per_run(self) -> int:
        """Denoiser calls of one process in a run over all prompts."""
        return self.batches * self.per_batch


@dataclass(frozen=True)
class Job:
    """What one job takes.

    Attributes:
        name: of the command.
        full_calls, quantized_calls: of the two denoisers, in each process.
        memory: bytes on each device that holds everything the job needs at once.
        in_turns: bytes where the denoisers take turns on the device; None where a job needs both.
        file: what it writes.
        file_bytes: how much of that.

    """

    name: str
    full_calls: int
    quantized_calls: int
    memory: int | None
    in_turns: int | None
    file: str
    file_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def record_bytes(asked: Asked) -> int:
    """The file of a calibration."""
    sizes = {"P": asked.prompts, "T": asked.steps, "C": asked.latent[0]}
    sizes["rings"] = max(1, min(_RINGS, max(asked.latent[-2:]) // 2))
    left_out = set() if asked.histograms else {"histogram", "residual"}
    if len(asked.latent) < 3:
        left_out.add("spectrum")
    tensors = expected_tensors(asked.steps, law=True)
    return _file(asked, (t for n, t in tensors.items() if n not in left_out), sizes)


def readout_bytes(asked: Asked, denoiser: nn.Module) -> int:
    """The file of a readout, a head per step and call."""
    head = find_head(denoiser)
    sizes = {"P": asked.prompts, "T": asked.steps, "C": asked.latent[0]}
    sizes |= {"B": asked.calls, "F": head.features, "O": head.targets}
    fits = 150 * asked.steps * asked.calls
    return fits + _file(asked, (*TABLE.values(), *moments_schema().values()), sizes)


def readout_calls(asked: Asked, head_input: int, feature_memory: float) -> tuple[int, int]:
    """Calls of the full-precision and of the quantized denoiser.

    A look at one prompt's guidance comes first, where calls hold both branches. Batches whose inputs
    of the head, so many bytes each, find no room while a step is solved run their quantized denoiser
    again.
    """
    kept = min(asked.batches, int(feature_memory // max(head_input, 1)))
    again = asked.batches - kept if asked.batches > 1 else 0
    full = asked.per_run + (asked.calls if asked.stacked else 0)
    return full, full + again * asked.per_batch


def closed_loop_bytes(asked: Asked) -> int:
    """What TAC and StepbaQ add to a record: gains, and a mean error per element of the state."""
    return asked.steps * (16 * asked.latent[0] + 4 * prod(asked.latent))


def refit_runs(denoiser: nn.Module, prompts: int, memory: float) -> int:
    """Runs of the quantized denoiser: as many as its layers' sums need to fit in ``memory`` in turn."""
    folds, runs, room = min(FOLDS, prompts), 1, memory
    for name, layer in denoiser.named_modules():
        if type(layer) is nn.Linear and not first_match(name, DEFAULT_SKIP):
            outputs, inputs = layer.weight.shape
            size = folds * 8 * (inputs * (inputs + 1) // 2 + inputs * outputs)
            if size > room:
                runs, room = runs + 1, memory
            room -= size
    return runs


def _file(asked: Asked, tensors: Iterable[Tensors], sizes: Mapping[str, int]) -> int:
    found = list(tensors)
    levels = 3 * 19 * asked.steps
    header = _PROVENANCE + levels + len(json.dumps(json_safe(dict(asked.scheduler))))
    return header + _NAME * len(found) + sum(_bytes(t, sizes) for t in found)


def _bytes(tensor: Tensors, sizes: Mapping[str, int]) -> int:
    shape = [n if isinstance(n, int) else sizes[n] for n in tensor.shape]
    return prod(shape) * tensor.dtype.itemsize
