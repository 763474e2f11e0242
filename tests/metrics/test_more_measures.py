"""Measures of posteriors, manifolds, activations and pixels, against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial
import scipy.stats
import torch
from torch import Tensor

from evenkeel.errors import MetricError
from evenkeel.metrics import (
    inception_score,
    inception_score_difference,
    mean_difference,
    mean_estimate,
    per_image_perceptual_distance,
    per_image_precision,
    per_image_recall,
    per_image_statistics,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior(n: int, classes: int, sharpness: float, seed: int = 0) -> Tensor:
    return torch.softmax(sharpness * drawn(n, classes, seed=seed), 1)


def test_inception_score_equals_scipy_and_its_error_the_scatter_of_repetitions() -> None:
    p = posterior(300, 7, 2.0)
    kl = [scipy.stats.entropy(row, p.mean(0).numpy()) for row in p.numpy()]
    found = inception_score(p)
    assert found.value == pytest.approx(np.exp(np.mean(kl)), rel=1e-12)
    scatter = np.std([inception_score(posterior(300, 7, 2.0, seed)).value for seed in range(40)])
    assert found.stderr == pytest.approx(scatter, rel=0.35)


def test_a_difference_of_scores_is_paired() -> None:
    p = posterior(200, 5, 3.0)
    blurred = 0.98 * p + 0.02 / 5
    found = inception_score_difference(blurred, p)
    assert found.value == pytest.approx(inception_score(blurred).value - inception_score(p).value)
    assert found.high < 0 and found.stderr < 0.2 * inception_score(p).stderr


@pytest.mark.parametrize("wrong", ["negative", "no sum", "nan"])
def test_what_is_no_posterior_is_refused(wrong: str) -> None:
    p = posterior(10, 4, 1.0)
    p[3, 1] = {"negative": -0.1, "no sum": 0.9, "nan": float("nan")}[wrong]
    with pytest.raises(MetricError):
        inception_score(p)


def test_precision_and_recall_equal_a_search_by_kd_tree() -> None:
    x, y = drawn(150, 3), 1.3 * drawn(120, 3, seed=1) + 0.5
    for found, points, manifold in (
        (per_image_precision(x, y), x, y),
        (per_image_recall(x, y), y, x),
    ):
        tree = scipy.spatial.KDTree(manifold.numpy())
        radius = tree.query(manifold.numpy(), k=4)[0][:, -1]
        far = np.linalg.norm(points.numpy()[:, None] - manifold.numpy()[None], axis=-1)
        wanted = (far <= radius).any(1)
        assert found.tolist() == wanted.astype(float).tolist() and 0 < found.mean() < 1


def test_a_collapsed_sampler_is_precise_and_recalls_little() -> None:
    real, collapsed = drawn(200, 4), drawn(200, 4, seed=1) * 0.05
    precision = mean_estimate(per_image_precision(collapsed, real))
    recall = mean_estimate(per_image_recall(collapsed, real))
    assert precision.low > 0.9 and recall.high < 0.1
    assert (
        mean_difference(
            per_image_recall(drawn(200, 4, seed=2), real), per_image_recall(collapsed, real)
        ).low
        > 0
    )


def test_a_manifold_of_too_few_images_is_refused() -> None:
    with pytest.raises(MetricError, match="neighbours between 1 and 2"):
        per_image_precision(drawn(10, 2), drawn(3, 2))


def test_perceptual_distance_equals_numpy_and_sees_no_scale() -> None:
    ours = [drawn(4, 6, 5, 5), drawn(4, 3, 2, 2, seed=1)]
    theirs = [drawn(4, 6, 5, 5, seed=2), drawn(4, 3, 2, 2, seed=3)]
    wanted = np.zeros(4)
    for a, b in zip(ours, theirs, strict=True):
        u, v = (m.numpy() / np.linalg.norm(m.numpy(), axis=1, keepdims=True) for m in (a, b))
        wanted += ((u - v) ** 2).sum(1).mean((1, 2)) / 2
    assert per_image_perceptual_distance(ours, theirs).numpy() == pytest.approx(wanted)
    louder = per_image_perceptual_distance([3 * m for m in ours], theirs).numpy()
    assert louder == pytest.approx(wanted)
    with pytest.raises(MetricError, match="same layers"):
        per_image_perceptual_distance(ours, theirs[:1])
    with pytest.raises(MetricError, match="1 of 4"):
        per_image_perceptual_distance(
            [ours[0].index_fill(0, torch.tensor([2]), torch.nan)], theirs[:1]
        )


def test_statistics_of_pictures_see_what_they_are_named_for() -> None:
    x = 0.25 + 0.5 * torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    plain = per_image_statistics(x)
    grey = (x * torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)[:, None, None]).sum(1)
    assert torch.allclose(plain["brightness"], grey.mean((1, 2)))
    assert torch.allclose(plain["contrast"], torch.from_numpy(grey.numpy().std((1, 2))))
    for i, one in enumerate(grey.numpy()):
        laplacian = scipy.ndimage.laplace(one)[1:-1, 1:-1]
        assert float(plain["sharpness"][i]) == pytest.approx(np.sqrt((laplacian**2).mean()))
    changes = {
        "brightness": x + 0.1,
        "contrast": grey.mean((1, 2))[:, None, None, None]
        + 0.9 * (x - grey.mean((1, 2))[:, None, None, None]),
        "saturation": 0.7 * x + 0.3 * grey[:, None],
    }
    for name, changed in changes.items():
        assert bool((per_image_statistics(changed)[name] - plain[name]).abs().min() > 1e-3)
    assert torch.allclose(
        per_image_statistics(changes["brightness"])["contrast"], plain["contrast"]
    )
