"""Every twin of the zoo at full precision and quantized to W8A8, W4A8, W4A4, W3A4 and W4A16.

Frozen: each twin with its original's sampler, number of steps and guidance; 2,000 images per arm where the
table does not say another number (prompts of seed 1, the same noise in every arm); quantized by rounding to
nearest in groups of 32, at 4-bit activations beside a branch of rank 16; 32 calibration prompts (seed 0)
for the structure of the error. A distance grows as images get fewer: compare it at equal numbers.
Every arm's images are kept in --work, so an interrupted run continues. Writes zoo/NAME.json and ZOO.md.

    python experiments/zoo.py                      # all twins that are here and have no result yet
    python experiments/zoo.py sana dit-xl          # these, again
    python experiments/zoo.py --arms W4A16 --images 200 sana   # one arm more beside its result
    python experiments/zoo.py --table              # ZOO.md from the results on disk
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, Arm, compare
from evenkeel.fitting import calibrate
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.record.describe import describe
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "zoo"
SPECS = {
    "W8A8": "w8a8-g32",
    "W4A8": "w4a8-g32",
    "W4A4": "w4a4-g32-r16",
    "W3A4": "w3a4-g32-r16",
    "W4A16": "w4a16-g32",
}
IMAGES, CALIBRATION_PROMPTS, BATCH = 2000, 32, 100


def run(name: str, images: int, work: Path, labels: Sequence[str]) -> dict[str, Any]:
    """Compare full precision and the arms of these labels, and measure the error of each quantized one."""
    twin = zoo.twin(name)
    pipe, kind = zoo.load(name), KINDS[twin.pictures]
    settings: dict[str, Any] = {
        "num_inference_steps": twin.num_inference_steps,
        "guidance_scale": twin.guidance_scale,
    }
    arms, errors = [Arm(FULL_PRECISION, denoiser_of(pipe))], {}
    for label in labels:
        text = SPECS[label]
        quantized, _ = quantize_module(denoiser_of(pipe), QuantizerSpec.parse(text))
        arms.append(Arm(label, quantized))
        errors[label] = error_structure(pipe, quantized, kind, settings)
        print(name, label, {k: round(v, 3) for k, v in errors[label].items()}, flush=True)
    prompts = kind.prompts(images, 1)
    comparison = compare(
        pipe,
        arms,
        prompts=prompts,
        batch_size=BATCH,
        evaluator=kind.evaluator(zoo.path_of(name)),
        reference_images=kind.references(prompts, 1),
        folder=work / f"{name}-{images}",
        **settings,
    )
    return {
        "twin": name,
        "images": images,
        "scheduler": type(pipe.scheduler).__name__,
        "settings": settings,
        "specifications": {label: SPECS[label] for label in labels},
        "arms": [arm.as_dict() for arm in comparison.arms],
        "errors": errors,
    }


def error_structure(
    pipe: Any, quantized: Any, kind: Any, settings: dict[str, Any]
) -> dict[str, float]:
    """How errors of steps correlate, and the error's gain and slope, as calibration sees them."""
    record = calibrate(
        pipe,
        quantized=quantized,
        prompts=kind.prompts(CALIBRATION_PROMPTS, 0),
        batch_size=32,
        histograms=False,
        progress=False,
        **settings,
    )
    found = describe(record, resamples=2)
    correlation = np.array(found["step_correlation"])
    lags = {lag: np.diagonal(correlation, lag) for lag in (1, 5) if len(correlation) > lag}
    gains = [float(np.mean(s["gain"])) for s in found["steps"]]
    slopes = [float(np.mean(s["slope"])) for s in found["steps"]]
    structure = {f"lag {lag}": float(np.mean(values)) for lag, values in lags.items()}
    structure |= {"lag 1 low": float(lags[1].min()), "lag 1 high": float(lags[1].max())}
    structure |= {"gain low": min(gains), "gain high": max(gains)}
    return structure | {"slope low": min(slopes), "slope high": max(slopes)}


def write_table() -> None:
    """ZOO.md from the results on disk."""
    lines = ["# The zoo, quantized", "", *(__doc__ or "").splitlines()[2:6], ""]
    lines += ["`python experiments/zoo.py`", ""]
    found = {n: RESULTS / f"{n}.json" for n in zoo.TWINS}
    results = {n: json.loads(p.read_text()) for n, p in found.items() if p.exists()}
    missing = [n for n in found if n not in results]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines += [
        "FD: Fréchet distance between features of the twin's evaluator, to the full-precision images",
        "(same noise) and to held-out scans, ± standard error. Alignment: share of what the prompt asks",
        "for that the image shows.",
        "",
        "| twin | sampler | images | arm | FD to full precision | FD to held-out scans | alignment, % | "
        "PSNR, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        sampler = f"{result['scheduler'].removesuffix('Scheduler')}, "
        sampler += f"{result['settings']['num_inference_steps']} steps"
        for part in (result, *result.get("also", ())):
            for arm in part["arms"]:
                if part is result or arm["name"] != FULL_PRECISION:
                    start = f"| {name} | {sampler} | {part['images']:,} | {arm['name']} | "
                    lines.append(start + " | ".join(_cells(arm)) + " |")
    lines += [
        "",
        "## The error along the trajectory",
        "",
        "Correlation of the error of the denoiser's output between steps (mean over the steps, range in",
        "brackets), gain k and slope a per step (lowest to highest); the variance-based corrections assume",
        "that errors of different steps do not correlate.",
        "",
        "| twin | arm | lag 1 | lag 5 | gain k | slope a |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        errors = [e for part in (result, *result.get("also", ())) for e in part["errors"].items()]
        for label, e in errors:
            five = f"{e['lag 5']:.2f}" if "lag 5" in e else "-"
            one = f"{e['lag 1']:.2f} [{e['lag 1 low']:.2f}, {e['lag 1 high']:.2f}]"
            gain = f"{e['gain low']:.3f} to {e['gain high']:.3f}"
            slope = f"{e['slope low']:.3f} to {e['slope high']:.3f}"
            lines.append(f"| {name} | {label} | {one} | {five} | {gain} | {slope} |")
    (HERE / "ZOO.md").write_text("\n".join(lines) + "\n")


def _cells(arm: dict[str, Any]) -> list[str]:
    def pair(key: str, scale: float, digits: int) -> str:
        value, stderr = arm[key]["value"], arm[key]["stderr"]
        if value is None or not np.isfinite(value):
            return "-"
        return f"{scale * value:.{digits}f} ± {scale * (stderr or 0):.{digits}f}"

    return [
        "0" if arm["name"] == FULL_PRECISION else pair("frechet_full_precision", 1, 3),
        pair("frechet_reference", 1, 2),
        pair("alignment", 100, 1),
        pair("psnr", 1, 2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(zoo.TWINS)}")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument(
        "--arms", nargs="+", choices=list(SPECS), help="only these, beside a result"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/zoo"))
    parser.add_argument("--table", action="store_true", help="only write ZOO.md")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    here = [n for n in zoo.TWINS if zoo.find(n)]
    todo = options.names or [n for n in here if not (RESULTS / f"{n}.json").exists()]
    for name in [] if options.table else todo:
        result = run(name, options.images, options.work, options.arms or list(SPECS))
        file = RESULTS / f"{name}.json"
        if options.arms:
            found = json.loads(file.read_text())
            others = [
                a
                for a in found.get("also", [])
                if a["specifications"].keys() & options.arms == set()
            ]
            result = found | {"also": [*others, result]}
        file.write_text(json.dumps(result, indent=1) + "\n")
    write_table()


if __name__ == "__main__":
    main()
