"""What a twin's pictures show, and how far they are from pictures of held-out scans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel.metrics import frechet_distance, mean_estimate
from evenkeel.zoo.pictures import Pictures

SURE = 0.05  # quantile of real pictures' scores from which on a sample counts as recognisable


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
