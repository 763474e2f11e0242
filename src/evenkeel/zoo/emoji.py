"""Pictures of one or two objects on a soft background, put together from emoji of the Noto font.

32 objects in pairs on 8 backgrounds are nearly 8,000 pictures, so captions can ask for some that no training
saw: an eighth of all pairs is held out. The sprites lie in the folder of the twin that draws them, beside
their licence, and in no wheel.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from evenkeel.errors import EvenkeelError

TWIN = "sd-v2.1"  # in whose folder the sprites are
SPRITES = Path("sprites") / "sprites.png"
SIZE = 64  # of pictures and of sprites, in pixels
ANIMALS = (
    *("fox", "cat", "panda", "tiger", "frog", "rabbit", "bear", "unicorn", "penguin", "octopus"),
    *("turtle", "butterfly", "ladybug"),
)
FOOD = ("apple", "orange", "banana", "watermelon", "strawberry", "avocado", "cupcake", "mushroom")
PLANTS = ("sunflower", "cactus", "clover")
THINGS = ("heart", "star", "sun", "rainbow", "rocket", "balloon", "gift", "car")
OBJECTS = (*ANIMALS, *FOOD, *PLANTS, *THINGS)
GROUNDS = {  # red, green, blue in the lower half; lighter above
    "mint": (0.60, 0.88, 0.74),
    "peach": (1.00, 0.79, 0.64),
    "lavender": (0.79, 0.73, 0.94),
    "blue": (0.58, 0.81, 0.98),
    "yellow": (0.99, 0.91, 0.55),
    "pink": (0.98, 0.69, 0.79),
    "silver": (0.80, 0.83, 0.87),
    "navy": (0.14, 0.18, 0.37),
}
NOTHING = len(OBJECTS)  # in place of a second object
SCENE: dict[str, tuple[str, ...]] = {
    "first": OBJECTS,
    "second": (*OBJECTS, "nothing"),
    "background": tuple(GROUNDS),
}
ALONE = 0.25  # share of pictures with one object
HELD_OUT = 8  # a pair is held out if the sum of its places in the list is a multiple of this

_BOX, _BOX_ALONE = (29.0, 31.0), (46.0, 50.0)  # sides of the sprites in a picture, in pixels
_APART = 15.5  # of a pair's centres from the middle
_ALONG, _ACROSS, _ALONE_SHIFT = 0.5, 2.0, 1.5  # half widths of the jitter of the centres
_SHADOW = 0.22  # how much darker the ground is below an object


@cache
def sprites() -> tuple[Tensor, Tensor]:
    """The objects, in colours multiplied with their opacity: (32, 4, 64, 64), and in half the size.

    Raises:
        EvenkeelError: the sheet is in none of the places where the twin's folder may be.

    """
    from PIL import Image

    sheet = np.asarray(Image.open(sheet_file()).convert("RGBA"), dtype=np.float32) / 255
    rows = len(sheet) // SIZE
    cells = torch.from_numpy(sheet).reshape(rows, SIZE, -1, SIZE, 4).permute(0, 2, 4, 1, 3)
    cells = cells.reshape(-1, 4, SIZE, SIZE)[: len(OBJECTS)].clone()
    cells[:, :3] *= cells[:, 3:]
    return cells, F.avg_pool2d(cells, 2)


def sheet_file() -> Path:
    """Where the sheet of sprites lies, 8 in a row in the order of ``OBJECTS``.

    Raises:
        EvenkeelError: nowhere.

    """
    from evenkeel import zoo

    places = [place / SPRITES for place in zoo.places_of(TWIN)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise EvenkeelError(
            f"the sprites that pictures of {TWIN} are made of are in none of "
            f"{[str(p) for p in places]}; they are in the folder zoo/ of a checkout of the repository: "
            f"name it in {zoo.FOLDER_VARIABLE}."
        )
    return found


def is_held_out(first: int, second: int) -> bool:
    """Whether no training picture shows this pair, in neither order."""
    return (first + second) % HELD_OUT == 0


def sample_scenes(n: int, rng: Generator, *, held_out: bool = False) -> dict[str, Tensor]:
    """Attributes of ``n`` pictures, (n,) int64 each; pairs of different objects.

    Args:
        n: how many.
        rng: of everything.
        held_out: pairs that train nothing; otherwise pairs of the others. Objects alone are never held out.

    """
    first = rng.integers(0, len(OBJECTS), n)
    second = np.array([rng.choice(_partners(int(i), held_out)) for i in first], dtype=np.int64)
    second[rng.random(n) < ALONE] = NOTHING
    ground = rng.integers(0, len(GROUNDS), n)
    drawn = {"first": first, "second": second, "background": ground}
    return {k: torch.from_numpy(v.astype(np.int64)) for k, v in drawn.items()}


@cache
def _partners(first: int, held_out: bool) -> tuple[int, ...]:
    others = (j for j in range(len(OBJECTS)) if j != first)
    return tuple(j for j in others if is_held_out(first, j) == held_out)


def render(scene: dict[str, Tensor], rng: Generator) -> Tensor:
    """Pictures (n, 3, 64, 64) float32 in [0, 1]; sizes, places and shades are drawn from ``rng``."""
    n = len(scene["first"])

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

    alone = scene["second"] == NOTHING
    base = torch.tensor(list(GROUNDS.values()), dtype=torch.float32)[scene["background"]]
    base = base + uniform(-0.015, 0.015, 3)
    down = torch.linspace(0, 1, SIZE)[:, None]
    light = base.lerp(torch.ones(3), torch.where(base.mean(1) < 0.4, 0.18, 0.45)[:, None])
    picture = light[..., None, None].lerp(base[..., None, None], down).expand(n, 3, SIZE, SIZE)
    large, small = sprites()
    for key, sign in (("first", -1.0), ("second", 1.0)):
        which = scene[key].clamp(max=NOTHING - 1)
        box = torch.where(alone, uniform(*_BOX_ALONE), uniform(*_BOX))
        near = torch.stack(
            [sign * _APART + uniform(-_ALONG, _ALONG), uniform(-_ACROSS, _ACROSS)], 1
        )
        middle = uniform(-_ALONE_SHIFT, _ALONE_SHIFT, 2)
        centre = torch.where(alone[:, None], middle, near)
        shown = torch.ones(n) if key == "first" else (~alone).float()
        ink = torch.where(
            alone[:, None, None, None],
            _placed(large[which], box, centre),
            _placed(small[which], box, centre),
        )
        ink, shown = ink * shown[:, None, None, None], shown[:, None, None, None]
        picture = picture * (1 - _SHADOW * shown * _shadow(box, centre))
        picture = ink[:, :3] + (1 - ink[:, 3:]) * picture
    return picture.clamp(0, 1)


def _placed(sprite: Tensor, box: Tensor, centre: Tensor) -> Tensor:
    """Sprites (n, 4, h, w) with sides ``box`` around ``centre`` (pixels from the middle)."""
    scale, zero = SIZE / box, torch.zeros(len(box))
    x, y = (2 * centre / SIZE).unbind(1)
    theta = torch.stack([scale, zero, -scale * x, zero, scale, -scale * y], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, [len(box), 4, SIZE, SIZE], align_corners=False)
    return F.grid_sample(sprite, grid, align_corners=False)


def _shadow(box: Tensor, centre: Tensor) -> Tensor:
    """A flat soft spot where an object stands, (n, 1, 64, 64) in [0, 1]."""
    pixels = torch.arange(SIZE) + 0.5 - SIZE / 2
    across = (pixels[None, None, :] - centre[:, :1, None]) / (0.36 * box[:, None, None])
    down = (pixels[None, :, None] - (centre[:, 1] + 0.46 * box)[:, None, None]) / (
        0.08 * box[:, None, None]
    )
    return torch.exp(-(across.square() + down.square())[:, None])


def sample_pictures(
    n: int, rng: Generator, *, held_out: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw ``n`` pictures (n, 3, 64, 64) in [0, 1] and their attributes."""
    scene = sample_scenes(n, rng, held_out=held_out)
    return render(scene, rng), scene
