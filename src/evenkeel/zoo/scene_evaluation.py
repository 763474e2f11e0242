"""The evaluator of pictures of one or two digits: what they show, and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from evenkeel.zoo import EVALUATOR_FILE, networks
from evenkeel.zoo.handwriting import UNSPECIFIED
from evenkeel.zoo.making.training import Recipe, fit
from evenkeel.zoo.scene_captions import read_caption
from evenkeel.zoo.scenes import SCENE, sample_scene_pictures

MATCHES = (
    "first digit",
    "second digit",
    "first colour",
    "second colour",
    "background",
    "relation",
)
FEATURES = 96
RECIPE = Recipe(steps=2000, learning_rate=2e-3, seed=131, weight_decay=1e-2, bfloat16=True)
BATCH = 128
HELD_OUT_PICTURES, HELD_OUT_SEED = 4096, 99


class SceneNetwork(networks.Evaluator):
    """Sees scenes (n, 3, 32, 32) in [0, 1]: 96 features, and scores for every attribute of SCENE."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(96 * 16, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({k: nn.Linear(FEATURES, len(v)) for k, v in SCENE.items()})


class SceneEvaluator:
    """Features of the scene network, and which parts of the caption an image shows.

    Args:
        folder: of a twin; holds ``evaluator.safetensors``.

    """

    def __init__(self, folder: Path) -> None:
        self.network = SceneNetwork().eval()
        self.network.load_state_dict(load_file(folder / EVALUATOR_FILE))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, 32, 32) in [0, 1] to (n, 96)."""
        return self.network.features(images)

    @torch.no_grad()
    def matches(self, images: Tensor, prompts: Sequence[str | int]) -> Tensor:
        """(n, 6) in the order of MATCHES: 1 where an image shows what its caption says, else 0.

        NaN where the caption says nothing. The relation is shown if the digits stand as asked and have
        not changed places; which digits and colours they are is what the other columns say.
        """
        parts = [self.network(part) for part in torch.split(images, 256)]
        shown = {k: torch.cat([p[k].argmax(1) for p in parts]) for k in SCENE}
        asked = [read_caption(str(p)) for p in prompts]
        wanted = {k: torch.tensor([a[k] for a in asked]) for k in SCENE}
        columns = []
        for name in MATCHES[:-1]:
            match = (shown[name] == wanted[name]).float()
            match[wanted[name] == UNSPECIFIED] = torch.nan
            columns.append(match)
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


def train_evaluator(work: Path) -> tuple[nn.Module, dict[str, float]]:
    """The network, trained on training scans in ``work / "evaluator"`` or continued there.

    Returns also the share of each attribute that it reads right on 4,096 pictures of held-out scans;
    of the second digit where there is one.
    """
    torch.manual_seed(RECIPE.seed)

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        pictures, scene = sample_scene_pictures(BATCH, rng)
        scores = module(as_decoded(pictures, rng).to(device))
        losses = [
            F.cross_entropy(
                scores[k].float(),
                scene[k].to(device),
                ignore_index=UNSPECIFIED,
                label_smoothing=0.05,
            )
            for k in SCENE
        ]
        return torch.stack(losses).sum()

    network = fit(SceneNetwork(), loss, RECIPE, work / "evaluator").cpu().eval()
    rng = np.random.default_rng(HELD_OUT_SEED)
    pictures, scene = sample_scene_pictures(HELD_OUT_PICTURES, rng, held_out=True)
    with torch.no_grad():
        parts = [network(part) for part in torch.split(pictures, 256)]
    accuracy = {}
    for name, values in scene.items():
        right = torch.cat([p[name] for p in parts]).argmax(1) == values
        accuracy[name] = right[values != UNSPECIFIED].float().mean().item()
    return network, accuracy


def as_decoded(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Slight blur and noise on half of the pictures (n, 3, h, w): decoders produce both."""
    n = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    weight = torch.from_numpy(rng.uniform(0, 0.7, (n, 1, 1, 1)).astype(np.float32))
    weight *= torch.from_numpy((rng.random((n, 1, 1, 1)) < 0.5).astype(np.float32))
    return pictures.lerp(blurred, weight) + 0.02 * weight * torch.randn(pictures.shape)
