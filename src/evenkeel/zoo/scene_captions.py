"""A small grammar that says what a scene shows, in varying words, and reads such captions back.

``"a blue three to the left of a green five on a white canvas"``. Digits and their relation are always
mentioned, colours and background most of the time; what a caption leaves open may be anything.
"""

from __future__ import annotations

from numpy.random import Generator

from evenkeel.zoo.handwriting import COLOURS, DIGITS, UNSPECIFIED
from evenkeel.zoo.scenes import ARRANGEMENTS, SCENE, SECOND

# Phrases for "the one named first stands ... the one named last", and whether it is the second one.
RELATIONS: dict[str, dict[bool, tuple[str, ...]]] = {
    "side by side": {
        False: ("to the left of", "left of"),
        True: ("to the right of", "right of"),
    },
    "stacked": {False: ("above", "on top of"), True: ("below", "under")},
}
_NOUNS = ("{}", "{}", "handwritten {}", "digit {}", "number {}")
_GROUNDS = ("on a {} canvas", "on a {} background", "over a {} background", "on {}")
_ARTICLES = ("a", "a", "the", "")
KEEP = 0.85  # probability that a colour is mentioned


def _pick(options: tuple[str, ...], rng: Generator) -> str:
    return options[rng.integers(len(options))]


def mention(scene: dict[str, int], rng: Generator, keep: float = KEEP) -> dict[str, int]:
    """Forget each colour with probability ``1 - keep``; digits and arrangement stay."""
    return {
        k: v if not k.endswith(("colour", "background")) or rng.random() < keep else UNSPECIFIED
        for k, v in scene.items()
    }


def write_caption(mentioned: dict[str, int], rng: Generator) -> str:
    """Put the mentioned attributes (name -> index, ``UNSPECIFIED`` to leave out) into words."""

    def thing(which: str) -> str:
        words = [_pick(_ARTICLES, rng)]
        colour = mentioned[f"{which} colour"]
        if colour != UNSPECIFIED:
            words.append(tuple(COLOURS)[colour])
        words.append(_pick(_NOUNS, rng).format(DIGITS[mentioned[f"{which} digit"]]))
        return " ".join(w for w in words if w)

    arrangement = ARRANGEMENTS[mentioned["arrangement"]]
    if arrangement == "alone":
        words = [thing("first")]
    else:
        swapped = bool(rng.random() < 0.5)
        things = ["second", "first"] if swapped else ["first", "second"]
        relation = _pick(RELATIONS[arrangement][swapped], rng)
        words = [thing(things[0]), relation, thing(things[1])]
    if mentioned["background"] != UNSPECIFIED:
        words.append(_pick(_GROUNDS, rng).format(tuple(COLOURS)[mentioned["background"]]))
    return " ".join(words)


def read_caption(caption: str) -> dict[str, int]:
    """What a caption of this grammar asks for: attribute -> index, ``UNSPECIFIED`` if open.

    Words that the grammar does not know are passed over.

    >>> asked = read_caption("a red two below a blue nine on white")
    >>> asked["first digit"], asked["second digit"], SCENE["arrangement"][asked["arrangement"]]
    (9, 2, 'stacked')

    """
    words = caption.lower().split()
    found = dict.fromkeys(SCENE, UNSPECIFIED)
    found["arrangement"] = ARRANGEMENTS.index("alone")
    things: list[tuple[int, int]] = []  # digit, colour, in the order of the caption
    colour = UNSPECIFIED
    for i, word in enumerate(words):
        before = [w for w in words[max(0, i - 2) : i] if w != "a"]
        if word in COLOURS and before and before[-1] in ("on", "over"):
            found["background"] = tuple(COLOURS).index(word)
        elif word in COLOURS:
            colour = tuple(COLOURS).index(word)
        elif word in DIGITS:
            things.append((DIGITS.index(word), colour))
            colour = UNSPECIFIED
    text = f" {' '.join(words)} "
    for arrangement, by_order in RELATIONS.items():
        for swapped, phrases in by_order.items():
            if len(things) == 2 and any(f" {p} " in text for p in phrases):
                found["arrangement"] = ARRANGEMENTS.index(arrangement)
                things = things[::-1] if swapped else things
    for name, (digit, ink) in zip(("first", "second"), things, strict=False):
        found[f"{name} digit"], found[f"{name} colour"] = digit, ink
    if found["arrangement"] == 0:
        found.update(dict.fromkeys(SECOND, UNSPECIFIED))
    return found


def vocabulary() -> list[str]:
    """Every word the grammar can write, sorted."""
    phrases = [*_NOUNS, *_GROUNDS, *_ARTICLES, *DIGITS, *COLOURS]
    phrases += [p for d in RELATIONS.values() for options in d.values() for p in options]
    return sorted({w for p in phrases for w in p.split() if w != "{}"})
