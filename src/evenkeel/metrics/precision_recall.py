"""Precision and recall: whether generated images look like reference ones, and cover them all."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.metrics.inputs import check_same_width, checked_features

NEIGHBOURS = 3
ROWS = 1024  # of a matrix of distances at a time


def per_image_precision(
    features: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS
) -> Tensor:
    """(n,) 1 where a generated image lies within the reference's manifold, else 0.

    The manifold is the union of balls around the reference's features, each as large as the distance to its
    ``neighbours``-th nearest other one. The mean is the precision; with ``mean_estimate`` and
    ``mean_difference`` it has an interval, which takes the reference as given.

    Args:
        features: (n, d) of generated images, any floating dtype, computed in float64.
        reference: (m, d), m > neighbours.
        neighbours: k.

    Raises:
        MetricError: NaN, unequal widths, fewer than ``neighbours + 1`` references.

    Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991), k = 3.

    >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> per_image_precision(x, x).mean().item(), per_image_precision(x + 100, x).mean().item()
    (1.0, 0.0)

    """
    return _inside(features, reference, neighbours, "features")


def per_image_recall(
    features: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS
) -> Tensor:
    """(m,) 1 where a reference image lies within the manifold of the generated ones, else 0.

    The same with the sides exchanged; its mean is the recall. Of few images recall says little: it grows with
    the number of generated ones, so compare equal n.

    >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> per_image_recall(x[:1].repeat(60, 1) + 1e-3 * x, x).mean().item() < 0.1
    True

    """
    return _inside(reference, features, neighbours, "reference")


def _inside(
    points: Tensor, manifold: Tensor, neighbours: int, name: Literal["features", "reference"]
) -> Tensor:
    x, y = checked_features(points, name), checked_features(manifold, "the other side")
    check_same_width(x, y, (name, "the other side"))
    if not 0 < neighbours < len(y):
        raise MetricError(
            f"a manifold of {len(y)} images has no {neighbours}-th nearest neighbours; expected "
            f"neighbours between 1 and {len(y) - 1}."
        )
    # The nearest one to a point of the manifold is itself.
    radius = torch.cat(
        [
            torch.cdist(part, y).topk(neighbours + 1, largest=False).values[:, -1]
            for part in torch.split(y, ROWS)
        ]
    )
    found = [(torch.cdist(part, y) <= radius).any(1) for part in torch.split(x, ROWS)]
    return torch.cat(found).double()
