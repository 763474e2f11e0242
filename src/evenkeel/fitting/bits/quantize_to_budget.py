"""Quantize a denoiser to so many bits per weight, shared out over layers by what the final image feels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenkeel.errors import QuantizationError
from evenkeel.fitting.adapters.collect import collect
from evenkeel.fitting.adapters.confirming import confirmation
from evenkeel.fitting.adapters.final_samples import FinalSamples, gain
from evenkeel.fitting.adapters.fit_adapters import PROBED
from evenkeel.fitting.adapters.pairs import Pairs
from evenkeel.fitting.adapters.sites import Site, opened, sites_of
from evenkeel.fitting.bits.allocation import (
    best_uniform,
    metric_of,
    mixed,
    options_of,
    scaled,
    widest_uniform,
)
from evenkeel.fitting.bits.families import Family, Own
from evenkeel.fitting.bits.layouts import LAYOUTS
from evenkeel.fitting.bits.report import FILE, KIND, BitsReport, LayerBits, Mix
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.low_rank.budget import Option
from evenkeel.low_rank.metric import OutputMetric
from evenkeel.low_rank.moment import times
from evenkeel.quantizers.layers.replacing import refuse_quantized
from evenkeel.quantizers.methods.base import quantize_module
from evenkeel.quantizers.methods.per_layer import PerLayer
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.saved.folder import save_quantized
from evenkeel.storage import write_folder, write_json

WEIGHT_ONLY = RoundToNearest(weight_bits=4, activation_bits=16)


def quantize_to_budget(
    pipeline: Any,
    bits: float,
    *,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    method: RoundToNearest = WEIGHT_ONLY,
    layout: str | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    rows: int = 4096,
    memory: float = 2e9,
    guard: bool = True,
    call: dict[str, Any] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> tuple[nn.Module, BitsReport]:
    """A quantized copy of a pipeline's denoiser of at most so many bits per weight, and why.

    Every layer has choices (bits, group size, rank of a branch), each of some bytes and, with
    E = W - W_q, of a predicted error ``tr(G E S E^T)`` of the final sample (:class:`OutputMetric`): S from
    rows that enter the layer, G from gradients of random probes of the full-precision denoiser's output,
    each step's weighted by what it moves in the final sample. All layers have one unit, so bytes are
    shared out along the layers' hulls by what each is worth (``low_rank.budget.share_out``).

    What K-FAC leaves out is measured by kind of layer: for each (all ``to_k`` of cross-attention, say) a few
    images are made with these layers alone quantized, and predictions of the kind are scaled to what came
    out. So the metric tells apart layers of a kind and choices of a layer, and measurement tells apart kinds.

    S and G are measured along the trajectory of the uniform quantization that fits the budget, not of the
    full-precision pipeline: it is the rival and is needed anyway, its states carry errors of the size that
    the mix will make, and the mix is nearer to it than to full precision. What each choice would do to the
    trajectory, and so to S and G of other layers, is left out, as are products of two layers' errors.
    That is why held-out pairs decide: of two mixes (all choices; weight bits within one of the uniform
    one's) one is chosen on some pairs, and on others compared with the uniform quantization of at most as
    many bytes and the least predicted error. If it is not better by a one-sided 95 % bound, the uniform one
    is returned and the report says so.

    With ``rounding="gptq"`` every choice is rounded by GPTQ with S as its Hessian. G does not enter it: with
    some columns of E fixed, those left free minimize ``tr(G E S E^T)`` where ``G (E S)_free = 0``, and as G
    is positive definite it cancels. It weighs which error of a column hurts more, across outputs, which
    rounding each output to its nearest value ignores.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        bits: per weight of the layers that get bits, scales and branches counted; 4.5 is 4 bits in groups
            of 32. Layers that ``skip`` leaves in full precision do not count.
        prompts: texts, or class labels; 16 to 32 are plenty.
        num_inference_steps: as passed to the pipeline.
        method: all but bits and group size: rounding of inputs, ``rounding``, ``range``, ``zero_point``,
            ``skip`` and ``only``; branches up to its ``rank`` are among the choices.
        layout: ``gguf``, ``torchao`` or ``sdnq`` to choose among that backend's formats; None for this
            library's own layers.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's noise.
        batch_size: prompts per pipeline call.
        rows: kept of each layer, at most.
        memory: bytes for the rows of all layers; more are kept in files in the folder for temporary ones.
        guard: False returns the mix even where held-out pairs do not confirm it.
        call: further arguments of the pipeline call.
        out: folder: the quantized denoiser (``load_quantized``), or with a layout the backend's
            configuration; and the report as ``bits.json``. None writes nothing.
        progress: show bars.

    Returns:
        The denoiser, and the report on every layer.

    Raises:
        QuantizationError: the budget holds no uniform quantization, no layer can be quantized, or an
            argument is out of range.
        CalibrationError, UnsupportedPipeline: as of ``fit_adapters``.

    """
    denoiser = denoiser_of(pipeline)
    if layout is not None and layout not in LAYOUTS:
        raise QuantizationError(f"no layout called {layout!r}; there is {', '.join(LAYOUTS)}.")
    if not 1 <= bits <= 16:
        raise QuantizationError(f"bits per weight must be from 1 to 16, got {bits}.")
    refuse_quantized(denoiser)
    family = Own(method) if layout is None else LAYOUTS[layout](method)
    layers = family.layers(denoiser)
    weights = sum(layer.get_parameter("weight").numel() for layer in layers.values())
    budget = int(bits * weights / 8)
    along = widest_uniform(family, layers, budget)
    run = Run(
        pipeline,
        prompts,
        num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        call=call,
        quantized=built(family, denoiser, dict.fromkeys(layers, along)),
    )
    pairs = Pairs.of(run)
    with processes().telling():
        with opened(sites_of(run), rows, memory, gradients=True) as sites:
            collect(pairs.fit, sites, probed=PROBED, progress=progress)
            options = options_of(family, layers, lambda n: _metric(family, n, sites), along)
        held_out = FinalSamples(pairs.held_out, later=len(pairs.further))

        def damage(names: list[str]) -> float:
            made = built(family, denoiser, dict.fromkeys(names, along))
            return float(held_out.errors_of(made, pairs.choose).mean())

        options = scaled(options, along, damage)
        uniform = best_uniform(options, budget)
        everywhere = dict.fromkeys(layers, uniform.choice)
        tried: list[tuple[Mix, dict[str, Option]]] = []
        for name, near in (
            ("all choices", None),
            ("within one bit of the uniform", family.bits_of(uniform.choice)),
        ):
            chosen = mixed(family, options, budget, near)
            size, error = (sum(getattr(o, k) for o in chosen.values()) for k in ("bytes", "error"))
            if all(chosen != before for _, before in tried):
                tried.append((Mix(name, size, error / (uniform.error or 1.0)), chosen))
        rival = built(family, denoiser, everywhere)
        if len(tried) > 1:
            before = held_out.errors_of(rival, pairs.choose)
            tried = [
                (replace(mix, gain=float(gain(before, left).mean())), chosen)
                for mix, chosen in tried
                for made in [built(family, denoiser, words(chosen))]
                for left in [held_out.errors_of(made, pairs.choose)]
            ]
        best = max(range(len(tried)), key=lambda i: tried[i][0].gain or 0.0)
        chosen = tried[best][1]
        mix = built(family, denoiser, words(chosen))
        said = confirmation(
            pairs, lambda over: gain(*(held_out.errors_of(m, over) for m in (rival, mix)))
        )
        report = BitsReport(
            family=family.name,
            bits=bits,
            budget=budget,
            weights=weights,
            uniform=uniform.choice,
            uniform_bytes=uniform.bytes,
            mixes=tuple(mix for mix, _ in tried),
            chosen=best,
            layers=tuple(
                LayerBits(
                    n, str(o.choice), o.bytes, o.error, options[n].get(uniform.choice, o).error
                )
                for n, o in chosen.items()
            ),
            gain=said.mean,
            bound=said.bound,
            confirmed=said.holds,
            guarded=guard,
        )
        found = mix if report.mixed else rival
        if out is not None and processes().main:
            _write(Path(out), family, denoiser, found, report)
    return found, report


def _metric(family: Family, name: str, sites: Mapping[str, Site]) -> OutputMetric | None:
    """Of a layer; what GPTQ needs of it is kept."""
    found = metric_of(sites[name]) if name in sites else None
    if found is not None and isinstance(family, Own) and family.base.rounding == "gptq":
        family.hessians[name] = times(found.inputs, found.working(torch.eye(len(found.inputs))))
    return found


def words(chosen: Mapping[str, Option]) -> dict[str, str]:
    """Layer -> choice."""
    return {name: str(option.choice) for name, option in chosen.items()}


def built(family: Family, denoiser: nn.Module, choices: Mapping[str, str]) -> nn.Module:
    """A copy of the denoiser with these layers quantized."""
    if isinstance(family, Own):
        return quantize_module(denoiser, PerLayer(family.base, choices, family.hessians))[0]
    found = copy.deepcopy(denoiser).eval().requires_grad_(False)
    for name, choice in choices.items():
        found.set_submodule(name, family.build(name, denoiser.get_submodule(name), choice))
    return found


def _write(
    place: Path, family: Family, denoiser: nn.Module, found: nn.Module, report: BitsReport
) -> None:
    header = {"report": report.as_dict()}
    if family.file:
        written = family.written(denoiser, report.choices)
        write_folder(place, KIND, header, {family.file: written}, FILE)
    else:
        beside = {FILE: lambda path: write_json(path, KIND, header)}
        save_quantized(found, place, beside)
