"""The figures of the papers: pages made of the results beside them, and the statistics they show."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evenkeel.reproduction import paper

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = ("q-drift", "dcnc-dns", "tac")


@pytest.fixture(autouse=True)
def _experiments_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    for name in [n for n in sys.modules if n.split(".")[0] == "figures"]:
        monkeypatch.delitem(sys.modules, name)


def module(name: str) -> Any:
    return importlib.import_module(f"figures.{name}")


def of(name: str) -> Any:
    return module(name.replace("-", "_")).FIGURES


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_made_of_the_results_beside_it(name: str) -> None:
    whole = of(name)
    assert (whole.folder / "figures.md").read_text() == whole.page()


@pytest.mark.parametrize("name", NAMES)
def test_every_result_is_a_figures_own(name: str) -> None:
    whole = of(name)
    known = {f.name: f for f in whole.all}
    results, pictures = ({p.stem for p in whole.folder.glob(f"*.{e}")} for e in ("json", "png"))
    assert results == pictures <= {*known}
    for stem in results:
        found = whole.result(known[stem])
        assert (found["row"], found["count"]) == (known[stem].row, known[stem].count)
        assert (whole.folder / f"{stem}.png").stat().st_size <= module("figure").LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_on_a_cell_of_the_registry(name: str) -> None:
    whole = of(name)
    assert all(paper(name).row(f.row).cell is not None for f in whole.all)
    with pytest.raises(SystemExit, match="there is fig"):
        whole.named("fig-99")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_correlations_of_elements_show_what_shuffling_takes_away() -> None:
    latent = module("latent_statistics")
    generator = torch.Generator().manual_seed(1)
    chosen = latent.distinct_pairs(20, 400, generator)
    assert (chosen[:, 0] != chosen[:, 1]).all() and chosen.max() == 19 and chosen.min() == 0
    common = 0.6 * drawn(500, 1, seed=2) + 0.8 * drawn(500, 20)  # every two elements: 0.36
    found = latent.absolute_correlations(common, common, chosen)
    i, j = chosen[7].tolist()
    assert found[7] == pytest.approx(abs(float(torch.corrcoef(common.T)[i, j])), rel=1e-4)
    assert found.mean() == pytest.approx(0.36, abs=0.1)
    shuffled = latent.shuffled_correlations(common, common, chosen, generator)
    assert shuffled.mean() == pytest.approx(math.sqrt(2 / math.pi / 500), rel=0.1)


def test_diagonals_and_their_sampling_noise() -> None:
    latent = module("latent_statistics")
    a, b = drawn(4000, 2, 3), drawn(4000, 2, 3, seed=1)
    expected = torch.cov(torch.stack([a[:, 1, 2], b[:, 1, 2]]).double())
    assert latent.diagonals(a, b)[1, 2] == pytest.approx(float(expected[0, 1]), abs=1e-9)
    # Of a Gaussian variance 2 / n, of a covariance of independent ones 1 / n.
    assert latent.diagonal_noise(a, a).mean() == pytest.approx(2 / 4000, rel=0.1)
    assert latent.diagonal_noise(a, b).mean() == pytest.approx(1 / 4000, rel=0.1)
    diagonal = torch.tensor([[1.0, 1.0], [3.0, 5.0]]).double()
    found = latent.spread(diagonal, torch.zeros(2, 2))
    assert found["mean"] == [1.0, 4.0] and found["within"] == pytest.approx([0.0, math.sqrt(2)])
    assert found["ratio"] == pytest.approx((math.sqrt(2) / 2) / (3 / math.sqrt(2)))
    assert latent.spread(diagonal, torch.full((2, 2), 9.0))["ratio without sampling noise"] == 0


def test_an_ellipse_holds_as_many_of_gaussian_points_as_it_should() -> None:
    x = drawn(20_000)
    y = 0.5 * x + 3 * drawn(20_000, seed=1) + 7
    for radius in (1.0, 2.0):
        share = module("latent_statistics").inside_ellipse(x, y, radius)
        assert share == pytest.approx(1 - math.exp(-(radius**2) / 2), abs=0.01)


def test_uniform_noise_of_full_strength_takes_the_kurtosis_away_and_a_fifth_does_not() -> None:
    e = drawn(200_000)
    tails = torch.rand(200_000, generator=torch.Generator().manual_seed(2)).clamp_min(1e-6)
    heavy = -tails.log() * drawn(200_000, seed=3).sign()  # Laplace: excess kurtosis 3
    found = module("dcnc_dns").residuals(e, 0.25 * e + heavy, torch.Generator().manual_seed(4))
    assert found["before"].std() == pytest.approx(float(heavy.std()) / 1.25, rel=0.01)

    def kurtosis(r: torch.Tensor) -> float:
        centred = r - r.mean()
        return float(centred.pow(4).mean() / centred.square().mean() ** 2 - 3)

    assert kurtosis(found["before"]) == pytest.approx(3, abs=0.25)
    assert kurtosis(found["W_u = 1, plain variance"]) == pytest.approx(0, abs=0.06)
    assert 2 < kurtosis(found["W_u = 0.2"]) < kurtosis(found["before"])


def test_ranges_are_compared_with_the_one_that_covers_all_steps() -> None:
    steady, moving = ([[-1.0, 0.0, 0.0, 1.0]] * 3, [[-1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    ranges = {"steady": torch.tensor(steady).numpy(), "moving": torch.tensor(moving).numpy()}
    found = module("tac").range_numbers(ranges)
    assert found["all"] == pytest.approx([0.4, 1.0]) and found["every"] == 1
    assert found["shares"]["moving"] < 0.41 and found["layers"]["moving"][3] == [1.0, 4.0]


def test_panels_choose_rows_and_parts_by_rule() -> None:
    panels = module("panels")
    assert panels.at_quantiles(torch.tensor([5.0, 1.0, 3.0]), (0.0, 0.5, 1.0)) == [1, 2, 0]
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    other = image.clone()
    other[:, 20:24, 3:7] = 200
    assert panels.most_different(image, other, 4) == (20, 3)
