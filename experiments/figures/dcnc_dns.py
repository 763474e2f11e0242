"""DCNC + DNS (ICLR 2026 submission): Figs. 2, 4 to 7."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import numpy as np
import torch
from matplotlib import figure as mpl
from scipy import stats
from torch import Tensor

from evenkeel.corrections.dcnc import uniform_variance
from evenkeel.reproduction.arms import Makers
from evenkeel.reproduction.run_cell import Bench
from figures import panels
from figures.figure import HERE, Figure, Figures, Found, Numbers
from figures.pairs import pairs

# As published, and at the strength for which the derivation holds, with either variance.
FORMS = {"before": 0.0, "W_u = 0.2": 0.2, "W_u = 1": 1.0, "W_u = 1, plain variance": 1.0}
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
REACH, BINS = 6.0, 72
FIRST = 6  # prompts of a panel
MODELS = {"LDM-4": "fig-7-ldm-4", "DiT-XL": "fig-7-dit-xl", "FLUX.1-dev": "fig-7-flux-dev"}


# ---- Figs. 4 and 5


def residuals(e: Tensor, d: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The residual of one step divided by 1 + k, with nothing added and with the noise of every form.

    ``s_u^2 = s_o^2 sqrt(5 kappa / 6)`` (Eq. 13), s_o^2 from the quartiles as published or plain.
    """
    e, d = e.flatten().double(), d.flatten().double()
    centred = e - e.mean()
    k = float((centred * d).sum() / centred.square().sum())
    r = (d - d.mean() - k * centred) / (1 + k)
    kurtosis = torch.tensor(stats.kurtosis(r.numpy()))
    quartiles = torch.quantile(r[torch.randperm(len(r), generator=generator)[:100_000]],
                               torch.tensor([0.25, 0.75]).double())  # fmt: skip
    robust = ((quartiles[1] - quartiles[0]) / 1.349) ** 2
    uniform = (torch.rand(len(r), generator=generator).double() - 0.5) * 12**0.5
    found = {}
    for name, strength in FORMS.items():
        variance = r.var() if "plain" in name else robust
        found[name] = r + strength * uniform_variance(variance, kurtosis).sqrt() * uniform
    return found


def measure_residuals(bench: Bench, count: int) -> Found:
    seen = pairs(bench, count, noised=True)
    generator = torch.Generator().manual_seed(0)
    edges = np.linspace(-REACH, REACH, BINS + 1)
    numbers: Numbers = {"kurtosis": {name: [] for name in FORMS}, "variance": {}, "counts": []}
    numbers["variance"] = {name: [] for name in FORMS}
    for step in range(seen.e.shape[1]):
        found = residuals(seen.e[:, step], seen.d[:, step], generator)
        unit, counts = found["before"].std(), {}
        for name, r in found.items():
            numbers["kurtosis"][name].append(float(stats.kurtosis(r.numpy())))
            numbers["variance"][name].append(float(r.var() / unit**2))
            # In units of its own standard deviation: the shape, not the width.
            counts[name] = np.histogram((r / r.std()).numpy(), edges)[0].tolist()
        numbers["counts"].append(counts)
    return Found(numbers)


def _shown(kurtosis: list[float]) -> dict[str, int]:
    """The steps of the histograms: of median and of largest excess kurtosis."""
    order = np.argsort(kurtosis)
    return {"median": int(order[(len(order) - 1) // 2]), "largest": int(order[-1])}


def draw_histograms(found: Found) -> mpl.Figure:
    n = found.numbers
    figure = mpl.Figure(figsize=(10, 3.4), layout="constrained")
    edges = np.linspace(-REACH, REACH, BINS + 1)
    x = np.linspace(-REACH, REACH, 300)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (which, step) in zip(axes, _shown(n["kurtosis"]["before"]).items(), strict=True):
        for name, counts in n["counts"][step].items():
            density = np.array(counts) / sum(counts) / (edges[1] - edges[0])
            axis.stairs(density, edges, label=name)
        axis.plot(x, stats.norm.pdf(x), color="black", lw=0.8, label="Gaussian")
        axis.set(yscale="log", ylim=(1e-5, 1), xlabel="residual, own standard deviations")
        axis.set_title(f"step {step}, {which} excess kurtosis", fontsize=9)
    axes[0].legend(fontsize=8)
    return figure


def read_histograms(n: Numbers) -> list[str]:
    lines = []
    for which, step in _shown(n["kurtosis"]["before"]).items():
        values = ", ".join(f"{name} {k[step]:.2f}" for name, k in n["kurtosis"].items())
        lines.append(f"Step {step} ({which} excess kurtosis of all steps): {values}.")
    return lines


def draw_kurtosis(found: Found) -> mpl.Figure:
    n = found.numbers
    figure = mpl.Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in FORMS:
        left.plot(n["kurtosis"][name], label=name)
        right.plot(n["variance"][name])
    left.axhline(0, color="grey", lw=0.8)
    left.set(xlabel="step", ylabel="excess kurtosis")
    right.set(xlabel="step", ylabel="variance over that before")
    left.legend(fontsize=8)
    return figure


def read_kurtosis(n: Numbers) -> list[str]:
    before = np.array(n["kurtosis"]["before"])
    lines = [
        f"Excess kurtosis before: {before.min():.2f} to {before.max():.2f} over the steps, mean "
        f"{before.mean():.2f}."
    ]
    for name in [*FORMS][1:]:
        after, added = np.array(n["kurtosis"][name]), np.array(n["variance"][name])
        lines.append(
            f"{name}: mean {after.mean():.2f}, {100 * (1 - after.mean() / before.mean()):.0f} % less; at "
            f"most {np.abs(after).max():.2f} in magnitude; the variance is {added.mean():.2f} times that "
            f"before."
        )
    return lines


# ---- Fig. 6


def measure_strength(bench: Bench, count: int) -> Found:
    module = bench.quantized()
    makers = Makers(bench.run(module), trajectory=bench.cell.trajectory)
    arms = {
        f"{w:g}": makers.make([{"name": "dcnc:published", "strength": w}, "dns:published"])
        for w in STRENGTHS
    }
    return Found({"arms": panels.arm_numbers(bench.comparison(module, arms, count).arms)})


def draw_strength(found: Found) -> mpl.Figure:
    arms = found.numbers["arms"]
    figure = mpl.Figure(figsize=(10, 3), layout="constrained")
    titles = ("FD to full precision", "FD to real", "PSNR to full precision, dB")
    for axis, key, title in zip(figure.subplots(1, 3), panels.MEASURES, titles, strict=True):
        before = arms[panels.QUANTIZED][key]["value"]
        changes = np.array([arms[f"{w:g}"][key]["change"] for w in STRENGTHS])
        value, low, high = before + changes.T
        axis.errorbar(STRENGTHS, value, yerr=[value - low, high - value], fmt="o-", capsize=3)
        axis.axhline(before, color="grey", ls="--", label="quantized")
        axis.set(xlabel="$W_u$", title=title)
    figure.axes[0].legend(fontsize=8)
    return figure


def read_strength(n: Numbers) -> list[str]:
    arms = n["arms"]
    return [
        f"Quantized: {panels.level_text(arms)}. Intervals: 95 %, of the paired difference to it.",
        *(f"W_u = {w:g}: {panels.change_text(arms[f'{w:g}'])}." for w in STRENGTHS),
    ]


# ---- Figs. 7 and 2


def measure_pictures(bench: Bench, count: int) -> Found:
    module = bench.quantized()
    makers = Makers(bench.run(module), trajectory=bench.cell.trajectory)
    arms = {name: makers.make(what) for name, what in bench.cell.arms.items()}
    found = bench.comparison(module, arms, count)
    prompts = [str(p) for p in bench.prompts(count, 1)[:FIRST]]
    return Found(
        {"arms": panels.arm_numbers(found.arms), "prompts": prompts},
        {name: images[:FIRST] for name, images in found.images.items()},
    )


def draw_pictures(found: Found) -> mpl.Figure:
    columns = {
        f"{name}\n({_level(found.numbers['arms'][name]):.1f})": images
        for name, images in found.pictures.items()
    }
    labels = ["\n".join(textwrap.wrap(p, 26)) for p in found.numbers["prompts"]]
    return panels.panel(columns, labels)


def _level(arm: dict[str, Any]) -> float:
    return float(arm["frechet_reference"]["value"])


def read_pictures(n: Numbers) -> list[str]:
    arms = {k: v for k, v in n["arms"].items() if k not in (panels.FULL, panels.QUANTIZED)}
    return [
        f"The first {FIRST} prompts; in brackets the FD to real pictures of all {n['count']}.",
        f"Quantized: {panels.level_text(n['arms'])}.",
        *(f"{name}: {panels.change_text(arm)}." for name, arm in arms.items()),
    ]


def measure_bars(bench: Bench, count: int) -> Found:
    """From the results of Fig. 7."""
    folder = HERE / FIGURES.paper
    known = {m: json.loads((folder / f"{f}.json").read_text()) for m, f in MODELS.items()}
    assert all(n["count"] == count for n in known.values())
    return Found({"models": {model: n["arms"] for model, n in known.items()}})


def draw_bars(found: Found) -> mpl.Figure:
    models = found.numbers["models"]
    figure = mpl.Figure(figsize=(9, 3), layout="constrained")
    for axis, (model, arms) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        values = [_level(a) for a in arms.values()]
        errors = [a["frechet_reference"]["stderr"] for a in arms.values()]
        axis.bar(range(len(arms)), values, yerr=errors, color=[f"C{i}" for i in range(len(arms))])
        axis.set_xticks(
            range(len(arms)), ["\n".join(textwrap.wrap(a, 9)) for a in arms], fontsize=7
        )
        axis.set_title(model, fontsize=9)
    figure.axes[0].set_ylabel("FD to real pictures")
    return figure


def read_bars(n: Numbers) -> list[str]:
    return [
        f"{model}: "
        + ", ".join(
            f"{name} {_level(a):.2f} ± {a['frechet_reference']['stderr']:.2f}"
            for name, a in arms.items()
        )
        + " (± standard error, which does not use that the arms share noise; paired intervals: Fig. 7)."
        for model, arms in n["models"].items()
    ]


_SMALL = "Pictures have 32 x 32 pixels, 256 x 256 in the paper."
_LDM = (
    "Q-Diffusion with 500 iterations per block, 20,000 in its code, with the product of rate and iterations "
    "kept."
)


def _pictures(name: str, row: str, model: str, more: str = "") -> Figure:
    return Figure(
        name,
        f"{model}: pictures of full precision, the quantized model and its corrections; in brackets FD (the "
        f"paper: FID).",
        row,
        "a few prompts, chosen by the authors; FID over 50,000 or 30,000 images",
        "the first prompts; FD over {count} images",
        200,
        _SMALL + more,
        measure_pictures,
        draw_pictures,
        read_pictures,
        pictured=True,
    )


FIGURES = Figures(
    "dcnc-dns",
    (
        Figure(
            "fig-4",
            "Histogram of the quantization residual before and after DCNC, logarithmic so that tails show.",
            "1-ldm-4",
            "not said, nor the step",
            "{count} prompts, all elements; states noised as in Algorithm 1",
            128,
            f"{_LDM} x_0 are the twin's own pictures, 3,000 photographs in the paper.",
            measure_residuals,
            draw_histograms,
            read_histograms,
        ),
        Figure(
            "fig-5",
            "Excess kurtosis of the residual per step, before and after DCNC, and the variance that it adds.",
            "1-ldm-4",
            "3,000 COCO images, noised",
            "{count} of the twin's own pictures, noised",
            128,
            f"{_LDM} Eq. 13 takes the noise for as much kurtosis as the residual has at W_u = 1; the paper "
            f"samples with 0.2, and with a variance from quartiles, which heavy tails make smaller.",
            measure_residuals,
            draw_kurtosis,
            read_kurtosis,
        ),
        Figure(
            "fig-6",
            "FD (the paper: FID) and PSNR against the strength W_u of the uniform noise, DCNC + DNS.",
            "1-ldm-4",
            "FID over 50,000 images",
            "{count} images per strength",
            200,
            _LDM,
            measure_strength,
            draw_strength,
            read_strength,
        ),
        _pictures("fig-7-ldm-4", "1-ldm-4", "LDM-4, Q-Diffusion W4A8", f" {_LDM}"),
        _pictures("fig-7-dit-xl", "1-dit-xl-w4a8", "DiT-XL, PTQ4DiT W4A8"),
        _pictures(
            "fig-7-flux-dev",
            "1-flux-dev",
            "FLUX.1-dev, SVDQuant W4A4",
            " PTQD knows no flow matching, as in the paper.",
        ),
        Figure(
            "fig-2",
            "FD to real pictures (the paper: FID) of every arm, by model.",
            "1-ldm-4",
            "FID over 50,000 or 30,000 images",
            "{count} images, those of Fig. 7",
            200,
            "The other two models: cells `1-dit-xl-w4a8` and `1-flux-dev`.",
            measure_bars,
            draw_bars,
            read_bars,
        ),
    ),
    {
        "Figs. 1 and 3": "drawings of the method",
        "Figs. 8 to 10": "more pictures of the models of Fig. 7",
        "Fig. 11": "FLUX at 1,024 pixels beside 256; the twins have one size",
    },
)
