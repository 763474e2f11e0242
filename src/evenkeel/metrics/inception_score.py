"""The inception score: whether single images are clear, and all of them together varied."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.estimate import Estimate
from evenkeel.metrics.inputs import check_paired, checked_features
from evenkeel.metrics.jackknife import group_count, jackknife_estimate


def inception_score(posterior: Tensor) -> Estimate:
    """Exp of the mean Kullback-Leibler divergence of p(class | image) from its mean over images.

    exp(mean_i sum_c p_ic log(p_ic / p_c)), p_c = mean_i p_ic: 1 where all images look alike to the
    classifier, at most the number of classes. All images at once, not the mean of ten splits: splits only
    add bias. Biased upwards by a term of order 1/n, so compare equal n. Jackknife over images.

    Args:
        posterior: (n, classes) non-negative rows that sum to 1, n >= 3; computed in float64.

    Raises:
        MetricError: NaN, negative entries, rows that do not sum to 1, fewer than 3 images.

    Source: Salimans et al. 2016 (arXiv:1606.03498); on one classifier and its meaning for other data,
    Barratt and Sharma 2018 (arXiv:1801.01973).

    >>> sure = torch.eye(4, dtype=torch.float64).repeat(25, 1)
    >>> round(inception_score(sure).value, 6)
    4.0

    """
    scores = _Scores(posterior, "posterior")
    return jackknife_estimate((scores.without, len(posterior)))


def inception_score_difference(a: Tensor, b: Tensor) -> Estimate:
    """By how much the score of a exceeds that of b, row i of both from the same prompt and noise.

    The same images are left out of both, so that what the arms share cancels. Shapes and errors as for
    :func:`inception_score`.

    >>> p = torch.softmax(3 * torch.randn(90, 5, generator=torch.Generator().manual_seed(0)).double(), 1)
    >>> inception_score_difference(p, (p + 0.2) / 2).low > 0
    True

    """
    check_paired(a, b, ("a", "b"))
    first, second = _Scores(a, "a"), _Scores(b, "b")
    return jackknife_estimate((lambda g: first.without(g) - second.without(g), len(a)))


class _Scores:
    """The score of all rows, and without a group of them: sums per group are enough."""

    def __init__(self, posterior: Tensor, name: str) -> None:
        p = checked_features(posterior, name)
        off = float((p.sum(1) - 1).abs().max())
        if float(p.min()) < 0 or off > 1e-4:
            raise MetricError(
                f"{name} must hold probabilities, (n, classes) with rows that sum to 1; the lowest entry is "
                f"{float(p.min()):g} and a row is off by {off:g}. Pass softmax(logits, 1)."
            )
        groups = group_count(len(p))
        entropy = torch.special.entr(p).sum(1)
        self._probabilities = torch.stack([p[g::groups].sum(0) for g in range(groups)])
        self._entropies = torch.stack([entropy[g::groups].sum() for g in range(groups)])
        self._sizes = torch.tensor([len(p[g::groups]) for g in range(groups)]).to(p)

    def without(self, group: int | None) -> float:
        kept = torch.ones_like(self._sizes)
        if group is not None:
            kept[group] = 0
        n = kept @ self._sizes
        mean = kept @ self._probabilities / n
        return float((torch.special.entr(mean).sum() - kept @ self._entropies / n).exp())
