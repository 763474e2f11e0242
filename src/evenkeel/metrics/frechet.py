"""The Fréchet distance between Gaussians fitted to two sets of features (FID, FDD, ...)."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.estimate import Estimate
from evenkeel.metrics.feature_moments import Gaussian, GroupMoments, root_of_eigenvalues
from evenkeel.metrics.inputs import check_paired, check_same_width, checked_features
from evenkeel.metrics.jackknife import group_count, jackknife_estimate


def frechet_between(first: Gaussian, second: Gaussian) -> float:
    """The squared 2-Wasserstein distance between two Gaussians.

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1^(1/2) S2 S1^(1/2))

    Symmetric in its arguments; covariances may be rank-deficient. Equal Gaussians give zero up to
    about 1e-8 of the trace for each direction without variance, of either sign: it is not clipped.

    Raises MetricError for unequal dimensions and for eigenvalues that are negative beyond rounding.

    Source: Dowson and Landau 1982; as an image metric Heusel et al. 2017 (arXiv:1706.08500), whose
    sqrt(S1 S2) has the same trace.

    >>> unit = Gaussian(torch.zeros(1).double(), torch.ones(1, 1).double())
    >>> frechet_between(unit, Gaussian(torch.ones(1).double(), 9 * torch.ones(1, 1).double()))
    5.0
    """
    if first.mean.shape != second.mean.shape:
        raise MetricError(
            "Two Gaussians must have the same dimension to have a distance; they have "
            f"{first.mean.shape[0]} and {second.mean.shape[0]}."
        )
    product = first.root @ second.covariance @ first.root
    roots = root_of_eigenvalues(
        # BLAS leaves the last bits of the two triangles different.
        torch.linalg.eigvalsh((product + product.T) / 2),
        first.trace * second.trace,
        "A product of two covariances",
    )
    shift = float((first.mean - second.mean).square().sum())
    return shift + first.trace + second.trace - 2 * float(roots.sum())


def frechet_distance(
    features: Tensor, reference: Tensor, *, paired_reference: bool = False
) -> Estimate:
    """How far generated features lie from the reference, both taken as Gaussian.

    `frechet_between` of the two means and unbiased covariances. The value is biased upwards by a
    term of order 1/n, like every published FID: compare values of equal n only, and see
    `frechet_difference`, where most of it cancels. The standard error is a jackknife over images.

    features, reference: (n, d), any floating dtype, computed in float64; n >= 3 and equal.
    paired_reference: False where the reference is an independent sample (real images), whose own
    sampling error is then added; True where row i of the reference has the prompt and noise of row
    i of the features (the full-precision arm), so both rows are left out together. A distance that
    is zero within its error is not normally distributed and its interval may reach below zero.
    With a paired reference the bias is the smaller the closer the rows agree, down to none.

    Raises MetricError for NaN, infinity, unequal shapes, or fewer than 3 images.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> shifted = frechet_distance(x + 1, x, paired_reference=True)
    >>> round(shifted.value, 6), shifted.stderr < 1e-6
    (4.0, True)
    """
    x, r = _checked(features, reference, "features")
    n = len(features)

    def leaving_out_features(g: int | None) -> float:
        # The argument that stays whole comes first: its square root is computed once.
        return frechet_between(r.all, x.without(g))

    def leaving_out_reference(g: int | None) -> float:
        return frechet_between(x.all, r.without(g))

    def leaving_out_both(g: int | None) -> float:
        return frechet_between(r.without(g), x.without(g))

    if paired_reference:
        return jackknife_estimate((leaving_out_both, n))
    return jackknife_estimate((leaving_out_features, n), (leaving_out_reference, n))


def frechet_difference(
    features_a: Tensor, features_b: Tensor, reference: Tensor, *, paired_reference: bool = False
) -> Estimate:
    """How much further arm a is from the reference than arm b: negative where a is better.

    frechet_distance(a) - frechet_distance(b), with the same images left out of both arms, so that
    what the arms share (prompts, noise, the reference) cancels from the error.

    features_a, features_b: (n, d), row i of both from the same prompt and noise. The rest as for
    `frechet_distance`. Raises MetricError in the same cases.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> round(frechet_difference(x + 1, x, x, paired_reference=True).value, 6)
    4.0
    """
    check_paired(features_a, features_b, ("features_a", "features_b"))
    a, r = _checked(features_a, reference, "features_a")
    b, _ = _checked(features_b, reference, "features_b")
    n = len(features_a)

    def leaving_out_arms(g: int | None) -> float:
        return frechet_between(r.all, a.without(g)) - frechet_between(r.all, b.without(g))

    def leaving_out_reference(g: int | None) -> float:
        rest = r.without(g)
        return frechet_between(a.all, rest) - frechet_between(b.all, rest)

    def leaving_out_all(g: int | None) -> float:
        rest = r.without(g)
        return frechet_between(rest, a.without(g)) - frechet_between(rest, b.without(g))

    if paired_reference:
        return jackknife_estimate((leaving_out_all, n))
    return jackknife_estimate((leaving_out_arms, n), (leaving_out_reference, n))


def _checked(features: Tensor, reference: Tensor, name: str) -> tuple[GroupMoments, GroupMoments]:
    x, r = checked_features(features, name), checked_features(reference, "reference")
    check_same_width(x, r, (name, "reference"))
    if len(x) != len(r):
        raise MetricError(
            "The Fréchet distance is biased upwards by a term of order 1/n, so distances of "
            f"unequal n cannot be compared: {name} has {len(x)} rows and the reference {len(r)}. "
            f"Pass the first {min(len(x), len(r))} rows of both and report that number too."
        )
    groups = group_count(len(x))
    return GroupMoments(x, groups), GroupMoments(r, groups)
