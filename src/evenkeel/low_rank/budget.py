"""Sharing out bytes over layers by what each byte is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One thing that can be done with a layer.

    Attributes:
        bytes: what it costs.
        error: what is left of the layer's error, in the unit that all layers share.
        choice: for whoever asked; not looked at.

    """

    bytes: int
    error: float
    choice: object


def share_out(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """For every layer one option, so that the sum of errors is small and the bytes fit.

    Steps along each layer's lower convex hull are taken by gain per byte, the largest first, as long as
    they fit; a step that does not fit ends its layer, and smaller ones may still follow. Where every
    step fits until one is refused, no other choice of at most the bytes that were spent then is better; it is
    within one item of the best for the whole budget (the greedy bound of the knapsack problem).

    Args:
        options: of every layer; the cheapest one is where it starts (usually 0 bytes).
        budget: bytes for all together.

    Returns:
        The options chosen; the cheapest ones where the budget does not even hold these.

    >>> rank = lambda r, left: Option(10 * r, left, r)
    >>> layers = {"a": [rank(0, 9.0), rank(1, 1.0)], "b": [rank(0, 4.0), rank(1, 2.0), rank(2, 0.0)]}
    >>> {name: option.choice for name, option in share_out(layers, 20).items()}
    {'a': 1, 'b': 1}

    """
    hulls = {name: hull(found) for name, found in options.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(points[0].bytes for points in hulls.values())
    steps = sorted(
        (
            (-(a.error - b.error) / (b.bytes - a.bytes), index, name)
            for name, points in hulls.items()
            for index, (a, b) in enumerate(pairwise(points), 1)
        ),
        key=lambda step: step[0],
    )
    ended = set()
    for _, index, name in steps:
        cost = hulls[name][index].bytes - hulls[name][index - 1].bytes
        if name in ended or cost > left:
            ended.add(name)
            continue
        at[name], left = index, left - cost
    return {name: hulls[name][index] for name, index in at.items()}


def hull(options: Sequence[Option]) -> list[Option]:
    """Those on the lower convex hull of error over bytes, cheapest first, errors falling.

    >>> [o.bytes for o in hull([Option(0, 9, ""), Option(1, 8, ""), Option(2, 1, ""), Option(3, 1, "")])]
    [0, 2]

    """
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.error)):
        if found and option.error >= found[-1].error:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) > _slope(found[-1], option):
            found.pop()
        if found and option.bytes == found[-1].bytes:
            continue
        found.append(option)
    return found


def _slope(a: Option, b: Option) -> float:
    """Error per byte between two; negative, the steeper the better."""
    return (b.error - a.error) / (b.bytes - a.bytes)
