"""How good a twin's own samples are, before any quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel import zoo
from evenkeel.errors import EvenkeelError
from evenkeel.generation import Arm, generate
from evenkeel.hosts.pipelines import denoiser_of
from evenkeel.metrics import frechet_distance, mean_estimate
from evenkeel.zoo.pictures import KINDS, Pictures

SEED = 31
BATCH = 50
FEWER = (2, 1)  # steps with which a distilled twin and its teacher are also compared
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

    A distilled twin and its teacher are also measured side by side with as few steps and fewer, each
    with its own sampler and guidance, for the same prompts from the same noise.

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
    evaluator = pictures.evaluator(zoo.path_of(twin.name))
    prompts = pictures.prompts(images, SEED)
    steps = twin.num_inference_steps
    samples, seconds, settings = _sample(twin, prompts, steps, folder)
    sets = {
        "samples": samples,
        "held_out": pictures.references(prompts, SEED),
        "held_out_again": pictures.references(prompts, SEED + 1),
        "training": pictures.references(prompts, SEED + 2, held_out=False),
    }
    features = {k: _features(evaluator, v) for k, v in sets.items()}
    real = features["held_out"]
    taught: dict[str, Any] = {}
    if twin.teacher is not None:
        taught["teacher"] = twin.teacher
        taught["few_steps"] = [
            {
                "steps": few,
                "student": _at(twin, few, prompts, folder, evaluator, real),
                "teacher": _at(zoo.twin(twin.teacher), few, prompts, folder, evaluator, real),
            }
            for few in (steps, *(f for f in FEWER if f < steps))
        ]
    per_step = torch.tensor(seconds, dtype=torch.float64) / steps
    return {
        "command": f"python -m evenkeel.zoo.card {twin.name} --images {images}",
        "images": images,
        "seed": SEED,
        "settings": settings,
        **_shown(pictures, evaluator, sets, prompts),
        "frechet_samples_to_held_out": frechet_distance(features["samples"], real).as_dict(),
        "frechet_held_out_to_held_out": frechet_distance(
            features["held_out_again"], real
        ).as_dict(),
        "frechet_training_to_held_out": frechet_distance(features["training"], real).as_dict(),
        **taught,
        "seconds_per_image": sum(seconds) / len(seconds),
        "seconds_per_image_and_step": mean_estimate(per_step).as_dict()
        | {"fastest": float(per_step.min()), "slowest": float(per_step.max()), "batch": BATCH},
        "first_prompts": [str(p) for p in prompts[:60]],
    }, samples


def _sample(
    twin: zoo.Twin, prompts: list[Any], steps: int, folder: Path | None
) -> tuple[Tensor, list[float], dict[str, Any]]:
    """Pictures, seconds per picture of every batch, and the settings."""
    pipeline = zoo.load(twin.name)
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": twin.guidance_scale,
        "call": {},
    }
    arm = Arm(twin.name, denoiser_of(pipeline))
    made, seconds = generate(pipeline, arm, prompts, SEED, BATCH, options, folder, lambda: None)
    return made, seconds, {**options, "scheduler": type(pipeline.scheduler).__name__}


def _at(
    twin: zoo.Twin,
    steps: int,
    prompts: list[Any],
    folder: Path | None,
    evaluator: Any,
    real: Tensor,
) -> dict[str, Any]:
    """Alignment with the prompts, and distance to held-out scans, with so many steps."""
    at = None if folder is None else folder / f"{steps} steps"
    images, _, settings = _sample(twin, prompts, steps, at)
    each = evaluator.matches(images.float() / 255, prompts).nanmean(1)
    return {
        "settings": settings,
        "alignment": mean_estimate(each[~each.isnan()]).as_dict(),
        "frechet_to_held_out": frechet_distance(_features(evaluator, images), real).as_dict(),
    }


def _shown(
    pictures: Pictures, evaluator: Any, sets: dict[str, Tensor], prompts: list[Any]
) -> dict[str, Any]:
    """Shares of samples and of held-out pictures that show what was asked, or are recognisable."""
    if not pictures.attributes:
        certain = {k: _certainty(evaluator, v) for k, v in sets.items()}
        threshold = float(certain["held_out"].quantile(SURE))

        def sure(name: str) -> dict[str, Any]:
            return mean_estimate((certain[name] >= threshold).double()).as_dict()

        return {
            "recognisable_samples": sure("samples"),
            "recognisable_held_out_scans": sure("held_out_again"),
            "recognisable_threshold": threshold,
        }

    def shares(name: str) -> dict[str, Any]:
        matches = evaluator.matches(sets[name].float() / 255, prompts)
        columns = dict(zip(pictures.attributes, matches.unbind(1), strict=True))
        return {k: mean_estimate(v[~v.isnan()]).as_dict() for k, v in columns.items()}

    return {"shown_by_samples": shares("samples"), "shown_by_held_out_scans": shares("held_out")}


@torch.no_grad()
def _features(evaluator: Any, images: Tensor) -> Tensor:
    parts = [evaluator.features(p.float() / 255) for p in torch.split(images, 256)]
    return torch.cat(parts)


@torch.no_grad()
def _certainty(evaluator: Any, images: Tensor) -> Tensor:
    """Probability (n,) that the evaluator gives to the digit that it sees."""
    parts = [evaluator.network(p.float() / 255)["digit"] for p in torch.split(images, 256)]
    return torch.cat(parts).softmax(1).amax(1).double()
