"""A small grammar with paraphrases that puts picture attributes into words, and back.

``"a small red seven in the top left corner of a blue canvas"`` mentions size, colour, digit,
position and background; the slant is left open. What a caption leaves open may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping

from numpy.random import Generator

from evenkeel.zoo.handwriting import ATTRIBUTES, UNSPECIFIED

_DIGIT_NOUNS = ("{}", "handwritten {}", "digit {}", "number {}", "{}")
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_SLANT_BEFORE = {"upright": ("upright", "straight")}
_SLANT_AFTER = {
    "upright": ("standing upright",),
    "left": ("leaning left", "slanted to the left", "tilted left"),
    "right": ("leaning right", "slanted to the right", "tilted right"),
}
_PLACES = {
    "centre": ("in the centre", "in the middle"),
    "top left": ("in the top left corner", "at the upper left", "in the top left"),
    "top right": ("in the top right corner", "at the upper right", "in the top right"),
    "bottom left": ("in the bottom left corner", "at the lower left", "in the bottom left"),
    "bottom right": ("in the bottom right corner", "at the lower right", "in the bottom right"),
}
_GROUNDS_AFTER_PLACE = ("of a {} canvas", "of a {} picture")
_GROUNDS = ("on a {} canvas", "on {}", "on a {} background", "over a {} background")
_ARTICLES = ("a", "the", "")


def _pick(options: tuple[str, ...], rng: Generator) -> str:
    return options[rng.integers(len(options))]


def write_caption(mentioned: dict[str, int], rng: Generator) -> str:
    """Put the mentioned attributes (name -> value index, ``UNSPECIFIED`` to leave out) into words."""

    def value(name: str) -> str | None:
        index = mentioned.get(name, UNSPECIFIED)
        return None if index == UNSPECIFIED else ATTRIBUTES[name][index]

    digit, size, slant = value("digit"), value("size"), value("slant")
    words = [_pick(_ARTICLES, rng)]
    if size:
        words.append(_pick(_SIZE_WORDS[size], rng))
    slant_first = slant in _SLANT_BEFORE and rng.random() < 0.5
    if slant and slant_first:
        words.append(_pick(_SLANT_BEFORE[slant], rng))
    if colour := value("colour"):
        words.append(colour)
    noun = _pick(_DIGIT_NOUNS, rng)
    words.append(noun.format(digit) if digit else "digit")
    if slant and not slant_first:
        words.append(_pick(_SLANT_AFTER[slant], rng))
    place, ground = value("position"), value("background")
    if place:
        words.append(_pick(_PLACES[place], rng))
    if ground:
        words.append(_pick(_GROUNDS_AFTER_PLACE if place else _GROUNDS, rng).format(ground))
    return " ".join(w for w in words if w)


def sample_mentions(
    attributes: dict[str, int], rng: Generator, keep: float = 0.8
) -> dict[str, int]:
    """Keep the digit always and every other attribute with probability ``keep``."""
    return {
        k: v if k == "digit" or rng.random() < keep else UNSPECIFIED for k, v in attributes.items()
    }


def vocabulary() -> list[str]:
    """Every word the grammar can write, sorted."""
    phrases: list[str] = [*_DIGIT_NOUNS, *_GROUNDS, *_GROUNDS_AFTER_PLACE, *_ARTICLES, "digit"]
    for table in (_SIZE_WORDS, _SLANT_BEFORE, _SLANT_AFTER, _PLACES):
        phrases += [p for options in table.values() for p in options]
    phrases += [*ATTRIBUTES["digit"], *ATTRIBUTES["colour"]]
    words = {w for p in phrases for w in p.split() if w != "{}"}
    return sorted(words)


def read_caption(caption: str) -> dict[str, int]:
    """What a caption of this grammar asks for: attribute -> value index, ``UNSPECIFIED`` if open.

    >>> read_caption("a small red seven on blue")["digit"]
    7
    """
    words = caption.lower().split()
    text = " ".join(words)

    def choice(name: str, phrases: Mapping[str, tuple[str, ...]]) -> int:
        for value, options in phrases.items():
            if any(f" {p} " in f" {text} " for p in options):
                return ATTRIBUTES[name].index(value)
        return UNSPECIFIED

    ground, ink = UNSPECIFIED, UNSPECIFIED
    for i, word in enumerate(words):
        if word in ATTRIBUTES["colour"]:
            before = [w for w in words[max(0, i - 2) : i] if w != "a"]
            if before and before[-1] in ("on", "over", "of"):
                ground = ATTRIBUTES["background"].index(word)
            else:
                ink = ATTRIBUTES["colour"].index(word)
    digits = [ATTRIBUTES["digit"].index(w) for w in words if w in ATTRIBUTES["digit"]]
    slants = {k: _SLANT_AFTER[k] + _SLANT_BEFORE.get(k, ()) for k in _SLANT_AFTER}
    return {
        "digit": digits[0] if digits else UNSPECIFIED,
        "colour": ink,
        "background": ground,
        "size": choice("size", _SIZE_WORDS),
        "position": choice("position", _PLACES),
        "slant": choice("slant", slants),
    }
