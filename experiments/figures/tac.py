"""TAC-Diffusion (ECCV 2024): Figs. 1, 4 to 8."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib import figure as mpl
from torch import Tensor, nn

from evenkeel.comparing.generation import Arm, sampling_as
from evenkeel.corrections.reconstruction import Reconstruction
from evenkeel.fitting.closed_loop.fit_tac import fit_tac
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import watched
from evenkeel.hosts.scheduler.tape import Recorder, Tape
from evenkeel.reproduction.arms import Makers
from evenkeel.reproduction.run_cell import Bench
from figures import panels
from figures.figure import Figure, Figures, Found, Numbers
from figures.pairs import led

FULL, QUANTIZED = panels.FULL, panels.QUANTIZED
# Named as `evenkeel reproduce` names them, so that their images are shared.
ARMS = {"TAC": "tac:published", "tac-ibc": "tac-ibc", "tac-output-bias": "tac-output-bias"}
WORDS = {
    "TAC": "TAC",
    "tac-ibc": "IBC alone",
    "tac-output-bias": "mean error of the output taken off",
}
WEIGHTS = (0.1, 0.5, 0.9)
THRESHOLD = 0.5
FIRST = 6  # prompts of a panel
LAYERS = (1.0, 0.75, 0.5, 0.25)


@cache
def correction(bench: Bench, name: str) -> Any:
    """Of the registry's name, fitted to the cell's calibration prompts; it takes minutes."""
    return Makers(bench.run(bench.quantized())).make(name)


# ---- Fig. 1


def measure_errors(bench: Bench, count: int) -> Found:
    module = bench.quantized()
    run = bench.run_on(bench.prompts(count, 1), module, seed=1_000_000)
    made = {name: correction(bench, ARMS[name]) for name in ("TAC", "tac-ibc")}
    arms = [Arm(QUANTIZED, module), *(Arm(n, module, c) for n, c in made.items())]
    sums: dict[str, Tensor] = {}
    for batch in run.batches():
        full = taped(run, batch, Arm(FULL, run.denoiser))
        _add(sums, "states", full.results)
        _add(sums, "outputs", full.outputs)
        for arm in arms:
            tape = taped(run, batch, arm)
            _add(sums, f"states {arm.name}", tape.results, full.results)
            _add(sums, f"outputs {arm.name}", tape.outputs, full.outputs)
            if arm.name == QUANTIZED:
                there = led(run, batch, run.denoiser, tape)
                _add(sums, "own", tape.outputs, there)
                _add(sums, "bias", there, full.outputs)

    def relative(name: str, to: str) -> list[float]:
        return (sums[name] / sums[to]).sqrt().tolist()

    numbers = {
        part: {arm.name: relative(f"{part} {arm.name}", part) for arm in arms}
        for part in ("states", "outputs")
    }
    parts = {name: relative(name, "outputs") for name in ("own", "bias")}
    return Found({**numbers, "parts": parts})


def taped(run: Run, batch: Batch, arm: Arm) -> Tape:
    """States and outputs of an arm, as corrected."""
    tape = Tape()
    with sampling_as(run, arm), watched(run.pipeline.scheduler, Recorder(tape)):
        run.sample(batch)
    return tape


def _add(sums: dict[str, Tensor], name: str, found: list[Tensor], less: Any = None) -> None:
    """Squares per step, of what is found or of its difference."""
    pairs = [(x, 0.0) for x in found] if less is None else zip(found, less, strict=True)
    squares = torch.stack([(a.double() - b).square().sum() for a, b in pairs])
    sums[name] = sums.get(name, 0) + squares


def draw_errors(found: Found) -> mpl.Figure:
    n = found.numbers
    figure = mpl.Figure(figsize=(11, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axis, part, title in ((left, "states", "state"), (middle, "outputs", "noise estimate")):
        for name, values in n[part].items():
            axis.plot(values, label=WORDS.get(name, name))
        axis.set(title=f"error of the {title}", xlabel="step", yscale="log")
    left.set_ylabel("relative root mean square")
    right.plot(n["outputs"][QUANTIZED], label="whole error", color="C0")
    right.plot(n["parts"]["own"], label="quantization, at the same states", color="C3")
    right.plot(n["parts"]["bias"], label="states that are off", color="C4")
    right.set(title="noise estimate, quantized", xlabel="step", yscale="log")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def read_errors(n: Numbers) -> list[str]:
    steps = len(n["states"][QUANTIZED])
    at = [round(q * (steps - 1)) for q in (0.25, 0.5, 0.75, 1.0)]
    lines = [
        f"Error over full precision's own size, root mean square, after steps "
        f"{', '.join(str(k + 1) for k in at)} of {steps}:"
    ]
    for part, words in (("states", "state"), ("outputs", "noise estimate")):
        for name, values in n[part].items():
            arm = WORDS.get(name, name)
            lines.append(f"{words}, {arm}: {', '.join(f'{values[k]:.3f}' for k in at)}.")
    own, bias = (np.array(n["parts"][k]) for k in ("own", "bias"))
    whole, after = np.array(n["outputs"][QUANTIZED]), np.flatnonzero(bias > own)
    where = f", first at step {after[0] + 1}" if len(after) else ""
    lines.append(
        f"Of the quantized noise estimate's error, what quantization does at the same states is "
        f"{', '.join(f'{own[k]:.3f}' for k in at)}, what the states do that are off (the paper's exposure "
        f"bias) {', '.join(f'{bias[k]:.3f}' for k in at)}; the second is the larger one at "
        f"{len(after)} of {steps} steps{where}. The two work against each other: at "
        f"{int((whole < np.maximum(own, bias)).sum())} steps the whole error is smaller than the larger part."
    )
    return lines


# ---- Fig. 5


def measure_ranges(bench: Bench, count: int) -> Found:
    run = bench.run_on(bench.prompts(count, 0), batch_size=count)
    seen: dict[str, list[list[float]]] = {}

    def watching(name: str) -> Any:
        def hook(_: nn.Module, given: Any) -> None:
            x = given[0].detach().flatten()
            shares = torch.tensor([0.0, 0.01, 0.99, 1.0])
            seen.setdefault(name, []).append(torch.quantile(x, shares).tolist())

        return hook

    layers = {
        name: layer
        for name, layer in run.denoiser.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }
    hooks = [layer.register_forward_pre_hook(watching(name)) for name, layer in layers.items()]
    with run.undisturbed():
        run.sample(run.batches()[0])
    for hook in hooks:
        hook.remove()
    ranges = {n: np.array(v) for n, v in seen.items() if len(v) == bench.cell.steps}
    return Found(range_numbers(ranges))


def range_numbers(ranges: dict[str, np.ndarray]) -> Numbers:
    """Of per-step (minimum, 1 %, 99 %, maximum) by layer: those at the ranks of ``LAYERS``, and all shares.

    A layer's share is its narrowest step's range over the range that covers all steps.
    """
    shares = {
        name: float((r[:, 3] - r[:, 0]).min() / (r[:, 3].max() - r[:, 0].min()))
        for name, r in ranges.items()
    }
    order = sorted(shares, key=lambda n: -shares[n])
    chosen = {order[round(q * (len(order) - 1))]: q for q in LAYERS}
    every = max(1, len(next(iter(ranges.values()))) // 100)
    return {
        "every": every,
        "layers": {n: np.round(ranges[n][::every], 3).T.tolist() for n in chosen},
        "shares": {n: shares[n] for n in chosen},
        "all": sorted(shares.values()),
    }


def draw_ranges(found: Found) -> mpl.Figure:
    n = found.numbers
    figure = mpl.Figure(figsize=(11, 2.8), layout="constrained")
    for axis, (name, (low, first, last, high)) in zip(
        figure.subplots(1, len(n["layers"])), n["layers"].items(), strict=True
    ):
        steps = n["every"] * np.arange(len(low))
        axis.fill_between(steps, low, high, alpha=0.25, label="minimum to maximum")
        axis.fill_between(steps, first, last, alpha=0.5, label="1 % to 99 %")
        axis.set_title("\n".join(textwrap.wrap(name, 30)), fontsize=8)
        axis.set_xlabel("step")
    figure.axes[0].set_ylabel("activation")
    figure.axes[0].legend(fontsize=7)
    return figure


def read_ranges(n: Numbers) -> list[str]:
    shares = np.array(n["all"])
    return [
        f"Inputs of all {len(shares)} convolutions and linear layers. The range of the narrowest step is "
        f"{100 * np.median(shares):.0f} % of the range that covers all steps in the median layer, between "
        f"{100 * shares[0]:.0f} % and {100 * shares[-1]:.0f} %: that is the share of the levels of a static "
        f"range which such a step uses.",
        "Shown: the layers of the smallest share, and at three quarters, a half and a quarter of the ranks: "
        + ", ".join(f"{name} {100 * share:.0f} %" for name, share in n["shares"].items())
        + ".",
    ]


# ---- Fig. 6


def measure_weights(bench: Bench, count: int) -> Found:
    module = bench.quantized()
    run = bench.run(module)
    made = {}
    for weight in WEIGHTS:
        how = Reconstruction.least_squares(
            lambda_1=weight, threshold=THRESHOLD, mask="signed", lowest=None, highest=None
        )

        made[f"{weight:g}"] = fit_tac(
            bench.pipeline,
            quantized=module,
            prompts=run.prompts.values[:32],
            num_inference_steps=run.num_inference_steps,
            guidance_scale=run.guidance_scale,
            batch_size=32,
            reconstruction=how,
            progress=False,
        )
    found = bench.comparison(module, made, count)
    gains = {name: correction.gain.mean(1).tolist() for name, correction in made.items()}
    return Found({"arms": panels.arm_numbers(found.arms), "gains": gains})


def draw_weights(found: Found) -> mpl.Figure:
    arms, weights = found.numbers["arms"], [*found.numbers["gains"]]
    figure = mpl.Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = ("FD to full precision", "FD to real", "PSNR to full precision, dB")
    for axis, key, title in zip(axes, panels.MEASURES, titles, strict=True):
        before = arms[QUANTIZED][key]["value"]
        changes = np.array([arms[w][key]["change"] for w in weights])
        value, low, high = before + changes.T
        at = [float(w) for w in weights]
        axis.errorbar(at, value, yerr=[value - low, high - value], fmt="o-", capsize=3)
        axis.axhline(before, color="grey", ls="--", label="quantized")
        axis.set(xlabel=r"$\lambda_1$", title=title)
    axes[0].legend(fontsize=8)
    return figure


def read_weights(n: Numbers) -> list[str]:
    return [
        f"Quantized: {panels.level_text(n['arms'])}. Intervals: 95 %, of the paired difference to it.",
        *(
            f"lambda_1 = {w}: {panels.change_text(n['arms'][w])}; K {np.mean(n['gains'][w]):.2f} in the mean "
            f"over steps."
            for w in n["gains"]
        ),
    ]


# ---- Figs. 4, 7 and 8


def measure_pictures(bench: Bench, count: int) -> Found:
    module = bench.quantized()
    # The mean of the output's error is not taken off samplers with memory.
    arms = (
        ARMS
        if bench.cell.sampler is None
        else {n: w for n, w in ARMS.items() if n in ("TAC", "tac-ibc")}
    )
    made = {name: correction(bench, what) for name, what in arms.items()}
    found = bench.comparison(module, made, count)
    return Found(
        {"arms": panels.arm_numbers(found.arms)},
        {name: images[:FIRST] for name, images in found.images.items()},
    )


def draw_pictures(found: Found) -> mpl.Figure:
    columns = {WORDS.get(n, n): pictures for n, pictures in found.pictures.items()}
    columns = {"\n".join(textwrap.wrap(n, 14)): pictures for n, pictures in columns.items()}
    return panels.panel(columns, [f"noise {i}" for i in range(FIRST)])


def read_pictures(n: Numbers) -> list[str]:
    return [
        f"The first {FIRST} of {n['count']} pictures.",
        f"Quantized: {panels.level_text(n['arms'])}.",
        *(
            f"{words}: {panels.change_text(n['arms'][name])}."
            for name, words in WORDS.items()
            if name in n["arms"]
        ),
    ]


_QUANTIZER = "Q-Diffusion with 200 iterations per block, 20,000 in its code. Handwriting stands for CIFAR-10."
_PICTURES = Figure(
    "fig-7",
    "Pictures: full precision, Q-Diffusion, TAC (Fig. 7), and its comparison of the input bias with "
    "the mean error of the noise estimate (Fig. 4, on LDM-8 in the paper).",
    "1-w3a8",
    "some pictures; FID over 50,000 images",
    "the first pictures; FD over {count}",
    100,
    _QUANTIZER,
    measure_pictures,
    draw_pictures,
    read_pictures,
    pictured=True,
)
FIGURES = Figures(
    "tac",
    (
        Figure(
            "fig-1",
            "What the paper's drawing claims, measured: errors of state and noise estimate per step, without "
            "and with correction, and what part of the latter comes from states that are off (Eqs. 6, 7).",
            "1-w3a8",
            "a drawing",
            "{count} pictures; corrections fitted to 64 others",
            32,
            _QUANTIZER,
            measure_errors,
            draw_errors,
            read_errors,
        ),
        Figure(
            "fig-5",
            "Range of activations over the denoising steps in layers of full-precision LDM-8.",
            "2-church-w3a8",
            "some layers, sample not said",
            "{count} pictures, layers by the rule above",
            16,
            "Handwriting stands for LSUN-Church.",
            measure_ranges,
            draw_ranges,
            read_ranges,
        ),
        Figure(
            "fig-6",
            "FD (the paper: FID) against the weight lambda_1 of the relative error in the reconstruction.",
            "1-w3a8",
            "FID over 50,000 images, steps of 0.1",
            "{count} images per weight, steps of 0.4; K fitted to 32 others",
            50,
            f"{_QUANTIZER} The paper gives no threshold: {THRESHOLD:g} here. The weights are Eq. 12's; with "
            f"the factor N that Eqs. 13 to 19 print, the relative error outweighs the other at each.",
            measure_weights,
            draw_weights,
            read_weights,
        ),
        _PICTURES,
        replace(
            _PICTURES,
            name="fig-8",
            title="Pictures with DPM-Solver++ (2S): full precision, Q-Diffusion, TAC.",
            row="4-w3a8",
        ),
    ),
    {
        "Figs. 2, 3, 10 and 11": "LSUN pictures of 200 and 500 steps; cells `2-church-*` and `2-bedroom-*` "
        "of the tables stand for them",
        "Fig. 9": "its baseline TFMQ-DM is missing here",
        "Figs. 12 and 13": "single prompts of Stable Diffusion",
    },
)
