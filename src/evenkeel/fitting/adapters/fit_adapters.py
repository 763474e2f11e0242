"""Fit recovery adapters: small low-rank maps beside the layers of any quantized denoiser, in closed form."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.corrections.recovery_adapters import RecoveryAdapters
from evenkeel.errors import CalibrationError
from evenkeel.fitting.adapters.collect import collect
from evenkeel.fitting.adapters.confirming import confirmation
from evenkeel.fitting.adapters.final_samples import FinalSamples
from evenkeel.fitting.adapters.kept import Kept
from evenkeel.fitting.adapters.pairs import Pairs
from evenkeel.fitting.adapters.sites import opened, sites_of
from evenkeel.fitting.adapters.solve import solve
from evenkeel.hosts.backends.catalogue import bytes_of
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.low_rank.factors import BITS

METRICS = ("output", "uniform", "local")
TRIED_BITS = (3, 4)
PROBED = 16  # prompts of which gradients are taken


@dataclass(frozen=True)
class Candidate:
    """One fit that was tried.

    Attributes:
        metric, bits: of it.
        target: what the adapters should be: the ``difference`` of the weights, or the ``regressed`` map,
            which has in it what of the rounding of inputs is linear.
        bytes: of its factors.
        predicted: error of the final sample by the metric, over that without adapters. The metric adds
            up layers and steps as if their errors were independent, so it promises more than comes.
        gain: dB by which the final samples' squared error falls, mean over the choosing pairs; None
            where there was nothing to choose between.

    """

    metric: str
    target: str
    bits: int
    bytes: int
    predicted: float
    gain: float | None = None


@dataclass(frozen=True)
class AdapterReport:
    """What was tried, chosen and confirmed.

    Attributes:
        prompts: given.
        layers: that could have an adapter.
        quantized_bytes: of the quantized denoiser.
        budget: bytes that could be spent; None where a rank was asked for.
        candidates: in the order in which they were tried.
        chosen: index of the one that was kept.
        gain: dB on the confirming pairs, mean.
        bound: one-sided 95 % lower bound of it.
        pairs: that were asked.
        confirmed: whether the bound is above zero; else the adapters are empty.

    """

    prompts: int
    layers: int
    quantized_bytes: int
    budget: int | None
    candidates: tuple[Candidate, ...]
    chosen: int
    gain: float
    bound: float
    pairs: int
    confirmed: bool

    def as_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""
        return asdict(self)

    def text(self) -> str:
        """One sentence, and a line per candidate."""
        kept = self.candidates[self.chosen]
        share = 100 * kept.bytes / self.quantized_bytes
        found = (
            f"adapters of {kept.bytes / 1e6:.3f} MB (+{share:.1f} % of the quantized denoiser) bring the "
            f"final samples {self.gain:+.2f} dB nearer on {self.pairs} held-out pairs (95 % bound "
            f"{self.bound:+.2f})"
        )
        if not self.confirmed:
            found = (
                f"nothing helped, nothing is added: the best of {len(self.candidates)} fits changes final "
                f"samples of {self.pairs} held-out pairs by {self.gain:+.2f} dB (95 % bound "
                f"{self.bound:+.2f})"
            )
        lines = [
            f"  {c.metric:7s} {c.target:10s} {c.bits:2d} bits  {c.bytes / 1e6:.3f} MB  predicted "
            f"{-10 * math.log10(max(c.predicted, 1e-30)):+.2f} dB"
            f"{_measured(self.gain if len(self.candidates) == 1 else c.gain)}"
            f"{'  <- chosen' if i == self.chosen else ''}"
            for i, c in enumerate(self.candidates)
        ]
        return "\n".join([found, *lines])


def fit_adapters(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    budget: float | None = None,
    rank: int | None = None,
    bits: int | None = None,
    metric: str | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    rows: int = 4096,
    memory: float = 2e9,
    call: dict[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[RecoveryAdapters, AdapterReport]:
    """Fit low-rank maps beside the quantized layers that bring the final samples nearest per byte.

    With W_q what a layer of ``quantized`` computes with and D = W - W_q, the map B A beside it minimizes
    ``tr(G (D - B A) S (D - B A)^T)`` (``OutputMetric``): S from rows that enter the layer along the
    quantized pipeline's own trajectory, G from gradients of random probes of the full-precision
    denoiser's output at the same inputs, each step's probe weighted by what that step's output moves in
    the final sample. The optimum is a truncated SVD; as all layers' singular values have one unit,
    bytes are shared out by gain per byte. The factors are rounded to 3 or 4 bits as part of the fit.

    Where a backend rounds what enters its layers, D is also tried with what of that rounding is a linear
    map of the input, the penalty cross-validated over prompts (``rounding_slope``).

    Several such fits are tried (metric, D) and one is chosen by the final samples of held-out
    (prompt, seed) pairs; others confirm it, by a one-sided 95 % bound: eight pairs or more, and four
    times as many where these lean to yes and are not sure. Unconfirmed, the result has no adapters and
    changes nothing. Under torchrun the processes share the prompts; all return the same.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: its quantized denoiser, of any backend; not changed.
        prompts: texts, or class labels; one works, 16 to 32 are plenty.
        num_inference_steps: as passed to the pipeline.
        budget: bytes of all adapters over bytes of the quantized denoiser; .05 if neither is given.
        rank: the same for all layers, in place of a budget.
        bits: of a value in the factors: 3, 4, 8 or 16; None takes the better of 3 and 4 by the metric.
        metric: ``output``, ``uniform`` (every step weighs the same) or ``local`` (no gradients, S alone);
            None tries them.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call.
        rows: kept of each layer, at most.
        memory: bytes for the rows of all layers and the matrices made of them; more rows are kept in files in
            the folder for temporary ones.
        call: further arguments of the pipeline call.
        folder: for finished batches of rows and of held-out samples. After a kill, the same call goes on
            there and gives the same adapters, bit for bit; with another budget, rank or metric it uses what
            is the same. It is not removed.
        progress: show a bar.

    Returns:
        The adapters, for ``evenkeel.apply`` and ``evenkeel.save``, and what was tried.

    Raises:
        CalibrationError: nothing is quantized, or an argument is out of range.
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
    found = fitted(
        run,
        budget,
        rank=rank,
        bits=bits,
        metric=metric,
        rows=rows,
        memory=memory,
        folder=folder,
        progress=progress,
    )
    return found.adapters, found.report


@dataclass(frozen=True)
class Fitted:
    """Adapters, their report, and the held-out pairs that confirmed them.

    Attributes:
        held_out: for whatever is to be fitted on top.
        pairs: that it is of.
        gains_over: dB of the adapters on some of these.

    """

    adapters: RecoveryAdapters
    report: AdapterReport
    held_out: FinalSamples
    pairs: Pairs
    gains_over: Callable[[range], Tensor]


def fitted(
    run: Run,
    budget: float | None,
    *,
    rank: int | None = None,
    bits: int | None = None,
    metric: str | None = None,
    rows: int = 4096,
    memory: float = 2e9,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Fitted:
    """What ``fit_adapters`` does, for a run with a quantized twin."""
    _check(budget, rank, bits, metric, rows)
    run.pair  # noqa: B018 - identical twins are refused before anything is computed
    size = stored_size(run.pair[1])
    share = budget if budget is not None or rank is not None else 0.05
    spend = None if share is None or rank is not None else int(share * size)
    probed = 0 if metric == "local" else PROBED
    kept = Kept.of(folder)
    with processes().telling():
        with opened(sites_of(run), rows, memory, gradients=probed > 0) as sites:
            tried = _tried(metric, rounding=any(s.outputs is not None for s in sites.values()))
            pairs = Pairs.of(run, choosing=len(tried) > 1)
            collected = collect(pairs.fit, sites, probed=probed, progress=progress, kept=kept)
            precisions = TRIED_BITS if bits is None else (bits,)
            spare = memory - sum(site.nbytes for site in sites.values())
            count, solutions = solve(sites, tried, precisions, spend, rank, spare)
        found = [
            (Candidate(*t, s.bits, s.stored_bytes, s.predicted), tuple(s.layers))
            for t, s in solutions.items()
        ]
        held_out = FinalSamples(pairs.held_out, kept, len(pairs.further))
        chosen = 0
        if len(found) > 1:
            gains = [held_out.gains(pairs.choose, layers) for _, layers in found]
            found = [
                (replace(said, gain=float(g.mean())), layers)
                for (said, layers), g in zip(found, gains, strict=True)
            ]
            chosen = _best(gains)
        best, layers = found[chosen]
        gains_over: Callable[[range], Tensor] = cache(partial(held_out.gains, adapters=layers))
        said = confirmation(pairs, gains_over)
        report = AdapterReport(
            prompts=len(run.prompts),
            layers=count,
            quantized_bytes=size,
            budget=spend,
            candidates=tuple(c for c, _ in found),
            chosen=chosen,
            gain=said.mean,
            bound=said.bound,
            pairs=said.pairs,
            confirmed=said.holds,
        )
        made_for = run.provenance(collected.law, collected.first[:1, None], correction="adapters")
    if not report.confirmed:
        layers, gains_over = (), _none
    adapters = RecoveryAdapters(made_for, best.metric, best.bits, layers)
    return Fitted(adapters, report, held_out, pairs, gains_over)


def _none(over: range) -> Tensor:
    return torch.zeros(len(over), dtype=torch.float64)


def _best(gains: Sequence[Tensor]) -> int:
    """The first of those that the pairs cannot tell from the best, within one standard error.

    A few pairs tell fits of which one is clearly better; where they do not, their order is chance, and
    the order in which they are tried is that of what they know of the output. What each one's metric
    predicts does not help: it is said in that metric.

    >>> _best([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.5, 3.0])])
    0
    >>> _best([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.1, 4.0])])
    1

    """
    most = max(gains, key=lambda g: float(g.mean()))
    if len(most) < 2:
        return 0
    behind = [most - g for g in gains]
    return next(i for i, d in enumerate(behind) if d.mean() <= d.std() / len(d) ** 0.5)


def _tried(metric: str | None, *, rounding: bool) -> list[tuple[str, str]]:
    """Metrics and targets. Where inputs stay as they are the law's weights were never beaten by even ones."""
    if not rounding:
        return [(m, "difference") for m in (("output", "local") if metric is None else (metric,))]
    metrics = METRICS if metric is None else (metric,)
    return list(product(metrics, ("regressed", "difference")))


def _measured(value: float | None) -> str:
    return "" if value is None else f", measured {value:+.2f} dB"


def stored_size(denoiser: nn.Module) -> int:
    """Bytes of a quantized denoiser; of a simulated one as its folder on disk takes them."""
    report = getattr(denoiser, "evenkeel_report", None)
    return int(getattr(report, "stored_bytes", 0)) or bytes_of(denoiser)


def _check(
    budget: float | None, rank: int | None, bits: int | None, metric: str | None, rows: int
) -> None:
    if budget is not None and rank is not None:
        raise CalibrationError("give a budget or a rank, not both.")
    if budget is not None and not 0 < budget <= 1:
        raise CalibrationError(
            f"budget is a share of the quantized denoiser's bytes, above 0 and at most 1; got {budget}."
        )
    if rank is not None and rank < 1:
        raise CalibrationError(f"rank must be at least 1, got {rank}.")
    if bits is not None and bits not in BITS:
        raise CalibrationError(f"bits must be one of {BITS}, got {bits}.")
    check_metric(metric, rows)


def check_metric(metric: str | None, rows: int) -> None:
    """Refuse a metric that there is not, and too few rows for any."""
    if metric is not None and metric not in METRICS:
        raise CalibrationError(f"metric must be one of {METRICS}, got {metric!r}.")
    if rows < 64:
        raise CalibrationError(f"rows must be at least 64, got {rows}.")
