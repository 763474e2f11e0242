"""The evaluator of pictures of emoji: which objects they show, and on what background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evenkeel.zoo import EVALUATOR_FILE
from evenkeel.zoo.emoji import SCENE
from evenkeel.zoo.emoji_captions import read_caption
from evenkeel.zoo.handwriting import UNSPECIFIED

MATCHES = ("first object", "second object", "background")
FEATURES = 96


class EmojiNetwork(nn.Module):
    """Sees pictures (n, 3, 64, 64) in [0, 1]: 96 features, and scores for every attribute of SCENE."""

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU(inplace=True)
            )

        self.trunk = nn.Sequential(block(3, 32), block(32, 48), block(48, 64), block(64, 64))
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({k: nn.Linear(FEATURES, len(v)) for k, v in SCENE.items()})

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (n, 96)."""
        features: Tensor = self.project(self.trunk(images * 2 - 1))
        return features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Scores per attribute: name -> (n, number of values)."""
        features = self.features(images)
        return {k: head(features) for k, head in self.heads.items()}


class EmojiEvaluator:
    """Features of the network, and which parts of the caption a picture shows.

    Args:
        folder: of a twin; holds ``evaluator.safetensors``.

    """

    def __init__(self, folder: Path) -> None:
        self.network = EmojiNetwork().eval()
        self.network.load_state_dict(load_file(folder / EVALUATOR_FILE))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [0, 1] to (n, 96)."""
        return self.network.features(images)

    @torch.no_grad()
    def matches(self, images: Tensor, prompts: Sequence[str | int]) -> Tensor:
        """(n, 3) in the order of MATCHES: 1 where an image shows what its caption says, else 0.

        NaN where the caption says nothing. Objects must stand in the order in which they are named; where
        one is named, a second one is wrong.
        """
        parts = [self.network(part) for part in torch.split(images, 256)]
        asked = [read_caption(str(p)) for p in prompts]
        columns = []
        for name in SCENE:
            shown = torch.cat([p[name].argmax(1) for p in parts])
            wanted = torch.tensor([a[name] for a in asked])
            match = (shown == wanted).float()
            match[wanted == UNSPECIFIED] = torch.nan
            columns.append(match)
        return torch.stack(columns, 1)
