"""What each kind of twin draws: how its pictures are judged, asked for, and compared with real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.zoo import (
    emoji,
    emoji_captions,
    emoji_evaluation,
    evaluation,
    scene_evaluation,
    scene_prompts,
)
from evenkeel.zoo.handwriting import (
    ATTRIBUTES,
    CENTRED,
    CENTRED_WHITE,
    IMAGE_SIZE,
    draw_scans,
    load_scans,
    render,
    sample_attributes,
)

DIGITS = 10
_SCANS = """\
scikit-learn's 1,797 handwriting scans (UCI optical recognition of handwritten digits); 25 % of them are
held out and train nothing."""
_EMOJI = """\
32 emoji of the Noto font (npm emoji-datasource-google 16.0.0, Apache License 2.0, in `sprites/`), in varying
sizes and places on 8 backgrounds; an eighth of all pairs of objects is held out and trains nothing. All pairs
that prompts ask for here are held out."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """One kind of picture.

    Attributes:
        name: as in the ``twin.json`` of a twin's folder.
        shows: what the pictures are, in words.
        attributes: of the columns of the evaluator's ``matches``; none where nothing is asked for.
        evaluator: folder of the twin -> features (n, d) and matches (n, attributes) or None.
        prompts: (n, seed) -> prompts; different seeds give independent ones.
        references: (prompts, seed) -> real pictures (n, 3, size, size) uint8 that show the prompts, drawn
            from held-out scans; with ``held_out=False`` from those that the twins were trained on.
        data: what they are made of, a sentence or two.
        trained_on: the same, in a word.
        held_out: what of it trained nothing, in the plural; and what did.
        size: of the pictures, in pixels.

    """

    name: str
    shows: str
    attributes: tuple[str, ...]
    evaluator: Callable[[Path], Any]
    prompts: Callable[[int, int], list[Any]]
    references: Callable[..., Tensor]
    data: str = _SCANS
    trained_on: str = "handwriting"
    held_out: tuple[str, str] = ("held-out scans", "training scans")
    size: int = IMAGE_SIZE


class DigitEvaluator(evaluation.HandwritingEvaluator):
    """The one-digit evaluator for class labels: of what it sees only the digit was asked for."""

    @torch.no_grad()
    def matches(self, images: Tensor, prompts: Sequence[str | int]) -> Tensor | None:
        """(n, 1): 1 where the image shows the digit of its label, else 0; None with a null class."""
        if any(int(p) >= DIGITS for p in prompts):
            return None
        seen = [self.network(part)["digit"].argmax(1) for part in torch.split(images, 256)]
        wanted = torch.tensor([int(p) for p in prompts])
        return (torch.cat(seen) == wanted).float()[:, None]


class UnaskedEvaluator(DigitEvaluator):
    """The one-digit evaluator where nothing was asked for."""

    def matches(self, images: Tensor, prompts: Sequence[str | int]) -> None:
        """None: there is nothing to match."""


def balanced_digits(n: int, seed: int) -> list[int]:
    """``n`` digits in random order, each as often as any other (give or take one)."""
    rng = np.random.default_rng([seed, 11])
    return [int(d) for d in rng.permutation(np.resize(rng.permutation(10), n))]


def digit_images(prompts: Sequence[str | int], seed: int, *, held_out: bool = True) -> Tensor:
    """Pictures (n, 3, 32, 32) uint8 of these digits, large in the middle, in random colours.

    Of another class, such as the null class 1000, which is of no class, any digit.
    """
    rng = np.random.default_rng([seed, 12])
    digits = torch.tensor([int(p) for p in prompts], dtype=torch.int64)
    free = digits >= DIGITS
    digits[free] = torch.from_numpy(rng.integers(0, DIGITS, int(free.sum())))
    return _drawn(digits, CENTRED, rng, held_out)


def any_images(prompts: Sequence[str | int], seed: int, *, held_out: bool = True) -> Tensor:
    """As many pictures (n, 3, 32, 32) uint8 as there are prompts: large white digits in the middle."""
    rng = np.random.default_rng([seed, 13])
    digits = torch.from_numpy(rng.integers(0, 10, len(prompts)))
    return _drawn(digits, CENTRED_WHITE, rng, held_out)


def _drawn(
    digits: Tensor, fixed: Mapping[str, int], rng: np.random.Generator, held_out: bool
) -> Tensor:
    attributes = sample_attributes(len(digits), rng, fixed) | {"digit": digits}
    scans = draw_scans(digits, load_scans(held_out), rng)
    return (render(scans, attributes, rng) * 255).round().to(torch.uint8)


def counted(n: int, seed: int) -> list[int]:
    """0 to n - 1: the pipeline is only asked for so many pictures."""
    return list(range(n))


KINDS = {
    kind.name: kind
    for kind in (
        Pictures(
            "captions",
            "one handwritten digit in one of 7 colours on another, described by a caption",
            tuple(ATTRIBUTES),
            evaluation.HandwritingEvaluator,
            evaluation.sample_prompts,
            evaluation.reference_images,
        ),
        Pictures(
            "scenes",
            "one or two handwritten digits in any of 7 colours on a background of another, side by side or "
            "stacked, described by a caption",
            scene_evaluation.MATCHES,
            scene_evaluation.SceneEvaluator,
            scene_prompts.sample_prompts,
            scene_prompts.reference_images,
        ),
        Pictures(
            "digits",
            "one handwritten digit, large in the middle, in one of 7 colours on another, asked for by its "
            "class",
            ("digit",),
            DigitEvaluator,
            balanced_digits,
            digit_images,
        ),
        Pictures(
            "unconditional",
            "one handwritten digit, any, large in the middle, in white on one of 6 colours",
            (),
            UnaskedEvaluator,
            counted,
            any_images,
        ),
        Pictures(
            "emoji",
            "one object, or two beside each other, on one of 8 soft backgrounds, described by a caption",
            emoji_evaluation.MATCHES,
            emoji_evaluation.EmojiEvaluator,
            emoji_captions.sample_prompts,
            emoji_captions.reference_images,
            _EMOJI,
            "emoji",
            ("held-out pairs", "training pairs"),
            emoji.SIZE,
        ),
    )
}
