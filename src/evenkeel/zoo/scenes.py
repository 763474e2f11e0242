"""Pictures of one or two handwritten digits and how they stand to each other.

The pictures of :mod:`evenkeel.zoo.handwriting` hold one digit; a network that draws any digit in any
colour draws nearly all captions right. Here a caption says which of two digits is where: ``"a blue
three to the left of a green five"``, and digits, colours and places can be mixed up.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from evenkeel.zoo.handwriting import (
    COLOURS,
    DIGITS,
    IMAGE_SIZE,
    UNSPECIFIED,
    draw_scans,
    load_scans,
    place_scans,
)

# How the digits stand. The first is the left or the upper one; "alone" has no second.
ARRANGEMENTS = ("alone", "side by side", "stacked")
SCENE: dict[str, tuple[str, ...]] = {
    "arrangement": ARRANGEMENTS,
    "first digit": DIGITS,
    "first colour": tuple(COLOURS),
    "second digit": DIGITS,
    "second colour": tuple(COLOURS),
    "background": tuple(COLOURS),
}
SECOND = ("second digit", "second colour")
ALONE = 0.2  # share of pictures with one digit

_BOX, _BOX_ALONE = (15.5, 16.5), (22.0, 24.0)  # pixels
_CENTRES = {  # of both digits, in pixels from the middle
    "alone": ((0.0, 0.0), (0.0, 0.0)),
    "side by side": ((-7.7, 0.0), (7.7, 0.0)),
    "stacked": ((0.0, -7.7), (0.0, 7.7)),
}
_ALONG, _ACROSS, _ALONE_SHIFT = 0.3, 1.0, 0.5  # half widths of the jitter of the centres
_SLANT = 0.05


def sample_scenes(n: int, rng: Generator) -> dict[str, Tensor]:
    """Attributes of ``n`` pictures, (n,) int64 each; UNSPECIFIED where there is no second digit.

    Both inks differ from the background, not from each other.
    """
    drawn = {k: rng.integers(0, len(v), n) for k, v in SCENE.items()}
    drawn["arrangement"] = np.where(rng.random(n) < ALONE, 0, rng.integers(1, 3, n))
    for ink in ("first colour", "second colour"):
        shift = rng.integers(1, len(COLOURS), n)
        drawn[ink] = (drawn["background"] + shift) % len(COLOURS)
    for name in SECOND:
        drawn[name][drawn["arrangement"] == 0] = UNSPECIFIED
    return {k: torch.from_numpy(v.astype(np.int64)) for k, v in drawn.items()}


def render_scenes(
    first: Tensor, second: Tensor, scene: dict[str, Tensor], rng: Generator
) -> Tensor:
    """Draw scans (n, 8, 8) as the scene says; returns (n, 3, 32, 32) float32 in [0, 1].

    Sizes, slants, small shifts and shades are drawn from ``rng``.
    """
    n = len(first)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

    def paint(key: str) -> Tensor:
        colour = palette[scene[key].clamp(min=0)] + uniform(-0.04, 0.04, 3)
        return colour.clamp(0, 1)[..., None, None]

    arrangement = scene["arrangement"]
    alone = arrangement == 0
    picture = paint("background").expand(n, 3, IMAGE_SIZE, IMAGE_SIZE)
    box_of_both = uniform(*_BOX)
    for index, (name, scans) in enumerate((("first colour", first), ("second colour", second))):
        box = torch.where(alone, uniform(*_BOX_ALONE), box_of_both + uniform(-0.3, 0.3))
        centre = torch.tensor([_CENTRES[a][index] for a in ARRANGEMENTS])[arrangement]
        half_width = torch.tensor(
            [[_ALONE_SHIFT, _ALONE_SHIFT], [_ALONG, _ACROSS], [_ACROSS, _ALONG]]
        )[arrangement]
        centre = centre + half_width * uniform(-1, 1, 2)
        ink = place_scans(scans, box, centre, uniform(-_SLANT, _SLANT))
        if index == 1:
            ink = ink * ~alone[:, None, None, None]
        picture = ink * paint(name) + (1 - ink) * picture
    return picture


def sample_scene_pictures(
    n: int, rng: Generator, *, held_out: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw ``n`` pictures (n, 3, 32, 32) in [0, 1] and their attributes."""
    scene = sample_scenes(n, rng)
    return draw_scenes(scene, rng, held_out=held_out), scene


def draw_scenes(scene: dict[str, Tensor], rng: Generator, *, held_out: bool) -> Tensor:
    """Pictures (n, 3, 32, 32) in [0, 1] of these scenes, each with random scans of its digits."""
    scans = load_scans(held_out)
    first = draw_scans(scene["first digit"], scans, rng)
    second = draw_scans(scene["second digit"].clamp(min=0), scans, rng)
    return render_scenes(first, second, scene, rng)
