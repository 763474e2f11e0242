"""How good a twin's own samples are, before any quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel import zoo
from evenkeel.comparing.generation import Arm, generate
from evenkeel.errors import EvenkeelError
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.metrics import mean_estimate
from evenkeel.zoo.making.judging import Judge
from evenkeel.zoo.pictures import KINDS

SEED = 31
BATCH = 50
FEWER = (2, 1)  # steps with which a distilled twin and its teacher are also compared
OTHER_SAMPLERS = 5  # the original's other samplers are measured with so many times fewer images


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
