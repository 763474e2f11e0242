"""A readout fitted at 20 steps, run at 10, 30 and 50; and one fitted at each of these.

W3A4 and W4A8 on the embedded pipeline, 32 calibration captions, 500 images per arm, the same noise in
every arm. Steps outside the fitted noise levels keep the original head (allow=("range",)). Writes
readout/schedules.json and READOUT_SCHEDULES.md beside this file.

    python experiments/readout_schedules.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evenkeel import zoo
from evenkeel.comparing.comparison import Arm, compare, standard_arms
from evenkeel.errors import OutOfRange
from evenkeel.fitting import fit_readout
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.zoo.evaluation import HandwritingEvaluator, sample_prompts

HERE = Path(__file__).parent
GUIDANCE, FITTED, IMAGES, PROMPTS = 4.5, 20, 500, 32
MEASURES = ("psnr", "frechet_full_precision")


def run(quantizer: str) -> dict[str, Any]:
    pipe = zoo.load("pixart-sigma")
    quantized, _ = quantize_module(pipe.transformer, QuantizerSpec.parse(quantizer))

    def fitted(steps: int) -> Any:
        return fit_readout(
            pipe,
            quantized=quantized,
            prompts=sample_prompts(PROMPTS, 0),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            batch_size=32,
        )

    carried = fitted(FITTED)
    found: dict[str, Any] = {}
    for steps in (10, 30, 50):
        pipe.scheduler.set_timesteps(steps)
        law = probe_scheduler(pipe.scheduler)
        places = carried.table.places(law.alpha[:-1], law.sigma[:-1])
        refused = False
        try:
            carried.table.at(law.alpha[:-1], law.sigma[:-1])
        except OutOfRange:
            refused = True
        arms = standard_arms(pipe, quantized, [])
        arms.append(Arm("fitted at 20", quantized, carried, ("range",)))
        arms.append(Arm(f"fitted at {steps}", quantized, fitted(steps)))
        comparison = compare(
            pipe,
            arms,
            prompts=sample_prompts(IMAGES, 1),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            batch_size=100,
            evaluator=HandwritingEvaluator(zoo.path_of("pixart-sigma")),
        )
        found[str(steps)] = {
            "steps out of range": sum(p is None for p in places),
            "refused without allow": refused,
            "arms": [a.as_dict() for a in comparison.arms],
        }
    return found


def main() -> None:
    results = {q: run(q) for q in ("w3a4-g32-r16", "w4a8-g32")}
    (HERE / "readout").mkdir(exist_ok=True)
    (HERE / "readout" / "schedules.json").write_text(json.dumps(results) + "\n")
    lines = ["# A readout carried to other numbers of steps", ""]
    lines += [*(__doc__ or "").splitlines()[2:5], ""]
    lines += [
        "| quantizer | steps | outside | arm | PSNR to FP, minus quantized | FD to FP, minus quantized |",
        "|---|---|---|---|---|---|",
    ]
    for quantizer, by_steps in results.items():
        for steps, found in by_steps.items():
            for arm in found["arms"][2:]:
                changes = arm["difference_to_quantized"]
                cells = [_text(changes[m], d) for m, d in zip(MEASURES, (2, 3), strict=True)]
                outside = f"{found['steps out of range']}"
                row = [quantizer, steps, outside if "at 20" in arm["name"] else "0", arm["name"]]
                lines.append("| " + " | ".join([*row, *cells]) + " |")
    (HERE / "READOUT_SCHEDULES.md").write_text("\n".join(lines) + "\n")


def _text(e: dict[str, float], digits: int) -> str:
    return f"{e['value']:+.{digits}f} [{e['low']:+.{digits}f}, {e['high']:+.{digits}f}]"


if __name__ == "__main__":
    main()
