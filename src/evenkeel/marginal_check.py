"""Prediction before generation: a few dozen prompts say which corrections are worth 2,000 images.

Every arm starts from the same noise and takes the same per-step noise, so that whatever its states
differ by from the full-precision ones is the arm's doing. Nothing is decoded, and batch by batch
only sums per prompt are kept, and the final state's error.

What a set of images would show is predicted from the final latent states, by three scores. All are
paired with the quantized arm, negative where the arm is better, with 95 % delete-one jackknife
intervals over prompts:

``squared_error``, the primary score
    Mean over prompts of log(squared error / quantized arm's). PSNR to full precision is this number
    times -4.34 dB, as far as the decoder is linear. The Fréchet distance to full precision follows
    it too: it cannot be large while every image is close to its twin.
``systematic``
    Change of |E delta|^2, the error that all prompts share, as a share of the quantized arm's
    squared error. A shared error shifts the distribution of images, which the Fréchet distance
    weighs far more than the same squared error spread over directions that differ by prompt.
``marginal``
    Relative change of the Fréchet distance between the final states' channel means and spreads (one
    of each per channel and prompt) and those of full precision: lost contrast, shifted colours.
    With a few dozen prompts it is noisy, and only shows what is gross.

A score counts as better or worse where its interval excludes zero and its value is at least
``PRACTICAL``, 1 %. Then an arm is

- *expected to help* where the squared error gets better and no score worse;
- *expected to hurt* where some score gets worse and the squared error, intervals aside, no lower;
- *neutral* otherwise.

Confidence, of help or hurt: 1 - p of the two-sided t test of the score that decided. Of neutral: the
probability, by the same distribution, that the squared error changes by less than ``PRACTICAL``.
Where that is low, neutral means "cannot be told from so few prompts", not "no effect".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import scipy.stats
import torch
from torch import Tensor
from tqdm.auto import tqdm

from evenkeel.application import applied
from evenkeel.corrections.plan import Identity
from evenkeel.errors import CalibrationError, EvenkeelError, MetricError
from evenkeel.estimate import Estimate
from evenkeel.generation import Arm
from evenkeel.hosts.interception import Interceptor, install, installed, uninstall
from evenkeel.hosts.layouts import LatentLayout, find_layout
from evenkeel.hosts.pipelines import Prompt, denoiser_swapped, quiet, run_pipeline
from evenkeel.metrics.frechet import frechet_between
from evenkeel.metrics.interval import student_interval
from evenkeel.metrics.jackknife import jackknife
from evenkeel.metrics.mean import mean_difference
from evenkeel.metrics.moments import GroupMoments
from evenkeel.statistics.marginals import (
    Curves,
    PairedRun,
    PairedStates,
    Statistic,
    log_error_ratio,
    mean_of,
    systematic_part,
)

Verdict = Literal["expected to help", "neutral", "expected to hurt"]
HELP: Verdict = "expected to help"
NEUTRAL: Verdict = "neutral"
HURT: Verdict = "expected to hurt"
PRACTICAL = 0.01
"""Changes below 1 % are neutral however certain: 0.04 dB of PSNR, which no one will see."""
SCORES = ("squared_error", "systematic", "marginal")


@dataclass(frozen=True)
class ArmCheck:
    """What the check says about one correction.

    Attributes:
        name: of the arm.
        verdict: see the module's description.
        confidence: 0 to 1, see there.
        scores: by the names in ``SCORES``.
        curves: the arm's states against full precision, per step.
        extra_seconds: per prompt and step, more than the quantized arm takes; None for one step.

    """

    name: str
    verdict: Verdict
    confidence: float
    scores: dict[str, Estimate]
    curves: Curves
    extra_seconds: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "confidence": self.confidence,
            "scores": {k: v.as_dict() for k, v in self.scores.items()},
            "curves": _curves_as_dict(self.curves),
            "extra_seconds_per_step": self.extra_seconds and self.extra_seconds.as_dict(),
        }


@dataclass(frozen=True)
class MarginalCheck:
    """Verdicts on all corrections, in the order of the arms.

    Attributes:
        prompts: how many.
        num_inference_steps: of the sampler.
        quantized: the quantized arm's states against full precision, per step.
        arms: one per correction that could be applied.
        not_applicable: for the others, by name, the reason.

    """

    prompts: int
    num_inference_steps: int
    quantized: Curves
    arms: list[ArmCheck]
    not_applicable: dict[str, str]

    def __getitem__(self, name: str) -> ArmCheck:
        return next(a for a in self.arms if a.name == name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prompts": self.prompts,
            "num_inference_steps": self.num_inference_steps,
            "practical_size": PRACTICAL,
            "quantized": _curves_as_dict(self.quantized),
            "arms": [a.as_dict() for a in self.arms],
            "not_applicable": dict(self.not_applicable),
        }


def marginal_check(
    pipeline: Any,
    arms: Sequence[Arm],
    *,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 2_000_000,
    batch_size: int = 8,
    call: dict[str, Any] | None = None,
    progress: bool = True,
) -> MarginalCheck:
    """Run a few dozen prompts through every arm and predict which corrections help.

    Args:
        pipeline: any diffusers pipeline; whatever is applied to it is set aside meanwhile.
        arms: full precision first, then the quantized one, then corrections; as of ``standard_arms``.
            A correction that cannot be carried out is listed with the reason; the rest goes on.
        prompts: 32 to 64, other than those of the calibration.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline.
        seed: of the first prompt's noise; prompt i uses ``seed + i``. The default is far from those
            of calibration and of ``compare``.
        batch_size: prompts per call. The full-precision states of one batch are kept on the CPU.
        call: further pipeline arguments.
        progress: show a bar.

    Raises:
        CalibrationError: fewer than two arms, doubled names, a correction in the first two arms,
            fewer than 3 prompts, or the quantized sampler ends where the full-precision one does.
        EvenkeelError: the full-precision or the quantized arm cannot be run.

    Example: see ``evenkeel calibrate``.

    """
    _check_request(arms, prompts)
    options = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "call": dict(call or {}),
        "output_type": "latent",
    }
    collected: dict[str, list[PairedStates]] = {arm.name: [] for arm in arms[1:]}
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms[1:]}
    reasons: dict[str, str] = {}
    total = -(-len(prompts) // batch_size) * len(arms)
    with (
        applied(pipeline, Identity()),  # sets aside what is applied, and brings it back
        quiet(pipeline),
        tqdm(total=total, desc="check", unit="batch", disable=not progress) as bar,
    ):
        uninstall(pipeline.scheduler)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            seeds = range(seed + start, seed + start + len(batch))
            origin = _Watch(pipeline, None)
            for arm in arms:
                bar.set_postfix_str(arm.name)
                watch = origin if arm is arms[0] else _Watch(pipeline, origin.states)
                if arm.name not in reasons:
                    try:
                        with _in_place(pipeline, arm, watch, guidance_scale, start > 0):
                            run_pipeline(pipeline, batch, seeds, **options)
                        if arm is not arms[0]:
                            collected[arm.name].append(watch.result())
                            seconds[arm.name].append(watch.seconds_per_step / len(batch))
                    except EvenkeelError as error:
                        if arm.correction is None:
                            raise
                        reasons[arm.name] = str(error)
                bar.update()
    states = {n: PairedStates.joined(c) for n, c in collected.items() if n not in reasons}
    quantized = arms[1].name
    resolution = torch.finfo(origin.states[-1].dtype).eps
    checks = []
    for arm in arms[2:]:
        if arm.name in reasons:
            continue
        scores = scores_of(states[arm.name], states[quantized], resolution)
        verdict, confidence = verdict_of(scores)
        extra = None
        if num_inference_steps > 1 and not math.isnan(sum(seconds[arm.name])):
            extra = mean_difference(
                torch.tensor(seconds[arm.name]).double(), torch.tensor(seconds[quantized]).double()
            )
        curves = states[arm.name].curves()
        checks.append(ArmCheck(arm.name, verdict, confidence, scores, curves, extra))
    return MarginalCheck(
        len(prompts), num_inference_steps, states[quantized].curves(), checks, reasons
    )


def scores_of(arm: PairedStates, quantized: PairedStates, resolution: float) -> dict[str, Estimate]:
    """The three scores of the module's description, with delete-one jackknife intervals.

    Args:
        arm, quantized: of the same prompts and noise.
        resolution: of the states' dtype; errors below it, relative to the state, count as equal.

    Raises:
        CalibrationError: the quantized arm's error is below the resolution: there is nothing to
            correct.

    """
    n = len(quantized.final_error)
    floor = resolution**2 * quantized.mean_square[:, -1]
    mine, theirs = arm.squared_error[:, -1], quantized.squared_error[:, -1]
    if bool((theirs <= floor).all()):
        raise CalibrationError(
            "the quantized sampler ends in the states of the full-precision one: there is nothing to "
            "correct. Check that the second arm's denoiser is the quantized one."
        )
    shared = systematic_part(arm.final_error), systematic_part(quantized.final_error)
    squared = mean_of(theirs)
    return {
        "squared_error": _estimate(mean_of(log_error_ratio(mine, theirs, floor)), n),
        "systematic": _estimate(lambda i: (shared[0](i) - shared[1](i)) / squared(i), n),
        "marginal": _marginal(arm, quantized),
    }


def verdict_of(scores: dict[str, Estimate]) -> tuple[Verdict, float]:
    """Verdict and confidence by the rule of the module's description.

    >>> sure = Estimate(-0.5, 0.05, -0.6, -0.4, 32)
    >>> same = Estimate(0.0, 0.05, -0.1, 0.1, 32)
    >>> verdict_of({"squared_error": sure, "systematic": same, "marginal": same})[0]
    'expected to help'
    >>> verdict_of({"squared_error": same, "systematic": same, "marginal": same})[0]
    'neutral'
    """
    primary = scores["squared_error"]
    worse = [s for s in scores.values() if s.low > 0 and s.value >= PRACTICAL]
    if primary.high < 0 and primary.value <= -PRACTICAL and not worse:
        return HELP, 1 - _two_sided(primary)
    if worse and primary.value >= 0:
        return HURT, 1 - min(_two_sided(s) for s in worse)
    return NEUTRAL, _below(primary, PRACTICAL) - _below(primary, -PRACTICAL)


class _Watch(Interceptor):
    """Keeps the states of the full-precision arm, or compares those of another arm with them."""

    def __init__(self, pipeline: Any, reference: list[Tensor] | None) -> None:
        self._pipeline = pipeline
        self._reference = reference
        self._layout: LatentLayout | None = None
        self._run = PairedRun(spatial=False)
        self._dtype = torch.float32
        self.states: list[Tensor] = []
        self._step = 0

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """See ``Interceptor``."""
        self._dtype = sample.dtype

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """See ``Interceptor``."""
        return result
