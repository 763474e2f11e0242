"""The evaluator of pictures of emoji: which objects they show, and on what background."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from evenkeel.zoo.emoji import SCENE
from evenkeel.zoo.emoji_captions import read_caption
from evenkeel.zoo.evaluation import AttributeEvaluator, Attributes

MATCHES = ("first object", "second object", "background")
FEATURES = 96


class EmojiNetwork(Attributes):
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


class EmojiEvaluator(AttributeEvaluator):
    """Features of the network, and which parts of the caption a picture shows, in the order of MATCHES.

    Objects must stand in the order in which they are named; where one is named, a second one is wrong.

    Args:
        folder: of a twin; holds ``evaluator.safetensors``.

    """

    def __init__(self, folder: Path) -> None:
        super().__init__(EmojiNetwork(), read_caption, folder)
