"""Compare: the same prompts and the same initial noise through every arm, measured with intervals."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.comparing.further import Sight, further, further_differences, seen
from evenkeel.comparing.generation import Arm as Arm
from evenkeel.comparing.generation import check_corrections, generate, identity_of
from evenkeel.corrections.base import Correction
from evenkeel.errors import MetricError
from evenkeel.estimate import Estimate
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.hosts.processes import processes
from evenkeel.hosts.run import Run
from evenkeel.metrics import (
    alignment,
    frechet_difference,
    frechet_distance,
    mean_difference,
    mean_estimate,
    per_image_alignment,
    per_image_psnr,
    per_image_ssim,
)
from evenkeel.metrics.inputs import BlackImages, black_rows, black_text
from evenkeel.threads import sensible_threads

FULL_PRECISION = "full-precision"
QUANTIZED = "quantized"
MEASURES = (
    "frechet_full_precision",
    "frechet_reference",
    "alignment",
    "psnr",
    "ssim",
    "seconds_per_image",
)
FEWEST = 3  # images that a distance between sets of them needs, see metrics.inputs
_MISSING = Estimate(float("nan"), float("nan"), float("nan"), float("nan"), 0)


class Evaluator(Protocol):
    """Sees images: features for distances and, if it can, whether they show what was asked.

    What else it may show, and what is measured of that, says ``comparing.further.seen``.
    """

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] to (n, d)."""
        ...

    def matches(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | None:
        """(n, attributes) of 0 and 1, NaN where the prompt leaves it open; None if it cannot tell."""
        ...


@dataclass
class ArmResult:
    """What one arm measured.

    Attributes:
        name: of the arm.
        measures: by the names in ``MEASURES``, and ``further`` ones; NaN where an evaluator or
            reference is missing.
        difference_to_quantized: paired differences, this arm minus the quantized one.
        black: which images are black in every pixel, as those made of NaN are; all are scored.

    """

    name: str
    measures: dict[str, Estimate]
    difference_to_quantized: dict[str, Estimate] = field(default_factory=dict)
    black: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> ArmResult:
        """What ``dataclasses.asdict`` made of one."""
        measures, differences = (
            {key: Estimate(**value) for key, value in said[part].items()}
            for part in ("measures", "difference_to_quantized")
        )
        return cls(said["name"], measures, differences, list(said["black"]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        out: dict[str, Any] = {"name": self.name}
        out |= {k: v.as_dict() for k, v in self.measures.items()}
        if self.difference_to_quantized:
            out["difference_to_quantized"] = {
                k: v.as_dict() for k, v in self.difference_to_quantized.items()
            }
        if self.black:
            out["black"] = self.black
        return out


@dataclass
class Comparison:
    """All arms, with the images they were measured on: name -> (n, 3, H, W) uint8.

    Of several processes only the main one holds images.
    """

    arms: list[ArmResult]
    images: dict[str, Tensor]

    def __getitem__(self, name: str) -> ArmResult:
        return next(a for a in self.arms if a.name == name)


def compare(
    pipeline: Any,
    arms: Sequence[Arm],
    *,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    seed: int = 1_000_000,
    batch_size: int = 32,
    evaluator: Evaluator | None = None,
    reference_images: Tensor | None = None,
    call: dict[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    more: bool = False,
    progress: bool = True,
) -> Comparison:
    """Generate every prompt in every arm from the same noise, and measure.

    The first arm must be the full-precision one: distances, PSNR and SSIM of the others are taken
    to its images. Prompt i starts from noise of seed ``seed + i`` in every arm; the default seed is
    far from calibration's. Under torchrun every process generates a share of the batches; all
    return the same measures, and the main one the images.

    Args:
        pipeline: any diffusers pipeline.
        arms: the first is the reference; one named ``quantized`` gets the others' paired differences.
        prompts: texts or class labels; ``Prompts.of`` with what else comes per prompt.
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline.
        seed: of the first prompt's noise.
        batch_size: prompts per call.
        evaluator: for Frechet distances and alignment; without it both are NaN.
        reference_images: (n, 3, H, W) uint8, as many as prompts: real images to compare with.
        call: further pipeline arguments.
        folder: keep each arm's images here as they are made; the same call later continues.
        more: further measures, too: spatial and kernel distances, inception score, precision and recall,
            perceptual distance, and shifts of the pictures' own statistics.
        progress: show a bar.

    Raises:
        MetricError: unequal numbers of images, no arms, or images that are not finite. Images that are
            black in every pixel are counted in the result, and warned of (``BlackImages``) where the first
            arm's are not.
        StorageError: the folder holds images of other prompts or settings, or damaged ones.
        EvenkeelError: a correction was not made for this pipeline; nothing has been generated then.

    """
    if len(arms) < 2 or len({a.name for a in arms}) != len(arms):
        raise MetricError(
            f"expected at least two arms with different names, the full-precision one first; got "
            f"{[a.name for a in arms]}."
        )
    if reference_images is not None and len(reference_images) != len(prompts):
        raise MetricError(
            f"Frechet distances depend on the number of images: give as many reference images as "
            f"prompts ({len(prompts)}), got {len(reference_images)}."
        )
    if evaluator is not None and len(prompts) < FEWEST:
        raise MetricError(
            f"{len(prompts)} images are too few for the distance between two sets of them: expected at "
            f"least {FEWEST} prompts, better some hundred."
        )
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
    hidden = not (progress and us.main)
    images: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {}
    with us.telling():
        if us.count > 1:
            run.agreed("comparison", arms=[identity_of(run, arm) for arm in arms])
        check_corrections(run, arms)
        total = len(run.share()) * len(arms)
        with tqdm(total=total, desc="generate", unit="batch", disable=hidden) as bar:
            for arm in arms:
                bar.set_postfix_str(arm.name)
                images[arm.name], seconds[arm.name] = generate(run, arm, folder, bar.update)
        results = []
        if us.main:
            values = run.prompts.values
            words = in_words(pipeline, values)
            results = measure(images, seconds, values, evaluator, reference_images, more, words)
            _add_times(results, seconds, num_inference_steps)
        (found, _), *_ = us.gathered([asdict(result) for result in results])
    if not us.main:
        return Comparison([ArmResult.of(said) for said in found], {})
    return Comparison(results, images)


def _add_times(
    results: Sequence[ArmResult], seconds: Mapping[str, list[float]], steps: int
) -> None:
    if QUANTIZED in seconds:
        for result in results:
            if result.difference_to_quantized:
                result.difference_to_quantized["seconds_per_step"] = _extra_time(
                    seconds[result.name], seconds[QUANTIZED], steps
                )


def _extra_time(mine: list[float], quantized: list[float], steps: int) -> Estimate:
    """Seconds per image and step that an arm takes longer, batch by batch."""
    a, b = (torch.tensor(s, dtype=torch.float64) / steps for s in (mine, quantized))
    return mean_difference(a, b)


def measure(
    images: Mapping[str, Tensor],
    seconds: Mapping[str, list[float]],
    prompts: Sequence[Prompt],
    evaluator: Evaluator | None,
    reference_images: Tensor | None,
    more: bool = False,
    words: Sequence[Prompt] | None = None,
) -> list[ArmResult]:
    """All measures of all arms; the first arm is what the others are compared with.

    ``words`` are the prompts for an evaluator that reads; None takes them as they are.
    """
    names = list(images)
    black = {name: black_rows(images[name]) for name in names}
    for name in (n for n in names if not {*black[n]} <= {*black[names[0]]}):
        text = black_text(black[name], len(images[name]))
        warnings.warn(f"arm {name!r}: {text}", BlackImages, stacklevel=3)
    floats = {name: images[name].float() / 255 for name in names}
    features = {name: _features(evaluator, floats[name]) for name in names}
    matches = {name: _matches(evaluator, floats[name], prompts) for name in names}
    real = None
    if reference_images is not None:
        real = _features(evaluator, reference_images.float() / 255)
    # What an evaluator's network gains from is its own affair.
    with sensible_threads(images[names[0]].numel()):
        results = _results(floats, features, matches, seconds, real)
        if more:
            theirs = None
            if reference_images is not None:
                theirs = seen(evaluator, reference_images.float() / 255, real)
            _add_further(results, evaluator, floats, features, theirs, words or prompts)
    for result in results:
        result.black = black[result.name]
    return results


def _results(
    floats: Mapping[str, Tensor],
    features: Mapping[str, Tensor | None],
    matches: Mapping[str, Tensor | None],
    seconds: Mapping[str, list[float]],
    real: Tensor | None,
) -> list[ArmResult]:
    names = list(floats)
    first = names[0]
    results = {name: ArmResult(name, dict.fromkeys(MEASURES, _MISSING)) for name in names}
    per_image = {name: _per_image(floats[name], floats[first], matches[name]) for name in names}
    for name in names:
        found = results[name].measures
        mine = features[name]
        origin = features[first]
        if mine is not None and origin is not None:
            if name == first:
                found["frechet_full_precision"] = Estimate(0.0, 0.0, 0.0, 0.0, len(mine))
            else:
                found["frechet_full_precision"] = frechet_distance(
                    mine, origin, paired_reference=True
                )
        if mine is not None and real is not None:
            found["frechet_reference"] = frechet_distance(mine, real)
        for key, values in per_image[name].items():
            found[key] = _mean(values) if key != "alignment" else alignment(values)
        found["seconds_per_image"] = mean_estimate(torch.tensor(seconds[name], dtype=torch.float64))
    if QUANTIZED in results:
        for name in names:
            if name not in (first, QUANTIZED):
                results[name].difference_to_quantized = _differences(
                    name, features, per_image, features[first], real
                )
    return list(results.values())


def _add_further(
    results: Sequence[ArmResult],
    evaluator: Evaluator | None,
    floats: Mapping[str, Tensor],
    features: Mapping[str, Tensor | None],
    real: Sight | None,
    prompts: Sequence[Prompt],
) -> None:
    names = list(floats)
    first = floats[names[0]]
    sights = {n: seen(evaluator, floats[n], features[n], first, prompts) for n in names}
    for result in results:
        mine, origin = sights[result.name], sights[names[0]]
        result.measures |= further(mine, origin, real)
        if QUANTIZED in sights and result.name not in (names[0], QUANTIZED):
            result.difference_to_quantized |= further_differences(
                mine, sights[QUANTIZED], origin, real
            )


def in_words(pipeline: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Class labels by the first name that the pipeline's ``labels`` have for them; others as they are.

    >>> from types import SimpleNamespace
    >>> in_words(SimpleNamespace(labels={"goldfish": 1, "Carassius auratus": 1}), [1, 2, "1"])
    ['goldfish', 2, '1']

    """
    known: Mapping[str, int] = getattr(pipeline, "labels", None) or {}
    names = {number: name for name, number in reversed([*known.items()])}
    return [names.get(p, p) if isinstance(p, int) else p for p in prompts]


def _features(evaluator: Evaluator | None, images: Tensor) -> Tensor | None:
    if not hasattr(evaluator, "features"):  # nothing, or one that sees pairs alone
        return None
    assert evaluator is not None
    with torch.no_grad():
        return torch.cat([evaluator.features(part) for part in torch.split(images, 256)])


def _matches(
    evaluator: Evaluator | None, images: Tensor, prompts: Sequence[Prompt]
) -> Tensor | None:
    if not hasattr(evaluator, "matches"):
        return None
    assert evaluator is not None
    with torch.no_grad():
        return evaluator.matches(images, prompts)


def _per_image(images: Tensor, first: Tensor, matches: Tensor | None) -> dict[str, Tensor]:
    found = {"psnr": per_image_psnr(images, first), "ssim": per_image_ssim(images, first)}
    if matches is not None:
        found["alignment"] = matches
    return found


def _mean(values: Tensor) -> Estimate:
    """An image equal to its reference has infinite PSNR, and then so has the mean."""
    if torch.isinf(values).any():
        return Estimate(float("inf"), float("nan"), float("nan"), float("nan"), len(values))
    return mean_estimate(values)


def _differences(
    name: str,
    features: Mapping[str, Tensor | None],
    per_image: Mapping[str, dict[str, Tensor]],
    origin: Tensor | None,
    real: Tensor | None,
) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    mine, quantized = features[name], features[QUANTIZED]
    if mine is not None and quantized is not None and origin is not None:
        found["frechet_full_precision"] = frechet_difference(
            mine, quantized, origin, paired_reference=True
        )
        if real is not None:
            found["frechet_reference"] = frechet_difference(mine, quantized, real)
    for key, values in per_image[name].items():
        other = per_image[QUANTIZED][key]
        if key == "alignment":
            values, other = per_image_alignment(values), per_image_alignment(other)
        if not (torch.isinf(values).any() or torch.isinf(other).any()):
            found[key] = mean_difference(values, other)
    return found


def standard_arms(
    pipeline: Any,
    quantized: nn.Module,
    corrections: Sequence[Correction] | Mapping[str, Correction],
    **options: Any,
) -> list[Arm]:
    """Full precision, quantized, and one arm per correction, by its name or the given one."""
    if not isinstance(corrections, Mapping):
        corrections = {c.name: c for c in corrections}
    arms = [Arm(FULL_PRECISION, denoiser_of(pipeline)), Arm(QUANTIZED, quantized)]
    return arms + [Arm(name, quantized, c, **options) for name, c in corrections.items()]
