"""Further measures of a comparison: what an evaluator shows of its layers, and pictures by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, ArmResult, measure
from evenkeel.metrics import frechet_distance, inception_score, kernel_distance, shift
from evenkeel.reports import markdown_table, text_table
from evenkeel.reports.measures import FURTHER
from evenkeel.zoo.pictures import KINDS

N = 20


@pytest.fixture(scope="module")
def judged() -> tuple[dict[str, ArmResult], dict[str, Tensor], Tensor]:
    kind = KINDS["captions"]
    prompts = kind.prompts(N, 1)
    clean, real = kind.references(prompts, 2), kind.references(prompts, 3)
    grey = (0.5 + 0.8 * (clean.float() / 255 - 0.5)) * 255
    noisy = clean.float() + 20 * torch.randn(
        clean.shape, generator=torch.Generator().manual_seed(0)
    )
    images = {
        FULL_PRECISION: clean,
        QUANTIZED: noisy.clamp(0, 255).to(torch.uint8),
        "grey": grey.to(torch.uint8),
        "same": clean,
    }
    evaluator = kind.evaluator(zoo.path_of("pixart-sigma"))
    seconds = {name: [1.0, 1.0] for name in images}
    found = measure(images, seconds, prompts, evaluator, real, more=True)
    return {r.name: r for r in found}, images, real


def test_they_are_the_metrics_of_what_the_evaluator_shows(judged) -> None:
    arms, images, real = judged
    evaluator = KINDS["captions"].evaluator(zoo.path_of("pixart-sigma"))
    x, y = (i.float() / 255 for i in (images["grey"], real))
    found = arms["grey"].measures
    spatial = frechet_distance(evaluator.spatial(x), evaluator.spatial(y))
    assert found["spatial_frechet_reference"].value == pytest.approx(spatial.value, rel=1e-5)
    kernel = kernel_distance(evaluator.features(x), evaluator.features(y))
    assert found["kernel_reference"].value == pytest.approx(kernel.value, rel=1e-5)
    score = inception_score(evaluator.posterior(x))
    assert found["inception_score"].value == pytest.approx(score.value, rel=1e-5)
    assert evaluator.spatial(x).shape == (N, 7 * 4 * 4)


def test_equal_pictures_have_no_distance_and_differences_are_paired(judged) -> None:
    arms, _, _ = judged
    same = arms["same"]
    for name in ("perceptual", "brightness", "contrast", "sharpness"):
        assert same.measures[name].value == 0
        change = same.difference_to_quantized[name]
        assert change.value == pytest.approx(-arms[QUANTIZED].measures[name].value)
    for name in ("inception_score", "precision", "recall", "kernel_reference"):
        before, after = arms[QUANTIZED].measures[name], same.measures[name]
        change = same.difference_to_quantized[name]
        assert change.value == pytest.approx(after.value - before.value, abs=1e-9)


def test_less_contrast_is_a_shift_of_contrast_and_noise_one_of_sharpness(judged) -> None:
    arms, _, _ = judged
    grey, noisy = arms["grey"].measures, arms[QUANTIZED].measures
    assert grey["contrast"].low > 0 and grey["contrast"].value > noisy["contrast"].value
    assert noisy["sharpness"].value > 2 * grey["sharpness"].value


def test_tables_show_them_only_where_they_were_asked_for(judged) -> None:
    arms, _, _ = judged
    with_them = {"arms": [a.as_dict() for a in arms.values()]}
    assert "shift of contrast" in text_table(with_them)
    assert "| class score |" in markdown_table(with_them)
    keys = {m.key for m in FURTHER}
    plain = [{k: v for k, v in a.items() if k not in keys} for a in with_them["arms"]]
    for arm in plain:
        arm.pop("difference_to_quantized", None)
    assert "class score" not in text_table({"arms": plain})


def test_a_shift_is_of_the_mean_and_its_error_the_scatter() -> None:
    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(200, generator=generator, dtype=torch.float64)

    zero = torch.zeros(200, dtype=torch.float64)
    found = [shift(drawn(seed) - 0.5, zero) for seed in range(60)]
    assert found[0].value == pytest.approx(abs(float(drawn(0).mean()) - 0.5))
    scatter = torch.tensor([f.value for f in found]).std()
    assert found[0].stderr == pytest.approx(float(scatter), rel=0.35)
