"""A small grammar that says which objects a picture shows on what, prompts, and pictures that show them.

``"a fox and an apple on a mint background"``: the object named first stands on the left. Objects are always
mentioned, the background most of the time; one that is left open may be any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from evenkeel.zoo.emoji import GROUNDS, NOTHING, OBJECTS, SCENE, render, sample_scenes
from evenkeel.zoo.handwriting import UNSPECIFIED

_ARTICLES = ("a", "a", "the", "")
_JOINTS = ("and", "and", "beside", "next to", "to the left of")
_GROUNDS = ("on a {} background", "on a {} background", "on {}", "in front of a {} background")
KEEP = 0.9  # probability that the background is mentioned


def _pick(options: tuple[str, ...], rng: Generator) -> str:
    return options[rng.integers(len(options))]


def mention(scene: Mapping[str, int], rng: Generator, keep: float = KEEP) -> dict[str, int]:
    """Forget the background with probability ``1 - keep``."""
    return dict(scene) if rng.random() < keep else {**scene, "background": UNSPECIFIED}


def write_caption(mentioned: Mapping[str, int], rng: Generator) -> str:
    """Put the mentioned attributes (name -> index, ``UNSPECIFIED`` to leave out) into words."""

    def thing(index: int) -> str:
        article, name = _pick(_ARTICLES, rng), OBJECTS[index]
        if article == "a" and name[0] in "aeiou" and name != "unicorn":
            article = "an"
        return f"{article} {name}".strip()

    words = [thing(mentioned["first"])]
    if mentioned["second"] != NOTHING:
        words += [_pick(_JOINTS, rng), thing(mentioned["second"])]
    if mentioned["background"] != UNSPECIFIED:
        words.append(_pick(_GROUNDS, rng).format(tuple(GROUNDS)[mentioned["background"]]))
    return " ".join(words)


def read_caption(caption: str) -> dict[str, int]:
    """What a caption of this grammar asks for: attribute -> index, ``UNSPECIFIED`` if open.

    Words that the grammar does not know are passed over.

    >>> asked = read_caption("the fox beside an apple on navy")
    >>> OBJECTS[asked["first"]], OBJECTS[asked["second"]], SCENE["background"][asked["background"]]
    ('fox', 'apple', 'navy')

    """
    words = caption.lower().split()
    things = [OBJECTS.index(word) for word in words if word in OBJECTS]
    ground = next((tuple(GROUNDS).index(word) for word in words if word in GROUNDS), UNSPECIFIED)
    return {
        "first": things[0] if things else UNSPECIFIED,
        "second": things[1] if len(things) > 1 else NOTHING,
        "background": ground,
    }


def vocabulary() -> list[str]:
    """Every word the grammar can write, sorted."""
    phrases = [*_ARTICLES, "an", *_JOINTS, *_GROUNDS, *OBJECTS, *GROUNDS]
    return sorted({w for p in phrases for w in p.split() if w != "{}"})


def caption_scenes(
    scenes: Mapping[str, Tensor], rng: Generator
) -> tuple[list[str], dict[str, Tensor]]:
    """Put scenes into words, leaving some out; and what is mentioned."""
    n = len(scenes["first"])
    rows = [mention({k: int(v[i]) for k, v in scenes.items()}, rng) for i in range(n)]
    captions = [write_caption(row, rng) for row in rows]
    return captions, {k: torch.tensor([r[k] for r in rows]) for k in SCENE}


def sample_prompts(n: int, seed: int) -> list[str]:
    """``n`` captions, all pairs among them held out; different seeds give independent captions."""
    rng = np.random.default_rng([seed, 14])
    return caption_scenes(sample_scenes(n, rng, held_out=True), rng)[0]


def reference_images(prompts: Sequence[str | int], seed: int, *, held_out: bool = True) -> Tensor:
    """Pictures that show what the captions ask for: (n, 3, 64, 64) uint8.

    Args:
        prompts: captions of the grammar.
        seed: of sizes, places, shades and all that is left open.
        held_out: False gives as many pictures of pairs that trained the twin, whatever the captions say.

    """
    rng = np.random.default_rng([seed, 15])
    scenes = sample_scenes(len(prompts), rng)
    if held_out:
        for i, prompt in enumerate(prompts):
            for name, value in read_caption(str(prompt)).items():
                if value != UNSPECIFIED:
                    scenes[name][i] = value
    return (render(scenes, rng) * 255).round().to(torch.uint8)
