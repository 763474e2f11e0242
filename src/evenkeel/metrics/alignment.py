"""How much of its caption an image shows."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.estimate import Estimate
from evenkeel.metrics.mean import mean_estimate
from evenkeel.statistics.exact import at_home


def per_image_alignment(matches: Tensor) -> Tensor:
    """The part of the attributes its caption mentions that each image shows, from 0 to 1.

    matches: (n, attributes), floating: 1 where the image shows what the caption says of an
    attribute, 0 where it does not, NaN where the caption does not mention the attribute (the one
    place in these metrics where NaN has a meaning). Returns (n,), float64.

    Raises MetricError for any other value, another number of dimensions, or an image whose caption
    mentions nothing.

    >>> nan = float("nan")
    >>> per_image_alignment(torch.tensor([[1.0, 0.0, nan], [1.0, nan, nan]])).tolist()
    [0.5, 1.0]
    """
    if matches.ndim != 2 or not matches.is_floating_point():
        raise MetricError(
            "matches must be (n, attributes) in a floating point dtype, since NaN says that an "
            f"attribute is not mentioned; it is {tuple(matches.shape)} in {matches.dtype}."
        )
    matches = at_home(matches.detach()).to(torch.float64)
    mentioned = ~matches.isnan()
    if not bool(((matches == 0) | (matches == 1) | ~mentioned).all()):
        wrong = matches[mentioned & (matches != 0) & (matches != 1)][0]
        raise MetricError(
            f"matches must be 0, 1, or NaN for an attribute that is not mentioned; "
            f"{float(wrong):g} was found. Decide by a threshold before calling, and report it."
        )
    silent = ~mentioned.any(1)
    if bool(silent.any()):
        raise MetricError(
            f"Every caption must mention at least one attribute; {int(silent.sum())} of "
            f"{len(silent)} mention none, the first is row {int(silent.nonzero()[0])}. Leave those "
            "captions out of all arms."
        )
    return matches.nansum(1) / mentioned.sum(1)


def alignment(matches: Tensor) -> Estimate:
    """How much of their captions images show on average: the mean of `per_image_alignment`.

    Each image counts once, however many attributes its caption mentions. Compare two arms by
    `mean_difference(per_image_alignment(a), per_image_alignment(b))`. Shapes, values and refusals
    as for `per_image_alignment`.

    >>> alignment(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).value
    0.75
    """
    return mean_estimate(per_image_alignment(matches))
