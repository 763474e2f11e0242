"""Q-Drift (arXiv 2603.18095): Figs. 1 to 6, and the ablation that section 4.3 speaks of."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import numpy as np
import torch
from matplotlib import figure as mpl
from matplotlib.patches import Ellipse
from scipy import stats
from torch import Tensor

from evenkeel.corrections import QDrift
from evenkeel.reproduction.arms import SUBSETS, Makers
from evenkeel.reproduction.run_cell import Bench
from figures import panels
from figures.figure import Figure, Figures, Found, Numbers
from figures.latent_statistics import (
    absolute_correlations,
    diagonal_noise,
    diagonals,
    distinct_pairs,
    inside_ellipse,
    shuffled_correlations,
    spread,
)
from figures.pairs import Pairs, pairs

TIMES = {"0.9T": 0.9, "0.5T": 0.5, "0.1T": 0.1}
BLOCKS = {"qq": "q with q", "DD": "D with D", "qD": "q with D"}
SIZES = (50, 10, 5, 1)
DRAWN_PAIRS = 10_000
BINS = 40
_COLUMNS = (panels.FULL, panels.QUANTIZED)


# ---- Fig. 1, section 4.3


def compared(bench: Bench, count: int) -> Any:
    """The published form, channel-wise; the same with one scalar per step; the released code's."""
    module = bench.quantized()
    makers = Makers(bench.run(module))
    scalar = {"name": "q-drift:published", "per_channel": False}
    asked = {"Q-Drift": "q-drift:published", "one scalar": scalar, "released": "q-drift:released"}
    return bench.comparison(module, {n: makers.make(w) for n, w in asked.items()}, count)


def measure_pictures(bench: Bench, count: int) -> Found:
    found = compared(bench, count)
    before, after = (panels.psnr(found, a) for a in (panels.QUANTIZED, "Q-Drift"))
    rows = panels.at_quantiles(before)
    full, quantized = found.images[panels.FULL], found.images[panels.QUANTIZED]
    texts = bench.prompts(count, 1)
    numbers = {
        "arms": {
            k: v for k, v in panels.arm_numbers(found.arms).items() if k in (*_COLUMNS, "Q-Drift")
        },
        "prompts": [texts[i] for i in rows],
        "quantized": before[rows].tolist(),
        "corrected": after[rows].tolist(),
        "zooms": [panels.most_different(quantized[i], full[i], 12) for i in rows],
        "nearer": float((after > before).double().mean()),
    }
    columns = {"full precision": panels.FULL, "quantized": panels.QUANTIZED, "Q-Drift": "Q-Drift"}
    return Found(numbers, {name: found.images[arm][rows] for name, arm in columns.items()})


def draw_pictures(found: Found) -> mpl.Figure:
    n = found.numbers
    labels = [
        "\n".join([*textwrap.wrap(text, 26), f"{a:.1f} dB, {b:.1f} dB"])
        for text, a, b in zip(n["prompts"], n["quantized"], n["corrected"], strict=True)
    ]
    return panels.panel(found.pictures, labels, n["zooms"])


def read_pictures(n: Numbers) -> list[str]:
    return [
        f"Rows: the images of {n['count']} whose PSNR to full precision, quantized, is at the "
        f"{', '.join(f'{100 * q:.0f}' for q in panels.QUANTILES)} % quantile; below the prompt, PSNR "
        f"quantized and corrected. Beside each picture its 12 x 12 pixels where quantized and full "
        f"precision differ most.",
        f"Quantized: {panels.level_text(n['arms'])}.",
        f"Q-Drift, published form: {panels.change_text(n['arms']['Q-Drift'])}; "
        f"{100 * n['nearer']:.0f} % of the images come nearer to full precision.",
    ]


def measure_forms(bench: Bench, count: int) -> Found:
    found = compared(bench, count)
    return Found({"arms": panels.arm_numbers(found.arms)})


def draw_forms(found: Found) -> mpl.Figure:
    arms = {k: v for k, v in found.numbers["arms"].items() if k not in _COLUMNS}
    figure = mpl.Figure(figsize=(8, 2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    titles = ("change of FD to full precision", "change of FD to real", "change of PSNR, dB")
    for axis, key, title in zip(axes, panels.MEASURES, titles, strict=True):
        for i, arm in enumerate(arms.values()):
            value, low, high = arm[key]["change"]
            axis.errorbar(value, i, xerr=[[value - low], [high - value]], fmt="o", color="C0")
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_title(title, fontsize=9)
    axes[0].set(yticks=range(len(arms)), yticklabels=list(arms))
    axes[0].invert_yaxis()
    return figure


def read_forms(n: Numbers) -> list[str]:
    names = {"Q-Drift": "One value per step and channel", "one scalar": "One scalar per step"}
    names["released"] = "The released code's scalar after a trim at 4 standard deviations"
    return [
        f"Quantized: {panels.level_text(n['arms'])}.",
        *(f"{said}: {panels.change_text(n['arms'][arm])}." for arm, said in names.items()),
    ]


# ---- Figs. 2 and 3


def measure_subsets(bench: Bench, count: int) -> Found:
    seen = pairs(bench, count)
    evidence = seen.evidence()

    def factors(of: Any) -> Tensor:
        return QDrift.published(of).plan(seen.law).factor.mean(-1) - 1

    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(count, generator=generator) for _ in range(SUBSETS)]
    numbers: Numbers = {"reference": factors(evidence).tolist()}
    for size in SIZES:
        drawn = torch.stack([factors(evidence.resampled(order[:size])) for order in orders])
        low, middle, high = torch.quantile(drawn, torch.tensor([0, 0.5, 1.0]).double(), dim=0)
        numbers[f"K={size}"] = {
            "low": low.tolist(),
            "median": middle.tolist(),
            "high": high.tolist(),
        }
    return Found(numbers)


def draw_subsets(found: Found) -> mpl.Figure:
    n = found.numbers
    figure = mpl.Figure(figsize=(11, 2.8), layout="constrained")
    for axis, size in zip(figure.subplots(1, 4, sharey=True), SIZES, strict=True):
        band = n[f"K={size}"]
        steps = np.arange(len(n["reference"]))
        axis.fill_between(steps, band["low"], band["high"], alpha=0.3, label="min to max")
        axis.plot(steps, band["median"], "--", label="median")
        axis.plot(steps, n["reference"], color="black", lw=1, label=f"all {n['count']}")
        axis.set(title=f"K = {size}", xlabel="step")
    figure.axes[0].set(ylabel="$c_i$, mean over channels", yscale="log")
    figure.axes[0].legend(fontsize=8)
    return figure


def read_subsets(n: Numbers) -> list[str]:
    whole = np.array(n["reference"])
    lines = [
        f"c of all {n['count']} prompts: {whole.min():.4f} to {whole.max():.4f} over the steps."
    ]
    for size in SIZES:
        band = {k: np.array(v) for k, v in n[f"K={size}"].items()}
        off = np.maximum(band["high"] - whole, whole - band["low"])
        lines.append(
            f"K = {size}: the {SUBSETS} subsets stay within {off.max():.4f} of it "
            f"({100 * (off / whole).mean():.0f} % of c, mean over steps); the median is off by "
            f"{100 * (np.abs(band['median'] - whole) / whole).mean():.1f} %."
        )
    return lines


def measure_slope(bench: Bench, count: int) -> Found:
    second = pairs(bench, count).evidence().by_channel
    return Found({"slope": second.slope.tolist(), "gain": second.gain.tolist()})


def draw_slope(found: Found) -> mpl.Figure:
    figure = mpl.Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    slope = np.array(found.numbers["slope"])
    axis.plot(slope, color="C0", alpha=0.35, lw=0.8)
    axis.plot(slope.mean(1), color="C0", label="a of D on q, mean over channels (thin: each)")
    gain = np.array(found.numbers["gain"]).mean(1)
    axis.plot(gain, "--", color="C1", label="k of D on e, mean over channels")
    axis.set(xlabel="step", ylabel="slope")
    axis.legend(fontsize=8)
    return figure


def read_slope(n: Numbers) -> list[str]:
    slope, gain = np.array(n["slope"]).mean(1), np.array(n["gain"]).mean(1)
    return [
        f"a is {slope[0]:.3f} at the first step, {np.median(slope):.3f} in the median and "
        f"{slope[-1]:.3f} at the last (the paper: about 0.78), so that the conditional mean leaves "
        f"{1 - slope[-1]:.2f} of the quantized output there.",
        f"The gain k of D on e, which says whether the output is too large, is {gain[0]:+.3f} at the first "
        f"step and {gain[-1]:+.3f} at the last.",
    ]


# ---- Figs. 4 to 6


def measure_gaussianity(bench: Bench, count: int) -> Found:
    seen = pairs(bench, count)
    high, wide = seen.e.shape[-2:]
    where = (0, high // 2, wide // 2)
    numbers: Numbers = {"where": where, "times": {}}
    for name, share in TIMES.items():
        step = seen.at(share)
        q, d = (t[:, step] for t in (seen.q, seen.d))
        chosen = {"q": q[(slice(None), *where)], "D": d[(slice(None), *where)]}
        refused = {
            "q": float((stats.normaltest(q.flatten(1).numpy()).pvalue < 0.05).mean()),
            "D": float((stats.normaltest(d.flatten(1).numpy()).pvalue < 0.05).mean()),
        }
        numbers["times"][name] = {
            "step": step,
            "values": {k: v.tolist() for k, v in chosen.items()},
            "skewness": {k: float(stats.skew(v.numpy())) for k, v in chosen.items()},
            "kurtosis": {k: float(stats.kurtosis(v.numpy())) for k, v in chosen.items()},
            "refused": refused,
            "inside": [inside_ellipse(chosen["q"], chosen["D"], r) for r in (1.0, 2.0)],
            "correlation": float(np.corrcoef(chosen["q"], chosen["D"])[0, 1]),
        }
    return Found(numbers)


def draw_gaussianity(found: Found) -> mpl.Figure:
    figure = mpl.Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(3, 3)
    for column, (name, at) in enumerate(found.numbers["times"].items()):
        values = {k: np.array(v) for k, v in at["values"].items()}
        for row, (label, v) in enumerate(values.items()):
            axis = axes[row, column]
            axis.hist(v, bins=30, density=True, alpha=0.5, color=f"C{row}")
            x = np.linspace(v.min(), v.max(), 200)
            axis.plot(x, stats.norm.pdf(x, v.mean(), v.std()), color="black", lw=1)
            axis.set_title(f"{label} at {name}, step {at['step']}", fontsize=9)
        axis = axes[2, column]
        q, d = values["q"], values["D"]
        axis.hexbin(q, d, gridsize=16, cmap="Blues", mincnt=1)
        for radius in (1, 2, 3):
            axis.add_patch(_ellipse(q, d, radius))
        axis.set(xlabel="q", ylabel="D")
    return figure


def _ellipse(x: np.ndarray, y: np.ndarray, radius: float) -> Ellipse:
    values, vectors = np.linalg.eigh(np.cov(x, y))
    angle = math.degrees(math.atan2(vectors[1, 1], vectors[0, 1]))
    long, short = (2 * radius * math.sqrt(v) for v in values[::-1])
    return Ellipse((x.mean(), y.mean()), long, short, angle=angle, fill=False, color="C3", lw=1)


def read_gaussianity(n: Numbers) -> list[str]:
    lines = [
        f"Coordinate (c, h, w) = ({', '.join(map(str, n['where']))}), the middle of the first channel as in "
        f"the paper. A Gaussian has skewness and excess kurtosis 0 (here with standard errors "
        f"{math.sqrt(6 / n['count']):.2f} and {math.sqrt(24 / n['count']):.2f}), 39 % of the pairs within "
        f"the first ellipse and 86 % within the second."
    ]
    for name, at in n["times"].items():
        skewness, kurtosis = at["skewness"], at["kurtosis"]
        lines.append(
            f"{name}: q has skewness {skewness['q']:+.2f} and kurtosis {kurtosis['q']:+.2f}, D "
            f"{skewness['D']:+.2f} and {kurtosis['D']:+.2f}; {100 * at['inside'][0]:.0f} % and "
            f"{100 * at['inside'][1]:.0f} % within the ellipses, correlation {at['correlation']:+.2f}. "
            f"Over all elements of the latent D'Agostino's test refuses normality (5 %) for "
            f"{100 * at['refused']['q']:.0f} % of q and {100 * at['refused']['D']:.0f} % of D."
        )
    return lines


def blocks(seen: Pairs, step: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The three blocks of the joint covariance, as the two sides of each; (prompts, elements)."""
    q, d = (t[:, step].flatten(1) for t in (seen.q, seen.d))
    return {"qq": (q, q), "DD": (d, d), "qD": (q, d)}


def measure_correlations(bench: Bench, count: int) -> Found:
    seen = pairs(bench, count)
    channels, high, wide = seen.e.shape[2:]
    generator = torch.Generator().manual_seed(0)
    drawn = distinct_pairs(channels * high * wide, DRAWN_PAIRS, generator)
    at = torch.arange(channels * high * wide).reshape(channels, high, wide)
    beside = torch.stack([at[:, :, :-1].flatten(), at[:, :, 1:].flatten()], 1)
    numbers: Numbers = {"times": {}, "elements": channels * high * wide}
    for name, share in TIMES.items():
        step = seen.at(share)
        found = {}
        for block, (a, b) in blocks(seen, step).items():
            actual = absolute_correlations(a, b, drawn)
            shuffled = shuffled_correlations(a, b, drawn, generator)
            found[block] = {
                "actual": _summary(actual),
                "shuffled": _summary(shuffled),
                "neighbours": float(absolute_correlations(a, b, beside).mean()),
            }
        numbers["times"][name] = {"step": step, "blocks": found}
    return Found(numbers)


def _summary(values: Tensor) -> dict[str, Any]:
    edges = torch.linspace(0, 1, BINS + 1).double()
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "p95": float(values.quantile(0.95)),
        "counts": torch.histogram(values, edges)[0].int().tolist(),
    }


def draw_correlations(found: Found) -> mpl.Figure:
    figure = mpl.Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True)
    edges = np.linspace(0, 1, BINS + 1)
    for column, (name, at) in enumerate(found.numbers["times"].items()):
        for row, (block, both) in enumerate(at["blocks"].items()):
            axis, said = axes[row, column], []
            for which, colour in (("actual", "C0"), ("shuffled", "C1")):
                axis.stairs(both[which]["counts"], edges, fill=True, alpha=0.5, color=colour)
            for key in ("mean", "median", "p95"):
                values = " vs ".join(f"{both[w][key]:.3f}" for w in ("actual", "shuffled"))
                said.append(f"{key}: {values}")
            axis.text(0.97, 0.95, "\n".join(said), transform=axis.transAxes, ha="right", va="top",
                      fontsize=8)  # fmt: skip
            axis.set_title(f"{BLOCKS[block]} at {name}, step {at['step']}", fontsize=9)
            axis.set(yticks=[], xlim=(0, 0.5))
    for axis in axes[-1]:
        axis.set_xlabel("|correlation|, 10,000 pairs (blue), shuffled (orange)", fontsize=8)
    return figure


def read_correlations(n: Numbers) -> list[str]:
    lines = []
    for block, words in BLOCKS.items():
        at = [(name, t["blocks"][block]) for name, t in n["times"].items()]
        means = ", ".join(f"{b['actual']['mean']:.3f} at {name}" for name, b in at)
        floor = np.mean([b["shuffled"]["mean"] for _, b in at])
        near = ", ".join(f"{b['neighbours']:.2f}" for _, b in at)
        lines.append(
            f"{words}: mean |r| of random pairs {means}, shuffled {floor:.3f}; horizontal neighbours in a "
            f"channel {near}."
        )
    return lines


def measure_channels(bench: Bench, count: int) -> Found:
    seen = pairs(bench, count)
    numbers: Numbers = {"times": {}}
    for name, share in TIMES.items():
        step = seen.at(share)
        q, d = (t[:, step].flatten(2) for t in (seen.q, seen.d))
        sides = {"qq": (q, q), "DD": (d, d), "qD": (q, d)}
        found = {k: spread(diagonals(a, b), diagonal_noise(a, b)) for k, (a, b) in sides.items()}
        numbers["times"][name] = {"step": step, "blocks": found}
    return Found(numbers)


def draw_channels(found: Found) -> mpl.Figure:
    figure = mpl.Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(3, 3)
    for column, (name, at) in enumerate(found.numbers["times"].items()):
        for row, (block, of) in enumerate(at["blocks"].items()):
            axis, channels = axes[row, column], range(len(of["mean"]))
            axis.errorbar(
                channels, of["mean"], yerr=of["within"], fmt="o", color=f"C{row}", capsize=3
            )
            axis.set_title(f"{BLOCKS[block]} at {name}, step {at['step']}", fontsize=9)
            axis.set_xticks(channels)
    for axis in axes[-1]:
        axis.set_xlabel("channel")
    return figure


def read_channels(n: Numbers) -> list[str]:
    lines = []
    for block, words in BLOCKS.items():
        at = [(name, t["blocks"][block]) for name, t in n["times"].items()]
        ratios = ", ".join(f"{b['ratio']:.2f} at {name}" for name, b in at)
        left = ", ".join(f"{b['ratio without sampling noise']:.2f}" for _, b in at)
        lines.append(
            f"{words}: standard deviation over positions, mean of the channels, over that of the channels' "
            f"means: {ratios} (without the sampling noise of {n['count']} prompts {left})."
        )
    return lines


_SIZE = (
    "The twin's latent has 4 x 8 x 8 = 256 elements where the paper's has 4 x 64 x 64 = 16,384; rank 32 of "
    "the branch is rank 4 here."
)
_PAIRED = "{count} paired runs"
FIGURES = Figures(
    "q-drift",
    (
        Figure(
            "fig-1",
            "Full precision, quantized and corrected pictures of the same prompts and noise, with zooms.",
            "1-sdxl",
            "5 of the 5,000 evaluation prompts, chosen by the authors",
            "5 of {count} evaluation prompts, chosen by the rule above",
            100,
            "Pictures have 32 x 32 pixels, 1,024 x 1,024 in the paper.",
            measure_pictures,
            draw_pictures,
            read_pictures,
            pictured=True,
        ),
        Figure(
            "fig-2",
            "Correction factor c per step from K prompts: range and median over 200 nested subsets, and all.",
            "1-sdxl",
            "subsets of a reference of 5,000 paired runs",
            "subsets of a reference of {count}",
            512,
            _SIZE,
            measure_subsets,
            draw_subsets,
            read_subsets,
        ),
        Figure(
            "fig-3",
            "Slope a of the error on the quantized output per step, mean over channels.",
            "1-sdxl",
            "5,000 paired runs",
            _PAIRED,
            512,
            _SIZE,
            measure_slope,
            draw_slope,
            read_slope,
        ),
        Figure(
            "fig-4",
            "One latent coordinate at 0.9 T, 0.5 T and 0.1 T: histograms of q and D with fitted Gaussians, "
            "joint density with ellipses of 1, 2 and 3 standard deviations.",
            "1-sdxl",
            "5,000 paired runs, coordinate (0, 64, 64)",
            _PAIRED,
            512,
            _SIZE,
            measure_gaussianity,
            draw_gaussianity,
            read_gaussianity,
        ),
        Figure(
            "fig-5",
            "Absolute correlations between latent elements, 10,000 random pairs i != j in each block of the "
            "joint covariance, against pairs with permuted prompts.",
            "1-sdxl",
            "each correlation over 5,000 paired runs",
            "each over {count}",
            512,
            _SIZE
            + " Random elements are therefore nearer to each other than in the paper; of 512 runs a mean "
            "|r| of 0.035 is noise, of 5,000 one of 0.011.",
            measure_correlations,
            draw_correlations,
            read_correlations,
        ),
        Figure(
            "fig-6",
            "Diagonal entries of the three blocks: mean per channel, and standard deviation over the "
            "positions within a channel.",
            "1-sdxl",
            "5,000 paired runs",
            _PAIRED,
            512,
            _SIZE,
            measure_channels,
            draw_channels,
            read_channels,
        ),
        Figure(
            "section-4.3",
            "What section 4.3 says and no table shows: V per channel against one scalar per step.",
            "1-sdxl",
            "no numbers",
            "{count} images per arm, 95 % intervals of paired differences",
            100,
            "Calibrated on 64 prompts.",
            measure_forms,
            draw_forms,
            read_forms,
        ),
    ),
    {},
)
