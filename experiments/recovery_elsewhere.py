"""Recovery adapters where they were not fitted: other step counts, samplers and guidance.

Frozen: each twin at W4A16 (groups of 32), adapters of 11 % more bytes fitted once with its own sampler, steps
and guidance on 32 prompts (seed 0); 100 images of other prompts (seed 1), the same noise in both arms.

Every twin is a file in experiments/recovery_elsewhere/; the command resumes.

    python experiments/recovery_elsewhere.py [TWIN ...]     # default: all; writes RECOVERY_ELSEWHERE.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
from measured_cells import Cells, change_of, decibels, finish, known, not_run

import evenkeel
from evenkeel import zoo
from evenkeel.comparing.comparison import Arm, compare, standard_arms
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.storage import write_atomically
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "recovery_elsewhere"
PROMPTS, IMAGES, BUDGET, SPEC = 32, 100, 0.11, "w4a16-g32"
# (scheduler, steps, guidance); None: as fitted.
DIFFUSION = (
    (None, None, None),
    *((None, steps, None) for steps in (4, 8, 50)),
    *(
        (name, None, None)
        for name in ("DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")
    ),
    *((None, None, guidance) for guidance in (1.0, 2.0, 9.0)),
)
FLOW = (
    (None, None, None),
    *((None, steps, None) for steps in (8, 50)),
    ("DPMSolverMultistepScheduler", None, None),
    *((None, None, guidance) for guidance in (1.0, 7.0)),
)
TWINS = {"pixart-sigma": DIFFUSION, "sd-v2.1": DIFFUSION, "flux-dev": FLOW}


def measure(name: str, work: Path) -> dict[str, Any]:
    """One fit, then every setting."""
    twin, pipe = zoo.twin(name), zoo.load(name)
    kind, scheduler = KINDS[twin.pictures], pipe.scheduler
    module, _ = quantize_module(denoiser_of(pipe), QuantizerSpec.parse(SPEC))
    adapters, report = evenkeel.fit_adapters(
        pipe,
        quantized=module,
        prompts=kind.prompts(PROMPTS, 0),
        num_inference_steps=twin.num_inference_steps,
        guidance_scale=twin.guidance_scale,
        budget=BUDGET,
        batch_size=32,
        progress=False,
    )
    print(report.text(), flush=True)
    settings = []
    for index, (sampler, steps, guidance) in enumerate(TWINS[name]):
        pipe.scheduler = scheduler
        if sampler is not None:
            flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            changed = flow if TWINS[name] is FLOW else {}
            pipe.scheduler = getattr(diffusers, sampler).from_config(scheduler.config, **changed)
        found = compare(
            pipe,
            [*standard_arms(pipe, module, {}), Arm("adapters", module, adapters)],
            prompts=kind.prompts(IMAGES, 1),
            num_inference_steps=steps or twin.num_inference_steps,
            evaluator=kind.evaluator(zoo.path_of(name)),
            folder=work / str(index),
            guidance_scale=twin.guidance_scale if guidance is None else guidance,
            batch_size=50,
        )
        settings.append(
            {
                "sampler": type(pipe.scheduler).__name__,
                "steps": steps or twin.num_inference_steps,
                "guidance": twin.guidance_scale if guidance is None else guidance,
                "arms": [arm.as_dict() for arm in found.arms],
            }
        )
    return {"twin": name, "fit": report.text(), "settings": settings}


def table(cells: Cells) -> str:
    """RECOVERY_ELSEWHERE.md; the first row of a twin is what it was fitted with."""
    lines = [
        "# Recovery adapters where they were not fitted",
        "",
        *(__doc__ or "").splitlines()[2:4],
        "",
        *not_run(TWINS, cells),
        "| twin | sampler | steps | guidance | quantized, dB | with adapters | change [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells.values():
        for said in cell["settings"]:
            _, quantized, restored = said["arms"]
            lines.append(
                f"| {cell['twin']} | {said['sampler']} | {said['steps']} | {said['guidance']} | "
                f"{decibels(quantized['psnr'])} | {decibels(restored['psnr'])} | {change_of(restored)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("twins", nargs="*", default=list(TWINS), metavar="TWIN")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/recovery_elsewhere"))
    options = parser.parse_args()
    finish(
        options.twins,
        RESULTS,
        lambda name: measure(name, options.work / name),
        lambda: write_atomically(HERE / "RECOVERY_ELSEWHERE.md", table(known(RESULTS, TWINS))),
    )


if __name__ == "__main__":
    main()
