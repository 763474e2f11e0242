"""The embedded evaluator, prompts and reference images of the handwriting pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.errors import StorageError
from evenkeel.storage import read_foreign_tensors
from evenkeel.threads import sensible_threads
from evenkeel.zoo import EVALUATOR_FILE
from evenkeel.zoo.captions import read_caption, sample_mentions, write_caption
from evenkeel.zoo.handwriting import (
    ATTRIBUTES,
    UNSPECIFIED,
    draw_scans,
    load_scans,
    render,
    sample_attributes,
)


class Attributes(nn.Module):
    """Sees pictures in [0, 1]: features for distances, and one score per value of every attribute.

    Subclasses make ``trunk``, ``project`` and, by attribute, ``heads``.
    """

    trunk: nn.Module
    project: nn.Module
    heads: nn.ModuleDict

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations, (n, features) float32."""
        features: Tensor = self.project(self.trunk(images * 2 - 1))
        return features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Scores per attribute: name -> (n, number of values)."""
        features = self.features(images)
        return {k: head(features) for k, head in self.heads.items()}


class AttributeNetwork(Attributes):
    """For pictures (n, 3, 32, 32) of one digit; ``features`` returns (n, 64)."""

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.SiLU(inplace=True)
            )

        self.trunk = nn.Sequential(
            block(3, 32, 1), block(32, 48, 2), block(48, 64, 1), block(64, 96, 2), block(96, 96, 2)
        )
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(96 * 16, 64), nn.SiLU())
        self.heads = nn.ModuleDict({k: nn.Linear(64, len(v)) for k, v in ATTRIBUTES.items()})


class AttributeEvaluator:
    """Features of a network, and which attributes of the caption a picture shows.

    Args:
        network: its weights are read.
        read: a caption to the value index of every attribute, UNSPECIFIED where it says nothing.
        folder: of a twin; holds ``evaluator.safetensors``.

    Raises:
        StorageError: that file is missing, damaged, or of another network.

    """

    def __init__(
        self, network: Attributes, read: Callable[[str], Mapping[str, int]], folder: Path
    ) -> None:
        self.network, self._read = network.eval(), read
        path = folder / EVALUATOR_FILE
        found = read_foreign_tensors(path)
        try:
            self.network.load_state_dict(found)
        except RuntimeError as e:
            raise StorageError(
                f"{path} is of no {type(network).__name__}: {' '.join(str(e).split())[:300]}"
            ) from e

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1] to (n, features)."""
        with sensible_threads(self.network):
            return self.network.features(images)

    @torch.no_grad()
    def activations(self, images: Tensor) -> list[Tensor]:
        """Of every layer of the trunk, (n, channels, height, width), for a distance place by place."""
        found, x = [], images * 2 - 1
        with sensible_threads(self.network):
            for layer in cast("nn.Sequential", self.network.trunk):
                x = layer(x)
                found.append(x)
        return found

    def spatial(self, images: Tensor) -> Tensor:
        """(n, 7 * places): the first 7 channels of the last layer with places, as of sFID's network.

        sFID is Nash et al. 2021 (arXiv:2103.03841), whose channels are the first 7 of Inception's
        ``mixed_6``.
        """
        return self.activations(images)[-1][:, :7].flatten(1)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """(n, values) probabilities of the first attribute's values."""
        first = next(iter(self.network.heads))
        with sensible_threads(self.network):
            return torch.softmax(self.network(images)[first], 1)

    def matches(self, images: Tensor, prompts: Sequence[str | int]) -> Tensor | None:
        """(n, attributes): 1 where the image shows what the caption says, NaN where it says nothing."""
        shown, wanted = self.seen(images, prompts)
        return torch.stack([agreement(shown[k], wanted[k]) for k in self.network.heads], 1)

    @torch.no_grad()
    def seen(
        self, images: Tensor, prompts: Sequence[str | int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Attribute -> (n,) value indices: of the pictures, and of the captions."""
        with sensible_threads(self.network):
            parts = [self.network(part) for part in torch.split(images, 256)]
        asked = [self._read(str(p)) for p in prompts]
        shown = {k: torch.cat([p[k].argmax(1) for p in parts]) for k in self.network.heads}
        return shown, {k: torch.tensor([a[k] for a in asked]) for k in shown}


def agreement(shown: Tensor, wanted: Tensor) -> Tensor:
    """(n,) 1 where both are equal, else 0; NaN where nothing is wanted."""
    match = (shown == wanted).float()
    match[wanted == UNSPECIFIED] = torch.nan
    return match


class HandwritingEvaluator(AttributeEvaluator):
    """Features of the attribute network, and which attributes of the caption an image shows."""

    def __init__(self, folder: Path) -> None:
        super().__init__(AttributeNetwork(), read_caption, folder)


def sample_prompts(n: int, seed: int) -> list[str]:
    """``n`` captions from the grammar; different seeds give independent captions."""
    rng = np.random.default_rng([seed, 7])
    attributes = sample_attributes(n, rng)
    rows = [{k: int(v[i]) for k, v in attributes.items()} for i in range(n)]
    return [write_caption(sample_mentions(r, rng), rng) for r in rows]


def reference_images(prompts: Sequence[str], seed: int, *, held_out: bool = True) -> Tensor:
    """Pictures of *held-out* scans that show what the captions ask: (n, 3, 32, 32) uint8.

    What a caption leaves open is drawn at random, as for the captions' own pictures. With
    ``held_out=False`` the scans are those that the twins were trained on.
    """
    rng = np.random.default_rng([seed, 8])
    attributes = sample_attributes(len(prompts), rng)
    for i, prompt in enumerate(prompts):
        said = {k: v for k, v in read_caption(prompt).items() if v != UNSPECIFIED}
        for name, value in said.items():
            attributes[name][i] = value
        # A free colour must still differ from the one that was asked for.
        if attributes["colour"][i] == attributes["background"][i]:
            free = "background" if "background" not in said else "colour"
            shift = int(rng.integers(1, len(ATTRIBUTES["colour"])))
            attributes[free][i] = (int(attributes[free][i]) + shift) % len(ATTRIBUTES["colour"])
    scans = draw_scans(attributes["digit"], load_scans(held_out), rng)
    pictures = render(scans, attributes, rng)
    return (pictures * 255).round().to(torch.uint8)
