"""Captioned handwriting: scikit-learn's real digit scans, rendered as small colour pictures.

The 1,797 scans of ``sklearn.datasets.load_digits`` (UCI optical recognition of handwritten digits,
8x8 grey levels) are split once and for all. Training scans train the pipeline and the evaluator;
held-out scans are only ever used as reference images. A picture is a scan drawn at some size, place
and slant in one colour on another; a caption mentions some of these attributes in varying words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from evenkeel.errors import MissingExtra

IMAGE_SIZE = 32
HELD_OUT_FRACTION = 0.25
SPLIT_SEED = 20260101

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.05, 0.06),
    "white": (0.95, 0.95, 0.94),
    "red": (0.85, 0.13, 0.12),
    "green": (0.12, 0.62, 0.25),
    "blue": (0.14, 0.28, 0.85),
    "yellow": (0.96, 0.86, 0.20),
    "purple": (0.58, 0.18, 0.70),
}
SIZES = ("small", "large")
POSITIONS = {  # centre of the box, in units of the free margin left and right of the middle
    "centre": (0.0, 0.0),
    "top left": (-0.85, -0.85),
    "top right": (0.85, -0.85),
    "bottom left": (-0.85, 0.85),
    "bottom right": (0.85, 0.85),
}
SLANTS = ("upright", "left", "right")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "digit": DIGITS,
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "size": SIZES,
    "position": tuple(POSITIONS),
    "slant": SLANTS,
}
UNSPECIFIED = -1

# One large upright digit in the middle: what models without captions are trained on. They would have to
# learn all places, sizes and slants of every digit, and small ones then learn none of them well.
CENTRED = {
    "size": SIZES.index("large"),
    "position": list(POSITIONS).index("centre"),
    "slant": SLANTS.index("upright"),
}
# For what has neither class nor caption nor latents: also the contrast always has the same sign.
CENTRED_WHITE = {**CENTRED, "colour": tuple(COLOURS).index("white")}


@dataclass(frozen=True, slots=True)
class Placement:
    """How attributes become geometry.

    Attributes:
        boxes: height of the scan's box in pixels, per size.
        slants: shear of x by y (rows grow downwards), per slant.
        box_jitter, shift_jitter, slant_jitter: half widths of uniform jitters, so that no two
            pictures are equal.

    """

    boxes: tuple[float, float]
    slants: tuple[float, float, float]
    box_jitter: float
    shift_jitter: float
    slant_jitter: float


# What captions speak of, and a wider range on which the autoencoder is trained.
CAPTIONED = Placement((20.0, 28.0), (0.0, 0.3, -0.3), 0.5, 0.3, 0.04)
WIDE = Placement((17.0, 24.0), (0.0, 0.38, -0.38), 1.0, 0.7, 0.08)


@dataclass(frozen=True, slots=True)
class Scans:
    """Handwriting scans: ``images`` (n, 8, 8) in [0, 1] float32 and ``labels`` (n,) int64."""

    images: Tensor
    labels: Tensor


@cache
def load_scans(held_out: bool) -> Scans:
    """The training or the held-out scans, split per digit with a fixed seed; nothing is fetched.

    Raises:
        MissingExtra: scikit-learn, which carries them, is not installed.

    """
    try:
        from sklearn.datasets import load_digits  # bundled with scikit-learn; slow to import
    except ImportError as e:
        raise MissingExtra(
            "the scans of handwritten digits, from which the zoo draws its training and reference "
            "pictures, come with scikit-learn, which was not found: pip install 'evenkeel[zoo]'."
        ) from e

    bunch = load_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    chosen: list[int] = []
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(bunch.target == digit))
        cut = math.ceil(HELD_OUT_FRACTION * len(indices))
        chosen += list(indices[:cut] if held_out else indices[cut:])
    order = np.sort(np.array(chosen))
    return Scans(
        torch.tensor(bunch.images[order] / 16.0, dtype=torch.float32),
        torch.tensor(bunch.target[order], dtype=torch.int64),
    )


def sample_attributes(
    n: int, rng: Generator, fixed: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Draw ``n`` independent uniform attribute values; ink and background always differ.

    Args:
        n: how many.
        rng: of everything.
        fixed: attributes other than the background that all share, by value index.

    """
    drawn = {k: rng.integers(0, len(v), n) for k, v in ATTRIBUTES.items()}
    drawn |= {k: np.full(n, value) for k, value in (fixed or {}).items()}
    shift = rng.integers(1, len(COLOURS), n)
    drawn["background"] = (drawn["colour"] + shift) % len(COLOURS)
    return {k: torch.from_numpy(v.astype(np.int64)) for k, v in drawn.items()}


def render(
    scans: Tensor,
    attributes: dict[str, Tensor],
    rng: Generator,
    placement: Placement = CAPTIONED,
) -> Tensor:
    """Draw scans (n, 8, 8) with the given attributes; returns (n, 3, 32, 32) float32 in [0, 1]."""
    n = len(scans)

    def table(values: Sequence[float], key: str) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[attributes[key]]

    def jitter(scale: float) -> Tensor:
        return torch.from_numpy(rng.uniform(-scale, scale, n).astype(np.float32))

    box = table(placement.boxes, "size") + jitter(placement.box_jitter)
    margin = (IMAGE_SIZE - box) / 2
    centre_x = table([x for x, _ in POSITIONS.values()], "position") * margin + jitter(
        placement.shift_jitter
    )
    centre_y = table([y for _, y in POSITIONS.values()], "position") * margin + jitter(
        placement.shift_jitter
    )
    shear = table(placement.slants, "slant") + jitter(placement.slant_jitter)

    centre = torch.stack([centre_x, centre_y], 1)
    ink = place_scans(scans, box, centre, shear)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)

    def paint(key: str) -> Tensor:
        noise = rng.uniform(-0.04, 0.04, (n, 3)).astype(np.float32)
        return (palette[attributes[key]] + torch.from_numpy(noise)).clamp(0, 1)[..., None, None]

    return ink * paint("colour") + (1 - ink) * paint("background")


def place_scans(scans: Tensor, box: Tensor, centre: Tensor, shear: Tensor) -> Tensor:
    """How much ink there is: scans (n, 8, 8) in boxes (n,) of pixels around centres (n, 2), sheared.

    Returns (n, 1, 32, 32) in [0, 1].
    """
    scale, zero = IMAGE_SIZE / box, torch.zeros(len(box))
    x, y = (2 * centre / IMAGE_SIZE).unbind(1)
    # Output pixel -> scan coordinate, both in [-1, 1]: undo the shift, the scale and the shear.
    theta = torch.stack(
        [
            torch.stack([scale, scale * shear, -scale * (x + shear * y)], -1),
            torch.stack([zero, scale, -scale * y], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [len(box), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    ink = F.grid_sample(scans[:, None], grid, mode="bicubic", align_corners=False)
    return ((ink - 0.2) / 0.5).clamp(0, 1)  # crisper strokes than the 8x8 grey levels give


def draw_scans(digits: Tensor, scans: Scans, rng: Generator) -> Tensor:
    """For every digit in ``digits`` pick one random scan of it; returns (n, 8, 8)."""
    by_digit = [torch.nonzero(scans.labels == d).flatten() for d in range(10)]
    picks = [by_digit[int(d)][rng.integers(len(by_digit[int(d)]))] for d in digits]
    return scans.images[torch.stack(picks)] if picks else scans.images[:0]


def sample_pictures(
    n: int,
    rng: Generator,
    *,
    held_out: bool = False,
    placement: Placement = CAPTIONED,
    fixed: Mapping[str, int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw ``n`` pictures (n, 3, 32, 32) in [0, 1] and their attributes.

    Args:
        n: how many.
        rng: of everything.
        held_out: of the held-out scans.
        placement: how attributes become geometry.
        fixed: of ``sample_attributes``; ``CENTRED`` for example.

    """
    attributes = sample_attributes(n, rng, fixed)
    scans = draw_scans(attributes["digit"], load_scans(held_out), rng)
    return render(scans, attributes, rng, placement), attributes
