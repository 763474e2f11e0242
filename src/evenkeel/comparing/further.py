"""What else can be said of an arm's images, where an evaluator shows more of what it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evenkeel.estimate import Estimate
from evenkeel.hosts.pipeline.prompts import Prompt
from evenkeel.metrics import (
    cmmd,
    cmmd_difference,
    frechet_difference,
    frechet_distance,
    inception_score,
    inception_score_difference,
    kernel_difference,
    kernel_distance,
    mean_difference,
    mean_estimate,
    per_image_perceptual_distance,
    per_image_precision,
    per_image_recall,
    per_image_statistics,
    shift,
    shift_difference,
)
from evenkeel.metrics.precision_recall import NEIGHBOURS

CHUNK = 256
SETS = {"spatial_frechet": "spatial", "kernel": "features", "cmmd": "embeddings"}
_DISTANCES = {
    "cmmd": (cmmd, cmmd_difference),
    "spatial_frechet": (frechet_distance, frechet_difference),
    "kernel": (kernel_distance, kernel_difference),
}


@dataclass(frozen=True)
class Sight:
    """What is seen of one arm's images, or of the real ones; None where the evaluator shows no such thing.

    Attributes:
        features: (n, d).
        spatial: (n, places) activations that keep their place.
        posterior: (n, classes).
        perceptual: (n,) distance to the first arm's pictures; None for real ones.
        statistics: of the pictures themselves, (n,) each.
        scores: of pictures with their prompts, (n,) each, by what the evaluator calls them.
        embeddings: (n, d) of unit length, as CMMD compares CLIP's.

    """

    features: Tensor | None
    spatial: Tensor | None
    posterior: Tensor | None
    perceptual: Tensor | None
    statistics: Mapping[str, Tensor]
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None


def seen(
    evaluator: Any,
    images: Tensor,
    features: Tensor | None,
    first: Tensor | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> Sight:
    """Everything that an evaluator shows of images (n, 3, H, W) in [0, 1].

    Beside ``features`` it may have ``spatial``, ``posterior`` and ``activations``, of the same images: a
    matrix (n, places), one (n, classes), and a list of (n, channels, height, width); ``perceptual``, (n,) of
    two sets of images, in the place of what activations give; ``score``, (n,) of images and their prompts,
    measured as its ``score_name`` (``prompt_score``), by each of its ``evaluators`` where it has such; and
    ``embeddings``, what CMMD compares, (n, d) of unit length.
    """

    def all_of(name: str) -> Tensor | None:
        look: Callable[[Tensor], Tensor] | None = getattr(evaluator, name, None)
        return None if look is None else torch.cat([look(p) for p in torch.split(images, CHUNK)])

    look = getattr(evaluator, "activations", None)
    apart: Callable[[Tensor, Tensor], Tensor] | None = getattr(evaluator, "perceptual", None)
    if apart is None and look is not None:

        def apart(a: Tensor, b: Tensor) -> Tensor:
            return per_image_perceptual_distance(look(a), look(b))

    perceptual, embeddings = None, getattr(evaluator, "embeddings", None)
    same = embeddings is not None and embeddings == getattr(evaluator, "features", None)
    with torch.no_grad():
        if first is not None and apart is not None:
            pairs = zip(torch.split(images, CHUNK), torch.split(first, CHUNK), strict=True)
            perceptual = torch.cat([apart(a, b) for a, b in pairs])
        return Sight(
            features,
            all_of("spatial"),
            all_of("posterior"),
            perceptual,
            per_image_statistics(images),
            {} if prompts is None else scores_of(evaluator, images, prompts),
            features if same else all_of("embeddings"),
        )


def scores_of(evaluator: Any, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """(n,) each, by name: how well pictures fit their prompts; empty where the evaluator does not say.

    Of several evaluators all are asked; of two that give the same the first.
    """
    found: dict[str, Tensor] = {}
    for one in getattr(evaluator, "evaluators", (evaluator,)):
        name = getattr(one, "score_name", "prompt_score")
        if name not in found and hasattr(one, "score"):
            found[name] = one.score(images, prompts)
    return found


def further(mine: Sight, origin: Sight, real: Sight | None) -> dict[str, Estimate]:
    """By name, all that can be measured; ``origin`` is the first arm."""
    found: dict[str, Estimate] = {}
    for name, part in SETS.items():
        distance, x = _DISTANCES[name][0], getattr(mine, part)
        if x is not None and mine is not origin:
            other = getattr(origin, part)
            found[f"{name}_full_precision"] = distance(x, other, paired_reference=True)
        if x is not None and real is not None:
            found[f"{name}_reference"] = distance(x, getattr(real, part))
    if mine.posterior is not None:
        found["inception_score"] = inception_score(mine.posterior)
    found |= {name: mean_estimate(values) for name, values in _per_image(mine, real).items()}
    for name, values in mine.statistics.items():
        found[name] = shift(values, origin.statistics[name])
    return found


def further_differences(
    mine: Sight, quantized: Sight, origin: Sight, real: Sight | None
) -> dict[str, Estimate]:
    """The same, this arm minus the quantized one, paired."""
    found: dict[str, Estimate] = {}
    for name, part in SETS.items():
        difference = _DISTANCES[name][1]
        a, b = (getattr(sight, part) for sight in (mine, quantized))
        if a is None:
            continue
        found[f"{name}_full_precision"] = difference(
            a, b, getattr(origin, part), paired_reference=True
        )
        if real is not None:
            found[f"{name}_reference"] = difference(a, b, getattr(real, part))
    if mine.posterior is not None and quantized.posterior is not None:
        found["inception_score"] = inception_score_difference(mine.posterior, quantized.posterior)
    others = _per_image(quantized, real)
    for name, values in _per_image(mine, real).items():
        found[name] = mean_difference(values, others[name])
    for name, values in mine.statistics.items():
        origins = origin.statistics[name]
        found[name] = shift_difference(values, quantized.statistics[name], origins)
    return found


def _per_image(mine: Sight, real: Sight | None) -> dict[str, Tensor]:
    found = {} if mine.perceptual is None else {"perceptual": mine.perceptual}
    found |= mine.scores
    theirs = None if real is None else real.features
    if mine.features is not None and theirs is not None and len(theirs) > NEIGHBOURS:
        found["precision"] = per_image_precision(mine.features, theirs)
        found["recall"] = per_image_recall(mine.features, theirs)
    return found
