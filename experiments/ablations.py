"""Ablations on the embedded pipeline: figures and numbers, one command each.

Frozen: DPM-Solver++ 2M, 20 steps, guidance 4.5, calibration captions of seed 0, W3A4 with a branch of
rank 16 unless said. Each writes ablations/NAME.json and NAME.png; the table collects what is there.
The papers' own figures, on the cells that stand for theirs, are those of ``paper_figures.py``.

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
from evenkeel.corrections import CNC, DCNC, DNS, TAC, Composite
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
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


def correlations() -> None:
    """Correlation of the error between steps, and with prompts shuffled: no figure of a paper."""
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


def lambdas() -> None:
    """The sweep of TAC's lambda_1, with a threshold of 0.5, as its Fig. 6 on another model."""
    from evenkeel import fit_tac
    from evenkeel.corrections.reconstruction import Reconstruction

    pipe, quantized = twins()
    asked = {"prompts": sample_prompts(32, 0), "batch_size": 32, "progress": False, **SAMPLING}
    arms = [Arm(QUANTIZED, quantized)]
    for value in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
        how = Reconstruction.least_squares(lambda_1=value, threshold=0.5)
        rule = fit_tac(pipe, quantized=quantized, input_bias=False, reconstruction=how, **asked)
        arms.append(Arm(f"lambda_1={value}", quantized, rule))
    _finish_images("lambdas", arms, 200)


def components() -> None:
    """The parts of TAC and of DCNC + DNS, as their Tables 3 on other models."""
    from evenkeel import fit_tac
    from evenkeel.corrections.reconstruction import Reconstruction

    pipe, quantized = twins()
    asked = {"prompts": sample_prompts(64, 0), "batch_size": 32, "progress": False, **SAMPLING}
    how = {"quantized": quantized, "reconstruction": Reconstruction.least_squares(), **asked}
    both = fit_tac(pipe, **how)
    assert both.gain is not None and both.bias is not None
    first = torch.arange(len(both.gain)) == 0
    gain = torch.where(first[:, None], both.gain, torch.ones_like(both.gain))
    bias = torch.where(first[:, None, None, None], both.bias, torch.zeros_like(both.bias))
    known = record().evidence
    made = {
        "tac-ner": fit_tac(pipe, input_bias=False, **how),
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


JOBS: dict[str, Callable[[], None]] = {f.__name__: f for f in (correlations, lambdas, components)}


_FIGURES = (
    "The papers' own figures are elsewhere: [Q-Drift](figures/q-drift/figures.md), "
    "[DCNC + DNS](figures/dcnc-dns/figures.md), [TAC](figures/tac/figures.md)."
)


def write_table() -> None:
    lines = [
        "# Ablations on the embedded pipeline",
        "",
        *(__doc__ or "").splitlines()[2:4],
        _FIGURES,
        "",
    ]
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
