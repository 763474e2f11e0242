"""Refit low-rank branches, weight scales and biases to the activations that layers meet.

A quantizer chooses the branch of a layer from its weight alone. What the picture suffers from is the
layer's error on its own inputs, and on those the best branch has a closed form. One run of the
quantized pipeline serves all layers: every target is local to its layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.errors import CalibrationError
from evenkeel.fitting.adapters.fit_adapters import check_metric
from evenkeel.fitting.refit.in_metric import branches_in_metric, put
from evenkeel.fitting.refit.site import LayerRefit, Site
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.quantizers.layers.quantized_layers import Quantized, QuantizedLinear
from evenkeel.statistics.group_scales import Scales
from evenkeel.statistics.reduced_rank import SMALLEST_PENALTY, LowRank

FOLDS = 4
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, slots=True)
class RefitReport:
    """Every quantized layer exactly once, in the order of the module.

    ``without_bias`` are the names of those that have no bias to refit.
    """

    layers: tuple[LayerRefit, ...]
    prompts: int
    without_bias: frozenset[str] = frozenset()

    @property
    def changed(self) -> tuple[LayerRefit, ...]:
        """The layers that were refitted."""
        return tuple(layer for layer in self.layers if layer.changed)

    def as_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""
        layers = [
            {**asdict(x), "changed": x.changed, "bias": x.name not in self.without_bias}
            for x in self.layers
        ]
        return {"prompts": self.prompts, "layers": layers}

    def text(self) -> str:
        """A table of the layers and their held-out errors, and a line on all of them."""
        rows: list[tuple[str, ...]] = [("layer", "what", "rank", "before", "after", "penalty", "")]
        for x in self.layers:
            numbers = (f"{v:.3g}" if v is not None else "-" for v in (x.before, x.after, x.penalty))
            bias = "" if x.name in self.without_bias else "bias"
            what = " ".join(filter(None, (x.what, bias))) or "-"
            why = f"kept: {x.reason}" if x.reason else ""
            rows.append((x.name, what, str(x.rank), *numbers, why))
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        ratios = sorted(
            x.after / x.before for x in self.changed if x.before and x.after is not None
        )
        found = (
            f"{len(self.changed)} of {len(self.layers)} layers refitted on {self.prompts} prompts"
        )
        if ratios:
            found += f"; held-out error energy, median of layers: x {ratios[len(ratios) // 2]:.3g}"
        return "\n".join([found, *lines])


def refit_branches(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    penalty: float | None = None,
    metric: str | None = None,
    rows: int = 4096,
    memory: float = 2e9,
    call: dict[str, Any] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, RefitReport]:
    """Give branches, weight scales and biases the values that best undo their layer's own error.

    With x what enters the layer along the quantized pipeline's own trajectory, a layer
    ``Q_a(x) W_q^T + b_q + (x down^T) up^T`` is refitted to the full-precision ``x W^T + b``:

        minimize  sum |r - (x down^T) up^T - c|^2 + p s |up down - (W - W_q)|^2,
        r = (x W^T + b) - (Q_a(x) W_q^T + b_q),  b_q -> b_q + c,

    with s the scatter of x, averaged over features. A large p gives the SVD of what rounding left of
    the weight (SVDQuant, arXiv:2411.05007, up to the order of the two), a small one reduced-rank
    regression on the rows, which also fits the noise of rounding activations. Layers without a
    branch refit their weight scales, one factor per output and group of inputs, and their bias
    (``statistics.group_scales``); convolutions their bias alone, to the mean of r. Where the
    quantizer's groups are not known, scales stay. Of every image and call a linear layer is fitted on
    256 tokens at most, evenly spaced. Shapes, speed and memory stay. A
    layer changes only if the refit lowers its error on held-out prompts in each fold of a
    cross-validation, or by a 95 % bound over folds. A second refit, of the first one's result,
    adapts to the trajectory that the first has changed; give it other prompts, as the first has
    seen these and its branches would be judged too well on them.

    With a ``metric`` layers with branches are refitted, and no others, by the engine of ``fit_adapters``: the
    new branch is the truncated SVD of what should stand beside the layer, in the metric of the final sample,
    from the rows that are kept; the bias takes the mean of what is left. A layer changes where a fold of the
    rows says so. One prompt is enough.

    Prompt i starts from noise of seed ``seed + i``, whatever the batch size. Corrections that are
    installed are off during the run.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: what ``quantize_module`` made of that denoiser; it is not changed.
        prompts: texts, or class labels for class-conditional pipelines; at least two. Eight do most
            of what 256 do.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call.
        penalty: p, in units of s; None chooses it for every layer by leave-prompts-out
            cross-validation.
        metric: None fits each layer's own error as above; ``output``, ``uniform`` or ``local`` is that of
            ``fit_adapters``.
        rows: kept of each layer with a ``metric``, at most.
        memory: bytes for the layers' sums; beyond it, layers take turns in several runs. One
            layer's sums are needed in any case: about 16 F^2 + 32 F O bytes for F to O features.
        call: further arguments of the pipeline call, such as ``{"height": 512}``.
        progress: show a bar.

    Returns:
        A copy of ``quantized`` whose attribute ``evenkeel_refit`` says on how much it was refitted
        (it carries the report of ``quantized``, and ``save_quantized`` takes it), and the report of the
        refit.

    Raises:
        CalibrationError: no prompts, no quantized layers, a layer that the pipeline's denoiser does
            not have, values that are not finite, or an argument out of range.
        UnsupportedPipeline: see there.

    """
    run = Run(
        pipeline,
        prompts,
        num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        call=call,
        quantized=quantized,
    )
    _check(prompts, penalty, memory, metric, rows)
    refitted = copy.deepcopy(quantized)
    sites = _sites(refitted, run.denoiser)
    unbiased = frozenset(site.name for site in sites if site.layer.bias is None)
    if metric is not None:
        found, branches = branches_in_metric(run, metric, rows, memory, progress=progress)
        put(refitted, branches)
        said = [found.get(s.name, LayerRefit(s.name, 0, reason="no branch")) for s in sites]
        return _with_report(refitted, RefitReport(tuple(said), len(prompts), unbiased))
    folds = min(FOLDS, len(prompts))
    groups, us = _groups(sites, memory / folds), processes()
    batches = run.lockstep_share()
    hidden = not (progress and us.main)
    bar = tqdm(total=len(groups) * len(batches), desc="refit", unit="batch", disable=hidden)
    penalties = PENALTIES if penalty is None else (penalty,)
    decided: dict[str, tuple[LayerRefit, LowRank | Scales | None]] = {}
    with us.telling(), bar, run.undisturbed(refitted):
        run.agreed("refit", penalty=penalty)
        for group in groups:
            for site in group:
                site.open(folds)
            for batch in batches:
                with ExitStack() as stack:
                    for site in group:
                        site.prompts = (batch.first, len(batch))
                        hook = site.layer.register_forward_hook(site.look, with_kwargs=True)
                        stack.callback(hook.remove)
                    run.sample(batch)
                bar.update()
            for site in group:
                site.join(us)
                decided[site.name] = site.decide(penalties)
                site.folds.clear()  # what is kept is as small as the branch
        # Only now: all groups of layers must see the same trajectory.
        for site in sites:
            site.put(decided[site.name][1])
    report = RefitReport(
        tuple(decided[site.name][0] for site in sites),
        len(prompts),
        unbiased,
    )
    return _with_report(refitted, report)


def _with_report(refitted: nn.Module, report: RefitReport) -> tuple[nn.Module, RefitReport]:
    refitted.evenkeel_refit = report.text().splitlines()[0]  # type: ignore[assignment]
    return refitted, report


def _sites(refitted: nn.Module, reference: nn.Module) -> list[Site]:
    originals = dict(reference.named_modules())
    sites = []
    for name, layer in refitted.named_modules():
        if not isinstance(layer, Quantized):
            continue
        original = originals.get(name)
        expected = nn.Linear if isinstance(layer, QuantizedLinear) else nn.Conv2d
        weight = getattr(original, "weight", None)
        plain = isinstance(original, expected) and not isinstance(original, Quantized)
        fits = plain and getattr(weight, "shape", 0) == layer.weight.shape
        if original is None or not fits or not isinstance(weight, Tensor) or weight.is_meta:
            raise CalibrationError(
                f"the quantized layer {name!r} needs a loaded {expected.__name__} of the same name "
                f"with a weight of shape {tuple(layer.weight.shape)} in the pipeline's own denoiser; "
                f"found {original!r}. Pass the pipeline with the full-precision denoiser that "
                f"`quantized` was made from, before offloading."
            )
        site = Site(name, layer, original)
        if layer.stored is not None and site.branch is None and isinstance(layer, QuantizedLinear):
            site.group = layer.stored[0].group or layer.weight.shape[1]
        sites.append(site)
    if not sites:
        raise CalibrationError(
            f"{type(refitted).__name__} has no QuantizedLinear or QuantizedConv2d, so there is "
            "nothing to refit; pass what quantize_module returned."
        )
    return sites


def _groups(sites: list[Site], memory: float) -> list[list[Site]]:
    """Neighbouring layers whose sums fit in memory together; a larger one stands alone."""
    groups: list[list[Site]] = []
    room = 0.0
    for site in sites:
        size = site.bytes_per_fold
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(site)
        room -= size
    return groups


def _check(
    prompts: Sequence[Prompt], penalty: float | None, memory: float, metric: str | None, rows: int
) -> None:
    if metric is not None:
        check_metric(metric, rows)
        if penalty is not None:
            raise CalibrationError(
                "a penalty belongs to the refit without a metric; give one of them."
            )
    elif len(prompts) == 1:
        raise CalibrationError(
            "a refit needs at least two prompts, because layers are judged on prompts they have not "
            "seen: fitted to the words of a single one they fail on every other. A few are enough."
        )
    if penalty is not None and not SMALLEST_PENALTY <= penalty < float("inf"):
        raise CalibrationError(
            f"penalty must be None or a finite number of at least {SMALLEST_PENALTY}, got {penalty}."
        )
    if not memory > 0:
        raise CalibrationError(f"memory must be a positive number of bytes, got {memory}.")
