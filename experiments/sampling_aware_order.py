"""What quantizing does to the order of a solver: three questions of the paper's referee, on LDM-4's twin.

1. Empirical order: slope of log error against log step, for full precision, rounded weights and inputs, and
   every teacher of sampling-aware training; to the fine full-precision solution, and to each denoiser's own.
2. Per interval of 20: what one step of order k leaves out (truncation), what the rounded denoiser adds to it
   (quantization), and how far the whole rounded run is from the fine solution; beside the claimed bound
   delta alpha_t e^-lambda_s h, delta the RMS error of the prediction there.
3. Curvature: mean squared change of the direction within an interval over its size (zero for a straight
   flow), and length of the path over the distance of its ends, both in x / alpha.

Steps are multiples of 8 of the training timesteps from 980 to 20, so that all grids are nested; the
midpoint halves them. Down to 0 the last step of a grid that is uniform in time would stay wide in log-SNR,
and no solver would show its order. Denoisers are those that sampling_aware.py has trained.

    python experiments/sampling_aware_order.py [--models FOLDER]   # resumes; writes SAMPLING_AWARE_ORDER.md
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel import zoo
from evenkeel.quantizers import load_quantized
from evenkeel.storage import write_atomically
from evenkeel.zoo.making.objectives import alphas_cumprod
from evenkeel.zoo.making.twins.ldm import BETAS, NULL

HERE = Path(__file__).parent
MODELS = Path("runs/experiments/sampling_aware/ldm-4-w4a4-1600-1000")
FIRST, LAST, FINE, DEPLOYED = 980, 20, 120, 20
INTERVALS = (5, 10, 20, 40)
IMAGES, GUIDANCE = 4, 1.5
SHOWN = ("quantized", "same-state", "sa-qlora")  # per interval, on the page; the file has all
COLOURS = ("#000000", "#c1440e", "#1b6ca8", "#2e8b57", "#8a5fbf", "#b8860b", "#999999")
TERMS = ("truncation", "quantization", "bound", "deviation")
Predict = Callable[[Tensor, int], Tensor]


class Solver:
    """DPM-Solver of order 1 and 2 (Lu et al. 2022, Algorithms 1 and 2) in float64, between timesteps."""

    def __init__(self) -> None:
        product = alphas_cumprod(BETAS).double().numpy()
        self.alpha, self.sigma = np.sqrt(product), np.sqrt(1 - product)
        self.lam = np.log(self.alpha / self.sigma)

    def width(self, s: int, t: int) -> float:
        """Of a step in log-SNR."""
        return float(self.lam[t] - self.lam[s])

    def first(self, s: int, t: int, x: Tensor, eps: Tensor) -> Tensor:
        """One step of order 1 with this direction."""
        return self.alpha[t] / self.alpha[s] * x - self.sigma[t] * np.expm1(self.width(s, t)) * eps

    def step(
        self, order: int, s: int, t: int, x: Tensor, predict: Predict
    ) -> tuple[Tensor, list[Tensor]]:
        """One step from s to t, and the directions that it evaluated."""
        eps = predict(x, s)
        if order == 1:
            return self.first(s, t, x, eps), [eps]
        u = (s + t) // 2
        middle = predict(self.first(s, u, x, eps), u)
        r = self.width(s, u) / self.width(s, t)
        return self.first(s, t, x, eps + (middle - eps) / (2 * r)), [eps, middle]

    def run(
        self, order: int, intervals: int, x: Tensor, predict: Predict
    ) -> tuple[dict[int, Tensor], list[list[Tensor]]]:
        """States by timestep, and the directions of every interval."""
        times = list(range(FIRST, LAST - 1, (LAST - FIRST) // intervals))
        states, directions = {FIRST: x}, []
        for s, t in itertools.pairwise(times):
            x, found = self.step(order, s, t, x, predict)
            states[t] = x
            directions.append(found)
        return states, directions


def predictor(denoiser: nn.Module) -> Predict:
    """Guided, in float64 outside the network."""
    labels = torch.arange(IMAGES) % 10
    both = torch.cat([labels, torch.full_like(labels, NULL)])

    def predict(x: Tensor, t: int) -> Tensor:
        with torch.no_grad():
            rows = torch.cat([x, x]).float()
            out: Any = denoiser(rows, timestep=torch.full((len(rows),), t), class_labels=both)
        conditional, free = out.sample.double().chunk(2)
        return free + GUIDANCE * (conditional - free)

    return predict


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def slope(errors: dict[int, float]) -> float:
    """Of log error against log step, by least squares."""
    x, y = np.log([1 / n for n in INTERVALS]), np.log([errors[n] for n in INTERVALS])
    return float(np.polyfit(x, y, 1)[0])


def orders(solver: Solver, noise: Tensor, predict: Predict, exact: Tensor) -> dict[str, Any]:
    """Errors of the final sample at every number of intervals, and their slopes."""
    own = solver.run(2, FINE, noise, predict)[0][LAST]
    found: dict[str, Any] = {"fine": rms(own - exact)}
    for order in (1, 2):
        ends = {n: solver.run(order, n, noise, predict)[0][LAST] for n in INTERVALS}
        for name, target in (("exact", exact), ("own", own)):
            errors = {n: rms(x - target) for n, x in ends.items()}
            found[f"order {order}, {name}"] = {"errors": errors, "slope": slope(errors)}
    return found


def terms(
    solver: Solver, order: int, exact: dict[int, Tensor], full: Predict, rounded: Predict
) -> list[dict[str, float]]:
    """Per interval: truncation, quantization, deviation, and the claimed bound of the second."""
    states = solver.run(order, DEPLOYED, exact[FIRST], rounded)[0]
    times, rows = sorted(states, reverse=True), []
    for s, t in itertools.pairwise(times):
        step, (eps, *_) = solver.step(order, s, t, exact[s], full)
        noisy, (off, *_) = solver.step(order, s, t, exact[s], rounded)
        delta, h = rms(off - eps), solver.width(s, t)
        rows.append(
            {
                "timestep": s,
                "h": h,
                "truncation": rms(step - exact[t]),
                "quantization": rms(noisy - step),
                "bound": delta * float(solver.alpha[t] * np.exp(-solver.lam[s])) * h,
                "deviation": rms(states[t] - exact[t]),
            }
        )
    return [{k: float(f"{v:.4g}") for k, v in row.items()} for row in rows]


def curvature(solver: Solver, noise: Tensor, predict: Predict) -> dict[str, float]:
    """Of the second-order path with the deployed number of intervals."""
    states, directions = solver.run(2, DEPLOYED, noise, predict)
    changes = [rms(m - e) ** 2 / rms(e) ** 2 for e, m in directions]
    path = [states[t] / solver.alpha[t] for t in sorted(states, reverse=True)]
    pieces = [(b - a).flatten(1).norm(dim=1) for a, b in itertools.pairwise(path)]
    whole = (path[-1] - path[0]).flatten(1).norm(dim=1)
    return {
        "change": float(np.mean(changes)),
        "last change": changes[-1],
        "length - 1": float((torch.stack(pieces).sum(0) / whole).mean()) - 1,
    }


def measured(models: Path, place: Path) -> dict[str, Any]:
    """Of full precision and every denoiser that is there; kept after each of them."""
    solver = Solver()
    full = predictor(zoo.load("ldm-4").transformer)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    exact, _ = solver.run(2, FINE, noise, full)
    found: dict[str, Any] = {"images": IMAGES, "fine": FINE}
    found |= {"orders": {}, "terms": {}, "curvature": {}}
    if place.exists():
        found = json.loads(place.read_text())
    names = [p.parent.parent.name for p in models.glob("*/model/quantized.json")]
    for name in ["full precision", *sorted(names, key=lambda n: (*(n != s for s in SHOWN), n))]:
        if name in found["orders"]:
            continue
        print(name, flush=True)
        rounded = name != "full precision"
        predict = predictor(load_quantized(models / name / "model")[0]) if rounded else full
        found["curvature"][name] = curvature(solver, noise, predict)
        if rounded:
            found["terms"][name] = {str(k): terms(solver, k, exact, full, predict) for k in (1, 2)}
        found["orders"][name] = orders(solver, noise, predict, exact[LAST])
        write_atomically(place, json.dumps(found, separators=(",", ":")) + "\n")
        publish(found)
    return found


def table(found: dict[str, Any]) -> str:
    """SAMPLING_AWARE_ORDER.md."""
    lines = ["# Sampling-aware quantization: order, error terms, curvature", ""]
    lines += (__doc__ or "").strip().splitlines()[2:-2]
    lines += [
        "",
        "![order, terms and curvature](sampling_aware_order.svg)",
        "",
        f"{found['images']} images; the fine solution has {found['fine']} intervals of order 2.",
        "",
    ]
    lines += ["| denoiser | solver | to | " + " | ".join(map(str, INTERVALS)) + " | slope |"]
    lines += ["|---" * (len(INTERVALS) + 4) + "|"]
    for name, row in found["orders"].items():
        for key in (k for k in row if k != "fine"):
            order, to = key.split(", ")
            if name == "full precision" and to == "own":
                continue
            errors = " | ".join(f"{e:.2e}" for e in row[key]["errors"].values())
            lines.append(f"| {name} | {order} | {to} | {errors} | {row[key]['slope']:.2f} |")
    lines += [
        "",
        "RMS errors of the final latents at 5 to 40 intervals. Curvature at 20 intervals:",
        "",
    ]
    lines += ["| denoiser | change of direction | in the last interval | path over distance - 1 |"]
    lines += ["|---|---|---|---|"]
    for name, row in found["curvature"].items():
        lines.append(
            f"| {name} | {row['change']:.2e} | {row['last change']:.2e} | {row['length - 1']:.2e} |"
        )
    shown = {n: found["terms"][n] for n in SHOWN if n in found["terms"]}
    for name, by_order in shown.items():
        heads = [f"{term}, order {k}" for k in by_order for term in TERMS]
        lines += ["", f"## {name}, per interval", "", f"| timestep | h | {' | '.join(heads)} |"]
        lines += ["|---" * (2 + len(heads)) + "|"]
        for rows in zip(*by_order.values(), strict=True):
            cells = [f"{r[term]:.1e}" for r in rows for term in TERMS]
            lines.append(f"| {rows[0]['timestep']} | {rows[0]['h']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(found: dict[str, Any], place: Path) -> None:
    """The three questions as panels: order, terms of every interval, curvature."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "order", "svg.fonttype": "none", "font.size": 8}
    from matplotlib import pyplot

    start = found["orders"]["quantized"]
    names = [n for n, row in found["orders"].items() if n == "quantized" or row != start]
    colours = dict(zip(names, COLOURS, strict=False))
    picture, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    for name in names:
        for order, line in ((1, "--"), (2, "-")):
            errors = found["orders"][name][f"order {order}, exact"]["errors"].values()
            label = f"{name}, order {order}"
            left.loglog(INTERVALS, list(errors), line, marker=".", color=colours[name], label=label)
    left.set_xticks(INTERVALS, [str(n) for n in INTERVALS])
    left.minorticks_off()
    left.set(xlabel="intervals", ylabel="RMS error of the final latents", title="Order")
    left.legend(fontsize=6)
    for term, style in zip(TERMS, ("-", "-", ":", "--"), strict=True):
        rows = found["terms"]["quantized"]["2"]
        middle.semilogy(
            [r["timestep"] for r in rows], [r[term] for r in rows], style, marker=".", label=term
        )
    middle.invert_xaxis()
    middle.set(xlabel="timestep", ylabel="RMS", title="Terms of each interval, quantized, order 2")
    middle.legend(fontsize=6)
    values = [found["curvature"][n]["change"] for n in names]
    right.barh(names, values, color=[colours[n] for n in names])
    right.invert_yaxis()
    right.set(xlabel="squared change of direction over its size", title="Curvature in an interval")
    picture.tight_layout()
    picture.savefig(place, metadata={"Date": None})


def publish(found: dict[str, Any]) -> None:
    """The page and its figure."""
    write_atomically(HERE / "SAMPLING_AWARE_ORDER.md", table(found))
    figure(found, HERE / "sampling_aware_order.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", type=Path, default=MODELS, help="of one cell of sampling_aware.py"
    )
    publish(measured(parser.parse_args().models, HERE / "sampling_aware_order.json"))


if __name__ == "__main__":
    main()
