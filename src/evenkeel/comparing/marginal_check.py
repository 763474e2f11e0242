"""Prediction before generation: a few dozen prompts say which corrections are worth 2,000 images.

Every arm starts from the same noise and takes the same per-step noise, so that whatever its states
differ by from the full-precision ones is the arm's doing. Nothing is decoded; batch by batch only
sums per prompt are kept, and the error of the final states. Scores, verdicts and their confidence are
explained in ``metrics.state_scores``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from evenkeel.comparing.generation import Arm, identity_of, sampling_as
from evenkeel.errors import OVERFLOW, CalibrationError, EvenkeelError
from evenkeel.estimate import Estimate
from evenkeel.hosts.pipeline.denoiser_calls import one_per_prompt
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import Processes, processes
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import Interceptor, watched
from evenkeel.metrics.mean import mean_difference
from evenkeel.metrics.state_scores import (
    PRACTICAL,
    SCORES,
    Verdict,
    scores_of,
    shared_part,
    verdict_of,
)
from evenkeel.statistics.marginals import Curves, PairedRun, PairedStates


@dataclass(frozen=True)
class ArmCheck:
    """What the check says about one correction.

    Attributes:
        name: of the arm.
        verdict: by the rule of ``metrics.state_scores``.
        confidence: in the verdict, 0 to 1, see there.
        scores: by the names in ``metrics.state_scores.SCORES``.
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
            "curves": self.curves.as_dict(),
            "extra_seconds_per_step": self.extra_seconds and self.extra_seconds.as_dict(),
        }


@dataclass(frozen=True)
class MarginalCheck:
    """Verdicts on all corrections, in the order of the arms.

    Attributes:
        prompts: how many.
        num_inference_steps: of the sampler.
        quantized: the quantized arm's states against full precision, per step.
        shared: share of its final squared error that is the same for every prompt.
        arms: one per correction that could be applied.
        not_applicable: for the others, by name, the reason.

    """

    prompts: int
    num_inference_steps: int
    quantized: Curves
    shared: Estimate | None
    arms: list[ArmCheck]
    not_applicable: dict[str, str]

    def __getitem__(self, name: str) -> ArmCheck:
        return next(a for a in self.arms if a.name == name)

    def ranked(self, by: str = "squared_error") -> list[ArmCheck]:
        """The arms, best first by a score of ``metrics.state_scores.SCORES``; where it is NaN, last.

        Raises:
            EvenkeelError: no such score.

        """
        if by not in SCORES:
            raise EvenkeelError(f"expected one of {', '.join(SCORES)}, got {by!r}.")
        values = {arm.name: arm.scores[by].value for arm in self.arms}
        return sorted(self.arms, key=lambda a: math.inf if math.isnan(v := values[a.name]) else v)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prompts": self.prompts,
            "num_inference_steps": self.num_inference_steps,
            "practical_size": PRACTICAL,
            "quantized": self.quantized.as_dict(),
            "shared": self.shared and self.shared.as_dict(),
            "arms": [a.as_dict() for a in self.arms],
            "ranking": {score: [arm.name for arm in self.ranked(score)] for score in SCORES},
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

    Under torchrun every process runs a share of the batches; all return the check of one process.

    Args:
        pipeline: any diffusers pipeline; whatever is applied to it is set aside meanwhile.
        arms: full precision first, then the quantized one, then corrections; as of ``standard_arms``.
            One that cannot be carried out is listed with the reason; the rest goes on.
        prompts: 32 to 64, other than those of the calibration.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline.
        seed: of the first prompt's noise; prompt i uses ``seed + i``. The default is far from those
            of calibration and of ``compare``.
        batch_size: prompts per call. The full-precision states of one batch are kept on the CPU.
        call: further pipeline arguments.
        progress: show a bar.

    Raises:
        CalibrationError: fewer than two arms, doubled names, a corrected first arm, fewer than 3
            prompts, or corrections of a sampler that ends where the full-precision one does.
        EvenkeelError: the full-precision or the quantized arm cannot be run.

    """
    _check_request(arms, prompts, batch_size)
    run = Run(
        pipeline,
        prompts,
        num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        call=call,
    )
    us = processes()
    with us.telling():
        if us.count > 1:
            run.agreed("check", arms=[identity_of(run, arm) for arm in arms])
        seen = _of_all(us, arms, _watched(run, arms, progress and us.main))
    base = arms[1].name
    found = []
    for name in (n for n in seen.states if n != base):
        scores = scores_of(seen.states[name], seen.states[base], seen.resolution)
        extra = _extra(seen.seconds[name], seen.seconds[base])
        curves = seen.states[name].curves()
        found.append(ArmCheck(name, *verdict_of(scores), scores, curves, extra))
    quantized, shared = seen.states[base].curves(), shared_part(seen.states[base])
    return MarginalCheck(len(prompts), num_inference_steps, quantized, shared, found, seen.reasons)


@dataclass(frozen=True)
class _Seen:
    """By arm, but the first: its states, seconds per prompt and step of every batch, or why not.

    ``resolution`` is that of the states' dtype; 0 where no batch was run.
    """

    states: dict[str, PairedStates]
    seconds: dict[str, Tensor]
    reasons: dict[str, str]
    resolution: float


def _watched(run: Run, arms: Sequence[Arm], progress: bool) -> _Seen:
    """Every arm, over the batches that are this process's."""
    parts: dict[str, list[PairedStates]] = {arm.name: [] for arm in arms[1:]}
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms[1:]}
    reasons: dict[str, str] = {}
    resolution, batches = 0.0, run.share()
    total = len(batches) * len(arms)
    with tqdm(total=total, desc="check", unit="batch", disable=not progress) as bar:
        for batch in batches:
            processes().check()
            origin = _Watch(run, batch, None)
            for index, arm in enumerate(arms):
                bar.set_postfix_str(arm.name)
                watch = _Watch(run, batch, origin.states) if index else origin
                try:
                    if arm.name not in reasons:
                        with sampling_as(run, arm), watched(run.pipeline.scheduler, watch):
                            run.sample(batch)
                        if index:
                            parts[arm.name].append(watch.result())
                            seconds[arm.name].append(watch.seconds_per_step / len(batch))
                except EvenkeelError as error:
                    if index < 2:
                        raise
                    reasons[arm.name] = str(error)
                bar.update()
            resolution = torch.finfo(origin.states[-1].dtype).eps
    known = {name: part for name, part in parts.items() if part and name not in reasons}
    return _Seen(
        {name: PairedStates.joined(part) for name, part in known.items()},
        {name: torch.tensor(seconds[name], dtype=torch.float64) for name in known},
        reasons,
        resolution,
    )


def _of_all(us: Processes, arms: Sequence[Arm], own: _Seen) -> _Seen:
    """What all processes saw, in the order of the prompts; an arm that failed in one is left out."""
    names = [arm.name for arm in arms[1:]]
    mine = {
        f"{names.index(name)}.{key}": tensor
        for name, states in own.states.items()
        for key, tensor in {**states.as_tensors(), "seconds": own.seconds[name]}.items()
    }
    said, tensors = zip(*us.gathered([own.reasons, own.resolution], mine), strict=True)
    reasons: dict[str, str] = {}
    for theirs, _ in said:
        reasons = theirs | reasons
    states, seconds = {}, {}
    for index, name in enumerate(names):
        if name in reasons:
            continue
        start = f"{index}."
        parts = [
            {key.removeprefix(start): part[key] for key in part if key.startswith(start)}
            for part in tensors
        ]
        parts = [part for part in parts if part]  # more processes than batches
        seconds[name] = torch.cat([part.pop("seconds") for part in parts])
        states[name] = PairedStates.joined([PairedStates.of_tensors(part) for part in parts])
    return _Seen(states, seconds, reasons, max(resolution for _, resolution in said))


def _check_request(arms: Sequence[Arm], prompts: Sequence[Prompt], batch_size: int) -> None:
    names = [arm.name for arm in arms]
    if len(arms) < 2 or len(set(names)) < len(names) or arms[0].correction is not None:
        raise CalibrationError(
            f"expected arms with different names, the full-precision one without a correction first "
            f"and the quantized one second; got {names}."
        )
    if isinstance(prompts, str) or len(prompts) < 3 or batch_size < 1:
        raise CalibrationError(
            f"expected at least 3 prompts (32 to 64 for verdicts worth having) in batches of at "
            f"least 1; got {prompts!r:.80} in batches of {batch_size}."
        )


class _Watch(Interceptor):
    """Keeps the states of one batch, or compares them with those kept of the full-precision arm."""

    def __init__(self, run: Run, batch: Batch, reference: list[Tensor] | None) -> None:
        self.states: list[Tensor] = []
        self._run, self._prompts, self._reference = run, len(batch), reference
        self._pairs = PairedRun()
        self._dtype = torch.float32
        self._steps, self._seconds, self._left = 0, 0.0, math.nan

    @property
    def seconds_per_step(self) -> float:
        """Of the whole batch, from the second step on: plans are made at the first. NaN for one."""
        return self._seconds / (self._steps - 1) if self._steps > 1 else math.nan

    def result(self) -> PairedStates:
        """What was compared."""
        if self._reference is None or self._steps != len(self._reference):
            raise CalibrationError(
                f"this arm took {self._steps} steps and the full-precision one "
                f"{len(self._reference or ())}; their states cannot be compared step by step."
            )
        return self._pairs.result()

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Remember what the result will be rounded to."""
        self._dtype = sample.dtype

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """Take the state; what that takes is not counted as the arm's time."""
        state = result.detach().to(self._dtype).to("cpu", copy=True)  # waits for the device
        if self._steps:
            self._seconds += time.perf_counter() - self._left
        self._keep(state)
        self._steps += 1
        self._left = time.perf_counter()
        return result

    def _keep(self, state: Tensor) -> None:
        state = one_per_prompt(state, self._prompts)
        if not bool(state.isfinite().all()):
            raise CalibrationError(
                f"the state after step {self._steps} is NaN or infinite; nothing is compared. {OVERFLOW}"
            )
        if self._reference is None:
            self.states.append(state)
        elif self._steps < len(self._reference):
            layout = self._run.layout(state)
            self._pairs.add(
                self._reference[self._steps], state, layout.as_channels, layout.is_spatial
            )


def _extra(mine: Tensor, quantized: Tensor) -> Estimate | None:
    unknown = bool(torch.isnan(mine + quantized).any())
    return None if unknown else mean_difference(mine, quantized)
