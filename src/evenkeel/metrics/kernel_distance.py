"""Kernel distances between two sets of features (KID, CMMD): squared MMDs, unbiased at any n."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.estimate import Estimate
from evenkeel.metrics.inputs import check_paired, check_same_width, checked_features
from evenkeel.metrics.jackknife import group_count, group_sizes, jackknife_estimate


def kernel_distance(
    features: Tensor, reference: Tensor, *, paired_reference: bool = False
) -> Estimate:
    """How far the distribution of generated features lies from the reference, without bias.

    mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean over i, j of
    k(x_i, y_j), with k(x, y) = (x . y / d + 1)^3. All pairs are used, not random subsets, so there
    is no seed. Unbiased, hence negative about half the time where the distributions are equal. The
    standard error is a jackknife over images.

    features (n, d), reference (n', d): any floating dtype, computed in float64; n, n' >= 3, and
    unlike the Fréchet distance they may differ. Time grows with (n + n')^2 d, memory with n + n'.
    paired_reference: False where the reference is an independent sample, whose own sampling error
    is then added; True where row i of both has the same prompt and noise, so both are left out
    together. The last mean then runs over i != j like the first two: the rows i are alike for a
    reason other than their distributions, and counting them would favour the closer arm by a term
    of order 1/n.

    Raises MetricError for NaN, infinity, shapes that do not match, or fewer than 3 images.

    Source: Gretton et al. 2012, the unbiased estimator of MMD^2; kernel and name from Bińkowski
    et al. 2018 (arXiv:1801.01401).

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> near, far = kernel_distance(x[:100], x[100:]), kernel_distance(x[:100], x[100:] + 1)
    >>> near.low < 0 < far.low
    True
    """
    return _distance(features, reference, paired_reference, _cubic)


def kernel_difference(
    features_a: Tensor, features_b: Tensor, reference: Tensor, *, paired_reference: bool = False
) -> Estimate:
    """How much further arm a is from the reference than arm b: negative where a is better.

    kernel_distance(a) - kernel_distance(b), with the same images left out of both arms, so that
    what the arms share (prompts, noise, the reference) cancels from the error.

    features_a, features_b: (n, d), row i of both from the same prompt and noise. The rest as for
    `kernel_distance`. Raises MetricError in the same cases.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> kernel_difference(x[:100] + 1, x[:100], x[100:]).low > 0
    True
    """
    return _difference(features_a, features_b, reference, paired_reference, _cubic)


def cmmd(embeddings: Tensor, reference: Tensor, *, paired_reference: bool = False) -> Estimate:
    """The kernel distance with CMMD's kernel, 1000 exp(-|x - y|^2 / 200), of CLIP's embeddings.

    The rest as for `kernel_distance`. The paper's code counts i = j too, which adds about
    1000 (1 - mean k) (1/n + 1/n'); without them the value is unbiased and comparable between n.

    embeddings, reference: (n, d) of unit length, as CLIP's projections are compared.

    Source: Jayasumana et al. 2024 (arXiv:2401.09603), section 4.

    >>> x = torch.nn.functional.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)))
    >>> abs(cmmd(x[:30], x[30:]).value) < 1 < cmmd(x[:30].abs(), x[30:]).value
    True
    """
    return _distance(embeddings, reference, paired_reference, _gaussian)


def cmmd_difference(
    embeddings_a: Tensor, embeddings_b: Tensor, reference: Tensor, *, paired_reference: bool = False
) -> Estimate:
    """`cmmd` of arm a minus that of arm b, paired as `kernel_difference` is."""
    return _difference(embeddings_a, embeddings_b, reference, paired_reference, _gaussian)


Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Of x . y, |x|^2, |y|^2 and the number of features, elementwise."""


def _distance(features: Tensor, reference: Tensor, paired: bool, kernel: Kernel) -> Estimate:
    sums, n, n_reference = _checked(features, reference, "features", paired, kernel)
    if paired:
        return jackknife_estimate((lambda g: sums.distance(g, g), n))
    return jackknife_estimate(
        (lambda g: sums.distance(g, None), n), (lambda g: sums.distance(None, g), n_reference)
    )


def _difference(
    features_a: Tensor, features_b: Tensor, reference: Tensor, paired: bool, kernel: Kernel
) -> Estimate:
    check_paired(features_a, features_b, ("features_a", "features_b"))
    a, n, n_reference = _checked(features_a, reference, "features_a", paired, kernel)
    b, _, _ = _checked(features_b, reference, "features_b", paired, kernel)

    def gap(g: int | None, g_reference: int | None) -> float:
        return a.distance(g, g_reference) - b.distance(g, g_reference)

    if paired:
        return jackknife_estimate((lambda g: gap(g, g), n))
    return jackknife_estimate((lambda g: gap(g, None), n), (lambda g: gap(None, g), n_reference))


@dataclass(frozen=True)
class _KernelSums:
    """The kernel summed over pairs of groups: enough for every distance with groups left out."""

    within_features: Tensor  # (G, G), without i = j
    within_reference: Tensor  # (G', G'), without i = j
    across: Tensor  # (G, G'), without i = j where the reference is paired
    sizes: Tensor  # (G,)
    reference_sizes: Tensor  # (G',)
    paired: bool

    def distance(self, group: int | None, reference_group: int | None) -> float:
        rows = _kept(self.sizes, group)
        columns = _kept(self.reference_sizes, reference_group)
        n, n_reference = float(rows @ self.sizes), float(columns @ self.reference_sizes)
        within = rows @ self.within_features @ rows / (n * (n - 1))
        reference = columns @ self.within_reference @ columns / (n_reference * (n_reference - 1))
        across = rows @ self.across @ columns / (n * (n_reference - self.paired))
        return float(within + reference - 2 * across)


def _kept(sizes: Tensor, group: int | None) -> Tensor:
    """One for each group that stays, zero for the one that is left out."""
    kept = torch.ones_like(sizes)
    if group is not None:
        kept[group] = 0
    return kept


def _checked(
    features: Tensor, reference: Tensor, name: str, paired_reference: bool, kernel: Kernel
) -> tuple[_KernelSums, int, int]:
    x, y = checked_features(features, name), checked_features(reference, "reference")
    check_same_width(x, y, (name, "reference"))
    if paired_reference:
        check_paired(x, y, (name, "reference"))
    sums = _KernelSums(
        within_features=_off_diagonal(x, x, kernel),
        within_reference=_off_diagonal(y, y, kernel),
        across=_off_diagonal(x, y, kernel) if paired_reference else _across(x, y, kernel),
        sizes=group_sizes(len(x)).to(x),
        reference_sizes=group_sizes(len(y)).to(y),
        paired=paired_reference,
    )
    return sums, len(x), len(y)


def _across(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Sums of k(x_i, y_j) over i in group g and j in group h, shape (G, H)."""
    groups_x, groups_y = group_count(len(x)), group_count(len(y))
    # One group of rows at a time: the whole n x n matrix is never held.
    columns = torch.stack([_all_pairs(x[g::groups_x], y, kernel).sum(0) for g in range(groups_x)])
    return torch.stack([columns[:, h::groups_y].sum(1) for h in range(groups_y)], dim=1)


def _off_diagonal(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """The same over i != j, for x and y of equal length, shape (G, G)."""
    itself = kernel((x * y).sum(1), x.square().sum(1), y.square().sum(1), x.shape[1])
    groups = group_count(len(x))
    diagonal = torch.stack([itself[g::groups].sum() for g in range(groups)])
    return _across(x, y, kernel) - torch.diag(diagonal)


def _all_pairs(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    return kernel(x @ y.T, x.square().sum(1)[:, None], y.square().sum(1), x.shape[1])


def _cubic(product: Tensor, x: Tensor, y: Tensor, features: int) -> Tensor:
    return (product / features + 1) ** 3


def _gaussian(product: Tensor, x: Tensor, y: Tensor, features: int) -> Tensor:
    return 1000 * ((2 * product - x - y) / 200).exp()
