"""The papers' ablations on the embedded pipeline: figures and numbers, one command each.

Frozen: DPM-Solver++ 2M, 20 steps, guidance 4.5, calibration captions of seed 0, W3A4 with a branch of
rank 16 unless said. Each writes ablations/NAME.json and NAME.png; the table collects what is there.

    python experiments/ablations.py --list
    python experiments/ablations.py NAME [NAME ...]
    python experiments/ablations.py --table        # ABLATIONS.md from the results on disk
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from evenkeel import Record, calibrate, zoo
from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, Arm, compare
from evenkeel.corrections import CNC, DCNC, DNS, TAC, Composite, QDrift
from evenkeel.corrections.dcnc import diluted_kurtosis, uniform_variance
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.statistics.residual import ResidualShape
from evenkeel.zoo.evaluation import HandwritingEvaluator, sample_prompts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OUT = HERE / "ablations"
QUANTIZERS = {"W3A4": "w3a4-g32-r16", "W4A4": "w4a4-g32-r16", "W4A8": "w4a8-g32"}
SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.5}
WORK = Path("runs/experiments/ablations")


def twins(quantizer: str = "W3A4") -> tuple[Any, Any]:
    pipe = zoo.load("pixart-sigma")
    spec = QuantizerSpec.parse(QUANTIZERS[quantizer])
    return pipe, quantize_module(denoiser_of(pipe), spec)[0]


def record(quantizer: str = "W3A4", prompts: int = 64) -> Record:
    """Calibrated once and kept."""
    path = WORK / f"{quantizer}-{prompts}.safetensors"
    if not path.exists():
        pipe, quantized = twins(quantizer)
        asked = {"prompts": sample_prompts(prompts, 0), "batch_size": 32, "progress": False}
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate(pipe, quantized=quantized, **asked, **SAMPLING).save(path)
    return Record.load(path)


def save(name: str, numbers: dict[str, Any], reading: str) -> None:
    OUT.mkdir(exist_ok=True)
    text = json.dumps({"reading": reading, **numbers}, indent=1)
    (OUT / f"{name}.json").write_text(text + "\n")
    plt.tight_layout()
    plt.savefig(OUT / f"{name}.png", dpi=80)
    plt.close("all")


def axes(columns: int, title: str) -> Any:
    figure, found = plt.subplots(1, columns, figsize=(4.2 * columns, 3.2), squeeze=False)
    figure.suptitle(title, fontsize=10)
    return found[0]


def images(name: str, arms: list[Arm], count: int) -> dict[str, dict[str, Any]]:
    """PSNR and Frechet distance to full precision of ``count`` images per arm."""
    pipe = zoo.load("pixart-sigma")
    found = compare(
        pipe,
        [Arm(FULL_PRECISION, pipe.transformer), *arms],
        prompts=sample_prompts(count, 1),
        batch_size=100,
        evaluator=HandwritingEvaluator(zoo.path_of("pixart-sigma")),
        folder=WORK / name,
        progress=False,
        **SAMPLING,
    )
    return {a.name: a.as_dict() for a in found.arms[1:]}


def slope() -> None:
    """Q-Drift Fig. 3: the slope of D2-DPM's mean subtraction, beside the gain."""
    numbers: dict[str, Any] = {}
    panels = axes(3, "slope a of D on q (solid) and gain k of D on e (dashed), per channel")
    for axis, name in zip(panels, QUANTIZERS, strict=True):
        second = record(name).evidence.by_channel
        numbers[name] = {"slope": second.slope.tolist(), "gain": second.gain.tolist()}
        axis.plot(second.slope)
        axis.set_prop_cycle(None)
        axis.plot(second.gain, "--")
        axis.set(title=name, xlabel="step")
    largest = {n: float(np.max(v["slope"])) for n, v in numbers.items()}
    save(
        "slope",
        numbers,
        f"Largest slope: {_listed(largest)}. It grows towards the clean end, where subtracting the "
        f"conditional mean shrinks the output most.",
    )


def envelopes() -> None:
    """Q-Drift Fig. 2 and Table 3: factors from K of 256 prompts, and images of the worst subsets."""
    whole = record("W3A4", 256)
    assert whole.law is not None
    reference = QDrift(whole.evidence).plan(whole.law).factor.mean(-1)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(256, generator=generator) for _ in range(200)]
    numbers: dict[str, Any] = {"whole": reference.tolist()}
    quantized = twins()[1]
    arms = [Arm(QUANTIZED, quantized), Arm("all 256", quantized, QDrift(whole.evidence))]
    panels = axes(
        4, "Q-Drift's 1 + c from K prompts, 200 nested subsets: range, quartiles, all 256"
    )
    for axis, k in zip(panels, (50, 10, 5, 1), strict=True):
        rules = [QDrift(whole.evidence.resampled(order[:k])) for order in orders]
        factors = torch.stack([r.plan(whole.law).factor.mean(-1) for r in rules])
        worst = int((factors - reference).norm(dim=1).argmax())
        bands = torch.quantile(factors, torch.tensor([0, 0.25, 0.75, 1.0]).double(), dim=0)
        numbers[f"K={k}"] = {"bands": bands.tolist(), "worst": factors[worst].tolist()}
        steps = np.arange(len(reference))
        axis.fill_between(steps, bands[0], bands[3], alpha=0.2)
        axis.fill_between(steps, bands[1], bands[2], alpha=0.4)
        axis.plot(reference)
        axis.set(title=f"K = {k}", xlabel="step")
        arms.append(Arm(f"worst of K={k}", quantized, rules[worst]))
    numbers["images"] = images("envelopes", arms, 500)
    psnr = {n: a["psnr"]["value"] for n, a in numbers["images"].items()}
    save("envelopes", numbers, f"PSNR over 500 images: {_listed(psnr)} dB.")


def gaussianity() -> None:
    """Q-Drift Fig. 4: how Gaussian outputs and errors are, each alone and together."""
    moments = record().evidence.pooled(per_channel=False)
    n = moments.count.double()
    residual = ResidualShape.of(moments)
    swapped = {
        "e": moments.s(4, 0) / n / (moments.s(2, 0) / n) ** 2 - 3,
        "D": moments.s(0, 4) / n / (moments.s(0, 2) / n) ** 2 - 3,
        "r": residual.excess_kurtosis,
    }
    ee, ed, dd = (moments.s(*o) / n for o in ((2, 0), (1, 1), (0, 2)))
    det = ee * dd - ed**2
    # Mardia: E[(z' S^-1 z)^2] of (e, D); 8 for a Gaussian pair.
    a, b, c = dd / det, -ed / det, ee / det
    quad = [
        a * a * moments.s(4, 0),
        4 * a * b * moments.s(3, 1),
        (2 * a * c + 4 * b * b) * moments.s(2, 2),
        4 * b * c * moments.s(1, 3),
        c * c * moments.s(0, 4),
    ]
    mardia = sum(q / n for q in quad) - 8
    panels = axes(2, "excess kurtosis per step: 0 is Gaussian")
    for name, values in swapped.items():
        panels[0].plot(values[:, 0], label=name)
    panels[0].legend()
    panels[0].set(title="alone", xlabel="step")
    panels[1].plot(mardia[:, 0])
    panels[1].set(title="(e, D) together, Mardia - 8", xlabel="step")
    numbers = {k: v[:, 0].tolist() for k, v in swapped.items()} | {"mardia": mardia[:, 0].tolist()}
    means = {k: float(np.mean(v)) for k, v in numbers.items()}
    save("gaussianity", numbers, f"Means over steps: {_listed(means)}.")


def correlations() -> None:
    """Q-Drift Fig. 5: correlation of the error between steps, and with prompts shuffled."""
    from evenkeel.statistics.error_structure import step_correlation

    numbers: dict[str, Any] = {}
    panels = axes(3, "correlation of the error between steps")
    for axis, name in zip(panels, QUANTIZERS, strict=True):
        found = step_correlation(record(name).gram).numpy()
        axis.imshow(found, vmin=-1, vmax=1, cmap="RdBu_r")
        shuffled = _shuffled_correlation(name)
        off = ~np.eye(len(found), dtype=bool)
        numbers[name] = {
            "lag 1": float(np.diagonal(found, 1).mean()),
            "lag 5": float(np.diagonal(found, 5).mean()),
            "off-diagonal": float(found[off].mean()),
            "shuffled lag 1": float(np.diagonal(shuffled, 1).mean()),
            "shuffled off-diagonal": float(np.abs(shuffled[off]).mean()),
        }
        axis.set(title=f"{name}: lag 1 {numbers[name]['lag 1']:.2f}", xlabel="step")
    text = "; ".join(f"{n}: {_listed(v)}" for n, v in numbers.items())
    save("correlations", numbers, f"{text}. Every variance-based rule assumes 0.")


def _shuffled_correlation(quantizer: str) -> np.ndarray:
    """The same with the prompts permuted at every step: what is left is not the image's own."""
    from evenkeel.hosts.pipeline.pipelines import denoiser_swapped, run_pipeline
    from evenkeel.hosts.scheduler.interception import install, uninstall
    from evenkeel.hosts.scheduler.tape import Recorder, Replayer, Tape

    pipe, quantized = twins(quantizer)
    prompts, tape = sample_prompts(32, 0), Tape()
    install(pipe.scheduler, Recorder(tape))
    run_pipeline(pipe, prompts, range(32), output_type="latent", call={}, **SAMPLING)
    outputs: list[torch.Tensor] = []
    replay = Replayer(tape, lambda step, output, reached: outputs.append(output.clone()))
    install(pipe.scheduler, replay)
    with denoiser_swapped(pipe, quantized):
        run_pipeline(pipe, prompts, range(32), output_type="latent", call={}, **SAMPLING)
    uninstall(pipe.scheduler)
    errors = [(q - e).flatten(1) for q, e in zip(outputs, tape.outputs, strict=True)]
    generator = torch.Generator().manual_seed(0)
    mixed = torch.stack([d[torch.randperm(32, generator=generator)].flatten() for d in errors])
    gram = mixed.double() @ mixed.double().T
    scale = gram.diagonal().sqrt()
    return np.asarray(gram / scale[:, None] / scale[None, :])


def channels() -> None:
    """Q-Drift Fig. 6: spread of V within a channel (over prompts) and between channels."""
    evidence = record().evidence
    variance = evidence.variance(per_channel=True, kind="conditional", trim=None, on="output")
    each = evidence.moments
    n = each.count.double()
    ee, ed, dd = (each.s(*o) / n for o in ((2, 0), (1, 1), (0, 2)))
    alone = dd - (ed + dd) ** 2 / (ee + 2 * ed + dd)
    within = (alone.std(0) / alone.mean(0)).mean(-1)
    between = variance.std(-1) / variance.mean(-1)
    (axis,) = axes(1, "relative spread of V = Var(D | q)")
    axis.plot(within, label="within a channel, over prompts")
    axis.plot(between, label="between channels")
    axis.set(xlabel="step")
    axis.legend()
    numbers = {"within": within.tolist(), "between": between.tolist()}
    means = {k: float(np.mean(v)) for k, v in numbers.items()}
    save("channels", numbers, f"Means over steps: {_listed(means)}.")


def kurtosis() -> None:
    """DCNC Figs 5 and 6: kurtosis of the residual before and after, and the sweep of W_u."""
    shape = ResidualShape.of(record().evidence.pooled(per_channel=False))
    kappa = shape.excess_kurtosis
    added = uniform_variance(shape.variance, kappa) / shape.variance
    weights = (0.0, 0.1, 0.2, 0.5, 1.0)
    after = {w: diluted_kurtosis(kappa, w)[:, 0] for w in weights}
    panels = axes(2, "excess kurtosis of the residual")
    for w, values in after.items():
        panels[0].plot(values, label=f"W_u = {w}")
        panels[1].plot(1 + w**2 * added[:, 0], label=f"W_u = {w}")
    panels[0].set(title="per step, after adding uniform noise", xlabel="step")
    panels[1].set(title="variance, over that before", xlabel="step")
    panels[0].legend()
    numbers = {f"W_u={w}": v.tolist() for w, v in after.items()}
    means = {k: float(np.mean(v)) for k, v in numbers.items()}
    save("kurtosis", numbers, f"Mean excess kurtosis: {_listed(means)}.")


def lambdas() -> None:
    """TAC Fig. 6: the sweep of lambda_1, with a threshold of 0.5."""
    from evenkeel import fit_tac
    from evenkeel.corrections.reconstruction import Reconstruction

    pipe, quantized = twins()
    asked = {"prompts": sample_prompts(32, 0), "batch_size": 32, "progress": False, **SAMPLING}
    arms = [Arm(QUANTIZED, quantized)]
    for value in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
        how = Reconstruction(lambda_1=value, threshold=0.5)
        rule = fit_tac(pipe, quantized=quantized, input_bias=False, reconstruction=how, **asked)
        arms.append(Arm(f"lambda_1={value}", quantized, rule))
    _finish_images("lambdas", arms, 200)


def components() -> None:
    """TAC Table 3 and DCNC Table 3: the parts of each method."""
    from evenkeel import fit_tac

    pipe, quantized = twins()
    asked = {"prompts": sample_prompts(64, 0), "batch_size": 32, "progress": False, **SAMPLING}
    both = fit_tac(pipe, quantized=quantized, **asked)
    assert both.gain is not None and both.bias is not None
    first = torch.arange(len(both.gain)) == 0
    gain = torch.where(first[:, None], both.gain, torch.ones_like(both.gain))
    bias = torch.where(first[:, None, None, None], both.bias, torch.zeros_like(both.bias))
    known = record().evidence
    made = {
        "tac-ner": fit_tac(pipe, quantized=quantized, input_bias=False, **asked),
        "tac-ibc": fit_tac(pipe, quantized=quantized, reconstruction=None, **asked),
        "tac": both,
        "tac, first step": TAC(both.alpha, both.sigma, gain, bias, source=both.source),
        "cnc": CNC(known),
        "cnc+dns": Composite((CNC(known), DNS(known, estimator="iqr"))),
        "dcnc": DCNC(known),
        "dcnc+dns": Composite((DCNC(known), DNS(known, estimator="iqr"))),
    }
    arms = [Arm(QUANTIZED, quantized), *(Arm(n, quantized, c) for n, c in made.items())]
    _finish_images("components", arms, 500)


def _finish_images(name: str, arms: list[Arm], count: int) -> None:
    found = images(name, arms, count)
    (axis,) = axes(1, f"{name}: PSNR to full precision, {count} images, 95 % intervals")
    for i, arm in enumerate(found.values()):
        p = arm["psnr"]
        axis.errorbar(
            p["value"], i, xerr=[[p["value"] - p["low"]], [p["high"] - p["value"]]], fmt="o"
        )
    axis.set(yticks=range(len(found)), yticklabels=list(found), xlabel="dB")
    text = {n: a["psnr"]["value"] for n, a in found.items()}
    save(name, {"images": found}, f"PSNR over {count} images: {_listed(text)} dB.")


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.2f}" for k, v in values.items())


JOBS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (slope, gaussianity, channels, kurtosis, correlations, envelopes, lambdas, components)
}


def write_table() -> None:
    lines = ["# Ablations on the embedded pipeline", "", *(__doc__ or "").splitlines()[2:4], ""]
    for name, job in JOBS.items():
        path = OUT / f"{name}.json"
        if path.exists():
            reading = json.loads(path.read_text())["reading"]
            lines += [f"## {name}", "", job.__doc__ or "", "", f"![{name}](ablations/{name}.png)"]
            lines += ["", reading, ""]
    (HERE / "ABLATIONS.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="all without")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join(JOBS))
        return
    for name in [] if options.table else options.names or JOBS:
        JOBS[name]()
    write_table()


if __name__ == "__main__":
    main()
