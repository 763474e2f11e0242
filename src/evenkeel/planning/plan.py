"""Plan: memory, denoiser calls and files of every job, from configurations alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenkeel import zoo
from evenkeel.errors import EvenkeelError, UnsupportedPipeline
from evenkeel.hosts.actuators.heads import find_head, layer_of
from evenkeel.planning.blueprint import INDEX, Blueprint, read_blueprint
from evenkeel.planning.denoiser_inputs import Shapes, Size, guidance_of, spatial_factor
from evenkeel.planning.jobs import (
    Asked,
    Job,
    closed_loop_bytes,
    readout_bytes,
    readout_calls,
    record_bytes,
    refit_runs,
)
from evenkeel.planning.live_memory import peak_bytes
from evenkeel.planning.storage_formats import Quantized, bytes_of, quantized_bytes

DEFAULT = "zoo:pixart-sigma"


@dataclass(frozen=True)
class Plan:
    """What jobs take; all sizes in bytes.

    Attributes:
        pipeline: its class.
        size: of what is made.
        dtype: of the networks.
        steps: denoiser evaluations of a run, calls of both guidance branches counted once.
        prompts, batch_size, rows: prompts in all and per pipeline call, and rows of a denoiser call.
        weights: of every network, by name of its component.
        quantized: the denoiser in that format.
        denoising: activations of one denoiser call; None for a denoiser whose inputs are not known.
        decoding: activations of decoding one batch; None where that is not known.
        jobs: by name of the command.

    """

    pipeline: str
    size: Size
    dtype: str
    steps: int
    prompts: int
    batch_size: int
    rows: int
    weights: dict[str, int]
    quantized: Quantized
    denoising: int | None
    decoding: int | None
    jobs: tuple[Job, ...]

    def __getitem__(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """Tables of the networks and of the jobs."""
        size = self.size
        what = f"{size.width} x {size.height}"
        what += f" x {size.frames} frames" if size.frames > 1 else ""
        q = self.quantized
        lines = [
            f"{self.pipeline}, {what}, {self.steps} steps, {self.prompts} prompts in batches of "
            f"{self.batch_size}, {self.dtype}",
            "",
            *_table(
                ("network", "weights"),
                [(name, _size(n)) for name, n in self.weights.items()]
                + [(f"denoiser as {q.name}", f"{_size(q.memory)}, file {_size(q.stored)}")],
            ),
            "",
            f"activations: {_size(self.denoising)} in a denoiser call of {self.rows} rows, "
            f"{_size(self.decoding)} in decoding {self.batch_size}",
            "",
            *_table(
                ("job", "calls, full", "calls, quantized", "memory", "in turns", "file", "size"),
                [
                    (
                        job.name,
                        str(job.full_calls),
                        str(job.quantized_calls),
                        _size(job.memory),
                        _size(job.in_turns),
                        job.file,
                        _size(job.file_bytes),
                    )
                    for job in self.jobs
                ],
            ),
        ]
        return "\n".join(lines)


def plan(
    pipeline: str | Path = DEFAULT,
    *,
    quantized: str,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    prompts: int = 32,
    batch_size: int = 8,
    arms: int = 3,
    dtype: str = "bfloat16",
    histograms: bool = True,
    memory: float = 2e9,
    feature_memory: float = 256e6,
    processes: int = 1,
) -> Plan:
    """What calibrate, readout, refit, closed loop, compare and sample take, before anything is loaded.

    Weights are counted exactly, activations by a forward pass without data (what a device's
    allocator and libraries add is not in them, nor what rounding activations adds), files to a few
    per cent. Nothing but configurations is read.

    Args:
        pipeline: ``zoo:NAME``, a folder with a pipeline's configurations, or a hub id whose
            configurations are in the cache.
        quantized: a quantizer specification (``w4a16-g64``), or a backend's format (``nf4``).
        num_inference_steps: None for the pipeline's default.
        guidance_scale: None for the pipeline's default.
        height: in pixels; None for what the pipeline was made for.
        width: the same.
        num_frames: of a video; None for the pipeline's default.
        prompts: of every job.
        batch_size: prompts per pipeline call.
        arms: of a comparison; the first is full precision.
        dtype: of the networks.
        histograms: as of ``calibrate``.
        memory: as of ``refit_branches``.
        feature_memory: as of ``fit_readout``.
        processes: that share the prompts, each with a device of its own.

    Raises:
        UnsupportedPipeline: no configurations there, or none that can be built.
        QuantizationError: no such format.

    Example:
        >>> found = plan(quantized="w4a16-g64", dtype="float32", prompts=8)
        >>> found.weights["transformer"], found["calibrate"].quantized_calls
        (5230528, 20)

    """
    source = str(pipeline)
    blueprint = read_blueprint(folder_of(source))
    if source.startswith("zoo:"):
        twin = zoo.twin(source[4:])
        num_inference_steps = num_inference_steps or twin.num_inference_steps
        guidance_scale = twin.guidance_scale if guidance_scale is None else guidance_scale
    if guidance_scale is None:
        guidance_scale = blueprint.default("guidance_scale")
    kind: torch.dtype = getattr(torch, dtype)
    denoiser = nn.Module.to(blueprint.denoiser, kind)
    size = size_of(blueprint, height, width, num_frames)
    shapes = Shapes(blueprint, size, kind)
    guidance = guidance_of(blueprint, guidance_scale)
    rows = batch_size * guidance.rows
    weights = {name: bytes_of(network, kind) for name, network in blueprint.networks.items()}
    form = quantized_bytes(denoiser, quantized, kind)
    steps = _steps(blueprint, num_inference_steps)
    scheduler = dict(getattr(blueprint.scheduler, "config", {}))
    asked = Asked(
        prompts,
        batch_size,
        steps,
        guidance.calls,
        shapes.latent,
        scheduler,
        histograms,
        processes,
        guidance.rows > 1,
    )
    denoising, head_input = _denoising(shapes, rows)
    decoding = _decoding(shapes, batch_size)
    whole = next(w for n, w in weights.items() if blueprint.networks[n] is denoiser)
    needs = _Needs(sum(weights.values()) - whole, whole, form, denoising, decoding)
    pixels = 3 * size.height * size.width * size.frames * prompts
    return Plan(
        blueprint.pipeline.__name__,
        size,
        dtype,
        steps,
        prompts,
        batch_size,
        rows,
        weights,
        form,
        denoising,
        decoding,
        _jobs(asked, blueprint, needs, pixels, arms, memory, (head_input, feature_memory)),
    )


@dataclass(frozen=True)
class _Needs:
    """Bytes: of the other networks, of the denoiser, as quantized, and of activations."""

    others: int
    full: int
    quantized: Quantized
    denoising: int | None
    decoding: int | None

    def alone(self, more: int = 0, *, decodes: bool = False) -> int | None:
        """With the larger of the two denoisers."""
        return self._with(max(self.full, self._one), more, decodes)

    def both(self, more: int = 0, *, decodes: bool = False) -> int | None:
        """With both denoisers."""
        return self._with(self.full + self._one, more, decodes)

    def only_quantized(self) -> int | None:
        """Without the full-precision one."""
        return self._with(self._one, 0, True)

    @property
    def _one(self) -> int:
        return self.quantized.memory + self.quantized.unpacked

    def _with(self, denoisers: int, more: int, decodes: bool) -> int | None:
        if self.denoising is None or (decodes and self.decoding is None):
            return None
        active = max(self.denoising + more, self.decoding or 0 if decodes else 0)
        return self.others + denoisers + active


def _jobs(
    asked: Asked,
    blueprint: Blueprint,
    needs: _Needs,
    pixels: int,
    arms: int,
    memory: float,
    features: tuple[int, float],
) -> tuple[Job, ...]:
    run, denoiser = asked.per_run, blueprint.denoiser
    state = 4 * prod(asked.latent) * asked.batch_size
    tape = 2 * asked.steps * state  # of a batch: the states and what the first denoiser gave
    one_prompt = asked.steps * asked.calls
    refitted = refit_runs(denoiser, asked.prompts, memory)
    form = needs.quantized
    record = record_bytes(asked)
    jobs = [
        Job(
            "calibrate",
            # The noise floor: one prompt, twice; a batch of one has been there already.
            run + (1 if asked.batch_size == 1 else 2) * one_prompt,
            run,
            needs.both(tape),
            needs.alone(tape),
            "record",
            record,
        ),
    ]
    try:
        file = readout_bytes(asked, denoiser)
        calls = readout_calls(asked, *features)
        jobs.append(Job("readout", *calls, needs.both(), needs.alone(), "readout", file))
    except UnsupportedPipeline:  # no head that can be refitted
        pass
    if form.own:
        # A branch leaves the packed weight as it is; other refits store what they changed.
        folder = form.stored if form.rank else form.memory
        jobs.append(Job("refit", 0, refitted * run, needs.both(), None, "denoiser", folder))
    jobs.append(
        Job(
            "closed loop",
            2 * run,
            2 * run,
            needs.both(),
            None,
            "record",
            record + closed_loop_bytes(asked),
        )
    )
    if len(asked.latent) == 3:  # images, not video
        rest, every, alone = (arms - 1) * run, arms * pixels, needs.only_quantized()
        both = needs.both(decodes=True)
        jobs.append(Job("compare", run, rest, both, None, "images", every))
        jobs.append(Job("sample", 0, run, alone, None, "images", pixels))
    return tuple(jobs)


def folder_of(source: str) -> Path:
    """Where the configurations of a pipeline lie.

    Raises:
        UnsupportedPipeline: nowhere on this machine.

    """
    if source.startswith("zoo:"):
        return zoo.path_of(source[4:])
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, INDEX)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise UnsupportedPipeline(
            f"{source!r} is no folder, and the hub's cache holds no {INDEX} of that name. plan reads "
            f"configurations only and downloads nothing: give zoo:NAME or a folder with them."
        )
    return Path(found).parent


def size_of(
    blueprint: Blueprint, height: int | None, width: int | None, frames: int | None
) -> Size:
    """As asked for, else what the networks were made for, else what the pipeline assumes."""
    config: Any = blueprint.denoiser.config
    native = getattr(config, "sample_size", None)
    if isinstance(native, (list, tuple)):
        native = native[0]
    if isinstance(native, int):
        native *= spatial_factor(blueprint.autoencoder)
    elif blueprint.default("height") is None and blueprint.autoencoder is not None:
        native = getattr(blueprint.autoencoder.config, "sample_size", None)
    found = (
        height or native or blueprint.default("height"),
        width or native or blueprint.default("width"),
    )
    if not all(isinstance(side, int) for side in found):
        raise EvenkeelError(
            f"nothing in the configurations says how large {blueprint.pipeline.__name__} samples; pass "
            f"height and width."
        )
    return Size(*found, int(frames or blueprint.default("num_frames") or 1))


def _steps(blueprint: Blueprint, asked: int | None) -> int:
    """Denoiser evaluations: solvers may take more than one per inference step."""
    number = int(asked or blueprint.default("num_inference_steps") or 50)
    scheduler = copy.deepcopy(blueprint.scheduler)
    shifted = getattr(scheduler.config, "use_dynamic_shifting", False)
    scheduler.set_timesteps(number, **({"mu": 1.0} if shifted else {}))
    return len(scheduler.timesteps)


def _denoising(shapes: Shapes, rows: int) -> tuple[int | None, int]:
    """Of one call its activations, and the input of its output head; 0 where there is none."""
    if not shapes.known():
        return None, 0
    inputs, denoiser = shapes.inputs(rows), shapes.blueprint.denoiser
    seen = [0]
    with ExitStack() as stack:
        with suppress(UnsupportedPipeline):
            layer = layer_of(denoiser, find_head(denoiser))
            hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].nbytes))
            stack.callback(hook.remove)
        peak = peak_bytes(lambda: denoiser(**inputs, return_dict=False))
    return peak, seen[-1]


def _decoding(shapes: Shapes, prompts: int) -> int | None:
    vae = shapes.blueprint.autoencoder
    if vae is None:
        return 0
    vae = nn.Module.to(vae, shapes.dtype)  # its own method warns
    latent = shapes.empty(prompts, *shapes.latent)
    try:
        return peak_bytes(lambda: vae.decode(latent, return_dict=False))
    except (RuntimeError, TypeError, NotImplementedError):  # looks at its values
        return None


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"
