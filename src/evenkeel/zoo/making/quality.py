"""How good a twin's own samples are, before any quantization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel import zoo
from evenkeel.comparing.generation import Arm, generate
from evenkeel.errors import EvenkeelError
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.metrics import frechet_distance, mean_estimate
from evenkeel.zoo.pictures import KINDS, Pictures

SEED = 31
BATCH = 50
FEWER = (2, 1)  # steps with which a distilled twin and its teacher are also compared
OTHER_SAMPLERS = 5  # the original's other samplers are measured with so many times fewer images
SURE = 0.05  # quantile of real pictures' scores from which on a sample counts as recognisable


def measure(
    twin: zoo.Twin, images: int, folder: Path | None = None
) -> tuple[dict[str, Any], Tensor]:
    """What ``quality.json`` holds, and the samples (images, 3, 32, 32) uint8.

    Full precision, the original's sampler, steps and guidance, seed 31. What the samples show is
    judged by the twin's evaluator; beside it what real pictures of held-out scans show for the same
    prompts. Distances between sets of equal size: samples to held-out pictures, two disjoint sets of
    held-out pictures, and pictures of the training scans to held-out ones (what a twin would get that
    draws its training scans and nothing else). Each set of pictures is drawn for the same prompts.

    The original's other samplers follow, on a fifth of the prompts. A distilled twin and its teacher are
    also measured side by side with as few steps and fewer, each with its own sampler and guidance,
    for the same prompts from the same noise.

    Args:
        twin: its weights must be there, and its teacher's.
        images: how many samples.
        folder: where finished batches are kept; None keeps nothing.

    Raises:
        EvenkeelError: fewer than 100 images, or no weights.

    """
    if images < 100:
        raise EvenkeelError(
            f"expected at least 100 images to measure {twin.name} with, got {images}."
        )
    pictures = KINDS[twin.pictures]
    prompts, steps = pictures.prompts(images, SEED), twin.num_inference_steps
    held_out = pictures.references(prompts, SEED)
    held_out_again = pictures.references(prompts, SEED + 1)
    training = pictures.references(prompts, SEED + 2, held_out=False)
    judge = Judge(pictures, zoo.path_of(twin.name), held_out)
    samples, seconds, settings = _sample(twin, prompts, folder)
    if pictures.attributes:
        shown: dict[str, Any] = {
            "shown_by_samples": judge.attributes(samples, prompts),
            "shown_by_held_out_scans": judge.attributes(held_out, prompts),
        }
    else:
        shown = {
            "recognisable_samples": judge.alignment(samples, prompts),
            "recognisable_held_out_scans": judge.alignment(held_out_again, prompts),
            "recognisable_threshold": judge.threshold,
        }
    per_step = torch.tensor(seconds, dtype=torch.float64) / steps
    return {
        "command": f"python -m evenkeel.zoo.making.card {twin.name} --images {images}",
        "images": images,
        "seed": SEED,
        "settings": settings,
        **shown,
        "frechet_samples_to_held_out": judge.distance(samples),
        "frechet_held_out_to_held_out": judge.distance(held_out_again),
        "frechet_training_to_held_out": judge.distance(training),
        "samplers": _other_samplers(twin, judge, prompts[: images // OTHER_SAMPLERS], folder),
        **_few_steps(twin, judge, prompts, folder),
        "seconds_per_image": sum(seconds) / len(seconds),
        "seconds_per_image_and_step": mean_estimate(per_step).as_dict()
        | {"fastest": float(per_step.min()), "slowest": float(per_step.max()), "batch": BATCH},
        "first_prompts": [str(p) for p in prompts[:60]],
    }, samples


def _other_samplers(
    twin: zoo.Twin, judge: Judge, prompts: list[Any], folder: Path | None
) -> dict[str, Any]:
    """Short name -> alignment with the original's number of steps and guidance."""
    found = {}
    for name in list(twin.schedulers)[1:]:
        images, _, settings = _sample(twin, prompts, folder, scheduler=name)
        found[name] = {"settings": settings, "alignment": judge.alignment(images, prompts)}
    return found


def _few_steps(
    twin: zoo.Twin, judge: Judge, prompts: list[Any], folder: Path | None
) -> dict[str, Any]:
    """A distilled twin beside its teacher, with as few steps and fewer."""
    if twin.teacher is None:
        return {}

    def at(name: str, steps: int) -> dict[str, Any]:
        images, _, settings = _sample(zoo.twin(name), prompts, folder, steps=steps)
        return {
            "settings": settings,
            "alignment": judge.alignment(images, prompts),
            "frechet_to_held_out": judge.distance(images),
        }

    own = twin.num_inference_steps
    rows = [
        {"steps": few, "student": at(twin.name, few), "teacher": at(twin.teacher, few)}
        for few in (own, *(f for f in FEWER if f < own))
    ]
    return {"teacher": twin.teacher, "few_steps": rows}


def _sample(
    twin: zoo.Twin,
    prompts: list[Any],
    folder: Path | None,
    *,
    steps: int | None = None,
    scheduler: str | None = None,
) -> tuple[Tensor, list[float], dict[str, Any]]:
    """Pictures, seconds per picture of every batch, and the settings."""
    pipeline = zoo.load(twin.name, scheduler)
    steps = steps or twin.num_inference_steps
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": twin.guidance_scale,
        "call": {},
    }
    kept = None if folder is None else folder / f"{scheduler or 'own'}-{steps}"
    arm = Arm(twin.name, denoiser_of(pipeline))
    run = Run(
        pipeline, prompts, steps, guidance_scale=twin.guidance_scale, seed=SEED, batch_size=BATCH
    )
    made, seconds = generate(run, arm, kept)
    return made, seconds, {**options, "scheduler": type(pipeline.scheduler).__name__}


class Judge:
    """A twin's evaluator beside pictures of held-out scans.

    Args:
        pictures: what the twin draws.
        folder: of the twin; holds its evaluator.
        held_out: pictures of held-out scans (n, 3, 32, 32) uint8.

    """

    def __init__(self, pictures: Pictures, folder: Path, held_out: Tensor) -> None:
        self.pictures = pictures
        self.evaluator: Any = pictures.evaluator(folder)
        self._real = self._features(held_out)
        self.threshold = None
        if not pictures.attributes:
            self.threshold = float(self.certainty(held_out).quantile(SURE))

    def attributes(self, images: Tensor, prompts: Sequence[Any]) -> dict[str, Any]:
        """Attribute -> share of the images that show it as asked, where it was asked for."""
        matches = self.evaluator.matches(images.float() / 255, prompts)
        columns = dict(zip(self.pictures.attributes, matches.unbind(1), strict=True))
        return {k: mean_estimate(v[~v.isnan()]).as_dict() for k, v in columns.items()}

    def alignment(self, images: Tensor, prompts: Sequence[Any]) -> dict[str, Any]:
        """Share of what the prompts ask for that the images show.

        Where they ask for nothing, the share of recognisable images: the evaluator is at least as sure of
        the digit as of all but 5 % of the held-out pictures.
        """
        if self.threshold is None:
            each = self.evaluator.matches(images.float() / 255, prompts).nanmean(1)
            return mean_estimate(each[~each.isnan()]).as_dict()
        return mean_estimate((self.certainty(images) >= self.threshold).double()).as_dict()

    def distance(self, images: Tensor) -> dict[str, Any]:
        """Fréchet distance to the held-out pictures, in the evaluator's features."""
        return frechet_distance(self._features(images), self._real).as_dict()

    @torch.no_grad()
    def certainty(self, images: Tensor) -> Tensor:
        """Probability (n,) that the evaluator gives to the digit that it sees."""
        parts = [self.evaluator.network(p.float() / 255)["digit"] for p in torch.split(images, 256)]
        return torch.cat(parts).softmax(1).amax(1).double()

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        parts = [self.evaluator.features(p.float() / 255) for p in torch.split(images, 256)]
        return torch.cat(parts)
