"""Measure StepbaQ in closed loop: the error of every state on the runs that the earlier steps left."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.corrections.plan import SamplerPlan
from evenkeel.corrections.stepbaq import StepbaQ
from evenkeel.errors import CalibrationError, UnsupportedSampler
from evenkeel.fitting.closed_loop.loop import Answers, Pair, Rule, run_closed_loop
from evenkeel.hosts.actuators.step_change import StepChange
from evenkeel.hosts.actuators.told_level import LevelTeller
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import uncompiled
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import ALONE, Processes, processes
from evenkeel.hosts.run import Run
from evenkeel.sampling.step_law import Array, StepLaw
from evenkeel.statistics.exact import Pending, add_pairs, sum_pair, working
from evenkeel.statistics.provenance import Provenance


def fit_stepbaq(
    pipeline: Any,
    *,
    quantized: nn.Module,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    fence: float | None = None,
    relabel_time: bool = True,
    call: dict[str, Any] | None = None,
    progress: bool = True,
) -> StepbaQ:
    """Mean and variance of the state's quantization error after every step, measured sequentially.

    Both runs of every prompt start from the same noise. After a step, the error x_quantized - x_full of
    all prompts gives a mean per channel and one variance. Where it raises the noise level to another
    training timestep, the mean is taken off, the full-precision run goes on from that corrected state
    too, and *both* runs make the next step from the raised level, so that what is measured after it is
    the quantization's doing alone. Where it does not, both runs go on from their own states and the
    error grows (StepbaQ, NeurIPS 2024). Costs two denoiser evaluations per step and batch.

    The paper does not say that the full-precision run is relabelled with the other; without it, the
    relabelling itself would count as error.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        quantized: the quantized denoiser.
        prompts: texts, or class labels; published with 128.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise.
        batch_size: prompts per pipeline call; the result is that of all prompts together.
        fence: leave out errors beyond the quartiles by this many times the interquartile range before
            the variance is taken (Tukey; 1.7 for SDXL-Turbo W4A8); None keeps all.
        relabel_time: False for few-step models, see ``StepbaQ``.
        call: further arguments of the pipeline call.
        progress: show a bar.

    Raises:
        CalibrationError: no prompts, identical twins, outputs that are not finite, a negative fence.
        UnsupportedSampler: the scheduler does not say which noise levels its network was trained on.
        UnsupportedPipeline: its denoiser cannot be told another level.

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
    if fence is not None and not fence >= 0:
        raise CalibrationError(
            f"fence is a factor on the interquartile range, at least 0, or None; got {fence}."
        )
    return StepbaQFit(fence, relabel_time).fitted(run, progress=progress)


def training_levels(scheduler: Any, prediction: str) -> Array | None:
    """(N,) sigma / alpha of the training timesteps; None for flow matching, whose time is continuous.

    Raises:
        UnsupportedSampler: the scheduler holds no ``alphas_cumprod``.

    """
    if prediction == "flow_prediction":
        return None
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UnsupportedSampler(
            f"{type(scheduler).__name__} has no alphas_cumprod: the noise levels of the training timesteps "
            f"are unknown, and StepbaQ rounds to them. Fit with a scheduler that has them (DDIM, Euler, "
            f"DPM-Solver)."
        )
    kept = torch.as_tensor(table).cpu().double().numpy()
    with np.errstate(divide="ignore"):
        return np.asarray(np.sqrt((1 - kept) / kept))


class StepbaQFit(Rule):
    """The errors so far, and what follows from them for the coming step, in both runs.

    The step after a relabelling must be the same step in both: same level, same rewritten output, same
    length. The arguments are those of ``fit_stepbaq``.
    """

    def __init__(self, fence: float | None = None, relabel_time: bool = True) -> None:
        self._fence, self._relabel_time = fence, relabel_time
        self._tellers = (LevelTeller(), LevelTeller())
        self._means: list[Tensor] = []
        self._variances: list[float] = []
        self._scheduler: Any = None
        self._training: Array | None = None
        self._plan: SamplerPlan | None = None
        self._change = StepChange(None, None)
        #: Per run and batch the sample and output of the step; what a stretch of its result needs.
        self._entered: list[tuple[tuple[Tensor, Tensor], ...]] = []

    def fitted(self, run: Run, *, progress: bool = True) -> StepbaQ:
        """The correction for this run."""
        self._scheduler = run.pipeline.scheduler
        with ExitStack() as told:
            for module, teller in zip(run.pair, self._tellers, strict=True):
                hook = uncompiled(module).register_forward_pre_hook(teller, with_kwargs=True)
                told.callback(hook.remove)
            made_for = run_closed_loop(run, self, title="StepbaQ", progress=progress).provenance
        return self.correction(made_for.levels, made_for)

    def output(
        self, step: int, pairs: list[Pair], layout: LatentLayout, law: StepLaw
    ) -> Answers | None:
        """Rewrite the outputs of both runs where the earlier steps ask for it."""
        if self._plan is not None:
            device = pairs[0].output.device
            self._change = StepChange.of(self._plan, step, layout, device)
        edit = self._change.edit
        outputs = [(p.reference_output, p.output) for p in pairs]
        if edit is not None:
            outputs = [
                (edit(e, p.reference_sample, None), edit(q, p.sample, None))
                for (e, q), p in zip(outputs, pairs, strict=True)
            ]
        if self._change.stretch is not None:
            self._entered = [
                ((p.reference_sample, e), (p.sample, q))
                for (e, q), p in zip(outputs, pairs, strict=True)
            ]
        return None if edit is None else ([e for e, _ in outputs], [q for _, q in outputs])

    def state(
        self, step: int, results: list[tuple[Tensor, Tensor]], layout: LatentLayout, law: StepLaw
    ) -> Answers | None:
        """Measure the error after this step; where it is taken off, both runs go on without it."""
        stretch = self._change.stretch
        if stretch is not None:
            results = [
                (stretch(e, [ours[0]], [ours[1]]), stretch(q, [theirs[0]], [theirs[1]]))
                for (e, q), (ours, theirs) in zip(results, self._entered, strict=True)
            ]
        mean = self._measured(step, results, layout, law)
        if mean is not None:
            states = [q - mean.to(q.device) for _, q in results]
            return states, states
        return None if stretch is None else ([e for e, _ in results], [q for _, q in results])

    def correction(self, levels: tuple[Array, Array], source: Provenance | None = None) -> StepbaQ:
        """Of the steps so far; later ones have no error yet."""
        missing = len(levels[0]) - len(self._means)
        means = [*self._means, *[torch.zeros_like(self._means[0])] * missing]
        return StepbaQ(
            *levels,
            mean=torch.stack(means),
            variance=torch.tensor([*self._variances, *[0.0] * missing], dtype=torch.float64),
            training=self._training,
            relabel_time=self._relabel_time,
            source=source,
        )

    def _measured(
        self,
        step: int,
        results: list[tuple[Tensor, Tensor]],
        layout: LatentLayout,
        law: StepLaw,
    ) -> Tensor | None:
        """The mean to take off after this step, (*sample); None where the error is left to grow."""
        if self._training is None:
            self._training = training_levels(self._scheduler, law.prediction)
        errors = [layout.as_channels(working(q) - working(e)) for e, q in results]
        mean, variance = self.settled(pending_error(errors, self._fence, processes()))[0]
        self._means.append(layout.broadcast(mean)[0])
        self._variances.append(variance)
        self._plan = self.correction((law.alpha[:-1], law.sigma[:-1])).plan(law)
        if step + 1 == law.steps:
            return None
        for teller in self._tellers:
            teller.shape = tuple(results[0][0].shape[1:])
            teller.started_at(float(law.timesteps[0]))
            teller.put_step(self._plan, step + 1)
        relabel = self._plan.relabel
        corrected = relabel is not None and bool(relabel.active[step + 1])
        return self._means[-1].float() if corrected else None


def pending_error(
    errors: Sequence[Tensor], fence: float | None, us: Processes = ALONE
) -> Pending[tuple[Tensor, float]]:
    """Mean per channel, and the variance that is left, of (prompts, channels, elements) per batch.

    The variance is that of all entries within ``fence`` interquartile ranges of the quartiles (None: of
    all).

    >>> errors = torch.tensor([-1.0, 1.0, -1.0, 1.0, 50.0])
    >>> pending_error([errors.reshape(1, 1, 5)], 1.5).now()[1]
    1.0

    """
    count = int(us.summed(torch.tensor(sum(d.shape[0] * d.shape[2] for d in errors))))
    totals = us.summed(reduce(add_pairs, (sum_pair(d.transpose(0, 1).flatten(1)) for d in errors)))
    mean = totals.sum(0) / count
    left = [(d - mean[:, None]).flatten() for d in errors]
    if fence is not None:
        low, high = _quartiles(us.joined(torch.cat(left)))
        reach = fence * (high - low)
        kept = [(x >= low - reach) & (x <= high + reach) for x in left]
    else:
        kept = [torch.ones_like(x, dtype=torch.bool) for x in left]
    left = [torch.where(k, x, torch.zeros_like(x)) for k, x in zip(kept, left, strict=True)]
    sums = us.summed(reduce(add_pairs, (sum_pair(torch.stack([x, x * x])) for x in left)))
    entries = us.summed(torch.stack([k.sum() for k in kept]).sum())

    def finish(totals: Tensor, sums: Tensor, entries: Tensor) -> tuple[Tensor, float]:
        first, second = (sums.sum(0) / entries).tolist()
        return totals.sum(0) / count, max(second - first**2, 0.0)

    return Pending((totals, sums, entries), finish)


def _quartiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Linear between neighbours, of any number of entries."""
    ordered = x.sort().values
    places = [share * (len(x) - 1) for share in (0.25, 0.75)]
    below = [ordered[int(p)] for p in places]
    above = [ordered[min(int(p) + 1, len(x) - 1)] for p in places]
    low, high = (a + (p - int(p)) * (b - a) for p, a, b in zip(places, below, above, strict=True))
    return low, high
