"""The evaluator of pictures of one or two digits: what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from evenkeel.zoo.evaluation import AttributeEvaluator, AttributeNetwork, agreement
from evenkeel.zoo.handwriting import UNSPECIFIED
from evenkeel.zoo.scene_captions import read_caption
from evenkeel.zoo.scenes import SCENE

MATCHES = (
    "first digit",
    "second digit",
    "first colour",
    "second colour",
    "background",
    "relation",
)
FEATURES = 96


class SceneNetwork(AttributeNetwork):
    """Sees scenes (n, 3, 32, 32) in [0, 1]: 96 features, and scores for every attribute of SCENE."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(96 * 16, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({k: nn.Linear(FEATURES, len(v)) for k, v in SCENE.items()})


class SceneEvaluator(AttributeEvaluator):
    """Features of the scene network, and which parts of the caption an image shows.

    Args:
        folder: of a twin; holds ``evaluator.safetensors``.

    """

    def __init__(self, folder: Path) -> None:
        super().__init__(SceneNetwork(), read_caption, folder)

    def matches(self, images: Tensor, prompts: Sequence[str | int]) -> Tensor:
        """(n, 6) in the order of MATCHES: 1 where an image shows what its caption says, else 0.

        NaN where the caption says nothing. The relation is shown if the digits stand as asked and have
        not changed places; which digits and colours they are is what the other columns say.
        """
        shown, wanted = self.seen(images, prompts)
        columns = [agreement(shown[name], wanted[name]) for name in MATCHES[:-1]]
        stand = shown["arrangement"] == wanted["arrangement"]
        columns.append((stand & ~changed_places(shown, wanted)).float())
        return torch.stack(columns, 1)


def changed_places(shown: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """(n,) bool: the two things asked for are both there, but each where the other should be.

    Args:
        shown: attribute -> (n,) value indices of the pictures.
        wanted: attribute -> (n,) value indices of the captions, UNSPECIFIED where left open.

    """

    def pair_is(first: str, second: str) -> Tensor:
        fits = torch.ones_like(wanted["arrangement"], dtype=torch.bool)
        for mine, asked in ((first, "first"), (second, "second")):
            for part in ("digit", "colour"):
                want = wanted[f"{asked} {part}"]
                fits &= (want == UNSPECIFIED) | (shown[f"{mine} {part}"] == want)
        return fits

    two = wanted["second digit"] != UNSPECIFIED
    return two & pair_is("second", "first") & ~pair_is("first", "second")
