"""What Q-Drift and exact drift change on the embedded pipeline: W3A4, W4A4, W4A8, 2,000 images per arm.

Frozen: 32 calibration captions (seed 0), 2,000 other captions (seed 1), the same noise in every arm,
DPM-Solver++ 2M, 20 steps, guidance 4.5. Every arm's images are kept in --work, so an interrupted run
continues. Writes results-SPEC.json and RESULTS.md beside this file.

    python experiments/embedded_pipeline.py                    # everything, one after another
    python experiments/embedded_pipeline.py --only w4a8-g32    # one quantizer; run several at once
    python experiments/embedded_pipeline.py --table            # RESULTS.md from the results on disk
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, compare, standard_arms
from evenkeel.corrections import ExactDrift, QDrift
from evenkeel.fitting import calibrate
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reports import markdown_table
from evenkeel.reports.save import save_results
from evenkeel.zoo.evaluation import HandwritingEvaluator, reference_images, sample_prompts

HERE = Path(__file__).parent
SPECS = ("w3a4-g32-r16", "w4a4-g32-r16", "w4a8-g32")
IMAGES, CALIBRATION_PROMPTS = 2000, 32
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 4.5}


def run(text: str, images: int, work: Path) -> None:
    pipe = zoo.load("pixart-sigma")
    quantized, report = quantize_module(pipe.transformer, QuantizerSpec.parse(text))
    record = calibrate(
        pipe,
        quantized=quantized,
        prompts=sample_prompts(CALIBRATION_PROMPTS, 0),
        batch_size=32,
        **SETTINGS,
    )
    work.mkdir(parents=True, exist_ok=True)
    record.save(work / f"{text}.safetensors")
    shared, own = work / FULL_PRECISION, work / text / FULL_PRECISION
    if shared.exists() and not own.exists():
        shutil.copytree(shared, own)
    prompts = sample_prompts(images, 1)
    evidence = record.evidence
    comparison = compare(
        pipe,
        standard_arms(pipe, quantized, [QDrift(evidence), ExactDrift(evidence)]),
        prompts=prompts,
        batch_size=100,
        evaluator=HandwritingEvaluator(zoo.path_of("pixart-sigma")),
        reference_images=reference_images(prompts, 1),
        folder=work / text,
        **SETTINGS,
    )
    if not shared.exists():
        shutil.copytree(own, shared)
    settings = {
        "pipeline": "zoo:pixart-sigma",
        "quantizer": text,
        "images": images,
        "calibration prompts": CALIBRATION_PROMPTS,
        "quantized layers": len(report.quantized),
        **SETTINGS,
    }
    results = save_results(work / text, comparison, settings, record, prompts)
    (HERE / f"results-{text}.json").write_text(json.dumps(results) + "\n")


def write_table() -> None:
    lines = ["# Embedded pipeline: full precision, quantized, Q-Drift, exact drift", ""]
    lines += [
        *(__doc__ or "").splitlines()[2:5],
        "",
        "`python experiments/embedded_pipeline.py`",
        "",
    ]
    for text in SPECS:
        path = HERE / f"results-{text}.json"
        if not path.exists():
            lines += [f"## {text}", "", "not run yet", ""]
            continue
        results = json.loads(path.read_text())
        steps = results["calibration"]["steps"]
        matrix = results["calibration"]["step_correlation"]
        lag = [matrix[i][i + 1] for i in range(len(matrix) - 1)]
        gains = [sum(s["gain"]) / len(s["gain"]) for s in steps]
        slopes = [sum(s["slope"]) / len(s["slope"]) for s in steps]
        factors = [sum(s["factor"]) / len(s["factor"]) - 1 for s in steps]
        lines += [
            f"## {text}",
            "",
            markdown_table(results),
            "",
            f"Step-to-step correlation of the error, lag 1: mean {sum(lag) / len(lag):.2f}, "
            f"range {min(lag):.2f} to {max(lag):.2f}. Gain k: {min(gains):.3f} to {max(gains):.3f}. "
            f"Slope a: {min(slopes):.3f} to {max(slopes):.3f}. Q-Drift's c: up to {max(factors):.4f}.",
            "",
        ]
    (HERE / "RESULTS.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=SPECS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/embedded_pipeline"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        for text in [options.only] if options.only else SPECS:
            run(text, options.images, options.work)
    write_table()


if __name__ == "__main__":
    main()
