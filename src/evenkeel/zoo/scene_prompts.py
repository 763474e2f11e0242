"""Captions of scenes to sample from, and real pictures that show what captions of scenes ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from evenkeel.errors import EvenkeelError
from evenkeel.zoo.handwriting import COLOURS, DIGITS, UNSPECIFIED
from evenkeel.zoo.scene_captions import mention, read_caption, write_caption
from evenkeel.zoo.scenes import SCENE, draw_scenes, sample_scenes


def sample_prompts(n: int, seed: int) -> list[str]:
    """``n`` captions of random scenes; different seeds give independent captions."""
    rng = np.random.default_rng([seed, 9])
    scenes = sample_scenes(n, rng)
    rows = [{k: int(v[i]) for k, v in scenes.items()} for i in range(n)]
    return [write_caption(mention(row, rng), rng) for row in rows]


def reference_images(prompts: Sequence[str | int], seed: int, *, held_out: bool = True) -> Tensor:
    """Pictures that show what the captions ask for: (n, 3, 32, 32) uint8.

    What a caption leaves open is drawn as in :func:`scenes.sample_scenes`, given what it says.

    Args:
        prompts: captions of the grammar.
        seed: of scans, sizes, shades and all that is left open.
        held_out: scans that trained nothing; False takes those that trained the twins.

    Raises:
        EvenkeelError: a caption asks for ink in the colour of its background.

    """
    rng = np.random.default_rng([seed, 10])
    rows = [completed(str(prompt), rng) for prompt in prompts]
    scenes = {k: torch.tensor([row[k] for row in rows], dtype=torch.int64) for k in SCENE}
    pictures = draw_scenes(scenes, rng, held_out=held_out)
    return (pictures * 255).round().to(torch.uint8)


def completed(caption: str, rng: Generator) -> dict[str, int]:
    """The scene that a caption asks for, attribute -> value index, open attributes drawn at random.

    Raises:
        EvenkeelError: it asks for ink in the colour of its background.

    """
    scene = read_caption(caption)
    things = (
        ("first", "second") if SCENE["arrangement"][scene["arrangement"]] != "alone" else ("first",)
    )
    inks = [f"{thing} colour" for thing in things]
    said = {scene[ink] for ink in inks} - {UNSPECIFIED}
    if scene["background"] in said:
        raise EvenkeelError(
            f"no picture can show {caption!r}: the ink would have the colour of the background. "
            f"Ask for another colour."
        )
    colours = range(len(COLOURS))
    if scene["background"] == UNSPECIFIED:
        scene["background"] = int(rng.choice([c for c in colours if c not in said]))
    for thing, ink in zip(things, inks, strict=True):
        if scene[f"{thing} digit"] == UNSPECIFIED:
            scene[f"{thing} digit"] = int(rng.integers(len(DIGITS)))
        if scene[ink] == UNSPECIFIED:
            scene[ink] = int(rng.choice([c for c in colours if c != scene["background"]]))
    return scene
