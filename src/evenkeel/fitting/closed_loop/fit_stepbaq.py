"""Measure StepbaQ in closed loop: the error of every state on the runs that the earlier steps left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.corrections.plan import SamplerPlan
from evenkeel.corrections.stepbaq import StepbaQ
from evenkeel.errors import CalibrationError, UnsupportedSampler
from evenkeel.fitting.closed_loop.loop import _Loop
from evenkeel.fitting.request import Settings, check_request
from evenkeel.hosts.actuators.step_change import StepChange
from evenkeel.hosts.actuators.told_level import LevelTeller
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import Prompt, denoiser_of, quiet
from evenkeel.hosts.pipeline.strand import Finished
from evenkeel.sampling.step_law import Array, StepLaw
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
    check_request(pipeline, quantized, prompts, batch_size)
    if fence is not None and not fence >= 0:
        raise CalibrationError(
            f"fence is a factor on the interquartile range, at least 0, or None; got {fence}."
        )
    settings = Settings.of(pipeline, quantized, num_inference_steps, guidance_scale, call)
    fit = _Fit(pipeline.scheduler, fence, relabel_time)
    with quiet(pipeline), _told(pipeline, quantized, fit):
        loop = _Corrected(pipeline, quantized, list(prompts), settings, seed, batch_size, None)
        try:
            with tqdm(
                total=num_inference_steps, desc="StepbaQ", unit="step", disable=not progress
            ) as bar:
                while loop.corrected_step(fit):
                    bar.update()
        finally:
            loop.abandon()
    made_for = loop.result().provenance(pipeline, settings)
    return fit.correction(made_for.levels, made_for)


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
    kept = torch.as_tensor(table).double().cpu().numpy()
    with np.errstate(divide="ignore"):
        return np.asarray(np.sqrt((1 - kept) / kept))


class _Fit:
    """The errors so far, and what follows from them for the coming step."""

    def __init__(self, scheduler: Any, fence: float | None, relabel_time: bool) -> None:
        self.tellers = (LevelTeller(), LevelTeller())
        self._scheduler, self._fence, self._relabel_time = scheduler, fence, relabel_time
        self._means: list[Tensor] = []
        self._variances: list[float] = []
        self._training: Array | None = None
        self._plan: SamplerPlan | None = None

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

    def change(self, step: int, layout: LatentLayout, device: torch.device) -> StepChange:
        """What is done to the output and the result of this step, in both runs."""
        if self._plan is None:
            return StepChange(None, None)
        return StepChange.of(self._plan, step, layout, device)

    def measured(
        self,
        step: int,
        results: list[tuple[Tensor, Tensor]],
        layout: LatentLayout,
        law: StepLaw,
    ) -> Tensor | None:
        """The mean to take off after this step, (*sample); None where the error is left to grow."""
        if self._training is None:
            self._training = training_levels(self._scheduler, law.prediction)
        errors = torch.cat([layout.as_channels(q.double() - e.double()).cpu() for e, q in results])
        mean = errors.mean((0, 2))
        self._means.append(layout.broadcast(mean)[0])
        self._variances.append(fenced_variance(errors - mean[:, None], self._fence))
        self._plan = self.correction((law.alpha[:-1], law.sigma[:-1])).plan(law)
        if step + 1 == law.steps:
            return None
        for teller in self.tellers:
            teller.shape = tuple(results[0][0].shape[1:])
            teller.started_at(float(law.timesteps[0]))
            teller.put_step(self._plan, step + 1)
        relabel = self._plan.relabel
        corrected = relabel is not None and bool(relabel.active[step + 1])
        return self._means[-1].float() if corrected else None


def fenced_variance(errors: Tensor, fence: float | None) -> float:
    """Variance of all entries within ``fence`` interquartile ranges of the quartiles (None: of all).

    >>> fenced_variance(torch.tensor([-1.0, 1.0, -1.0, 1.0, 50.0]), 1.5)
    1.0

    """
    found = errors.double().numpy().ravel()
    if fence is not None:
        low, high = np.quantile(found, (0.25, 0.75))
        reach = fence * (high - low)
        found = found[(found >= low - reach) & (found <= high + reach)]
    return float(found.var())


@contextmanager
def _told(pipeline: Any, quantized: nn.Module, fit: _Fit) -> Iterator[None]:
    """Inside, both denoisers are told the level of the coming step."""
    twins = [getattr(m, "_orig_mod", m) for m in (denoiser_of(pipeline), quantized)]
    handles = [
        twin.register_forward_pre_hook(teller, with_kwargs=True)
        for twin, teller in zip(twins, fit.tellers, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Corrected(_Loop):
    """The closed loop with the full-precision runs corrected like the quantized ones.

    ``Rule`` changes the quantized runs only. Here the step after a relabelling must be the same step in
    both: same level, same rewritten output, same length.
    """

    def corrected_step(self, fit: _Fit) -> bool:
        """Every call takes one step; False once they have returned."""
        if self._advance() == Finished:
            return False
        pairs = self._compare()
        law, layout = self.references[0].law, self._layout
        assert law is not None and layout is not None
        change = fit.change(self.step, layout, pairs[0].output.device)
        outputs = [
            (
                _edited(change, p.reference_output, p.reference_sample),
                _edited(change, p.output, p.sample),
            )
            for p in pairs
        ]
        if change.edit is not None:
            self._answers = ([e for e, _ in outputs], [q for _, q in outputs])
        else:
            self._answers = ([None] * len(pairs), [None] * len(pairs))
        self._advance()
        results = [
            (
                _stretched(change, r.kept(r.result), pair.reference_sample, e),
                _stretched(change, q.kept(q.result), pair.sample, edited),
            )
            for r, q, pair, (e, edited) in zip(
                self.references, self.quantized, pairs, outputs, strict=True
            )
        ]
        mean = fit.measured(self.step, results, layout, law)
        if mean is not None:
            states = [q - mean.to(q.device) for _, q in results]
            self._answers = (states, states)
        elif change.stretch is not None:
            self._answers = ([e for e, _ in results], [q for _, q in results])
        else:
            self._answers = ([None] * len(pairs), [None] * len(pairs))
        self.step += 1
        return True


def _edited(change: StepChange, output: Tensor, sample: Tensor) -> Tensor:
    return output if change.edit is None else change.edit(output, sample, None)


def _stretched(change: StepChange, result: Tensor, sample: Tensor, output: Tensor) -> Tensor:
    return result if change.stretch is None else change.stretch(result, [sample], [output])
