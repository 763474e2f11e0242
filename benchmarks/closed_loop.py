"""What fitting TAC in closed loop costs beside the two runs it is made of; limit 1.05."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timing import Spread, interleaved, ratio, report

import evenkeel
from evenkeel import zoo
from evenkeel.corrections.tac import TAC
from evenkeel.fitting.closed_loop.fit_tac import fit_tac
from evenkeel.hosts.pipeline.pipelines import quiet, run_pipeline
from evenkeel.quantizers.methods.spec import QuantizerSpec

STEPS, PROMPTS, BATCH, GUIDANCE, REPEATS = 20, 32, 8, 4.5, 9
LIMIT = 1.05


def main() -> None:
    torch.set_num_threads(1)
    pipeline = zoo.load("pixart-sigma")
    quantized, _ = evenkeel.quantize_module(pipeline.transformer, QuantizerSpec(3, 4))
    shell = copy.copy(pipeline)
    shell.transformer = quantized
    prompts = [f"a {i}" for i in range(PROMPTS)]
    call = {"use_resolution_binning": False, "height": 32, "width": 32}
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    fitted: list[TAC] = []

    def paired() -> None:
        with quiet(pipeline), quiet(shell):
            for pipe in (pipeline, shell):
                for i in range(0, PROMPTS, BATCH):
                    run_pipeline(
                        pipe,
                        prompts[i : i + BATCH],
                        range(i, i + BATCH),
                        output_type="latent",
                        call=call,
                        **settings,
                    )

    def fit(**options: Any) -> None:
        fitted[:] = [
            fit_tac(
                pipeline,
                quantized=quantized,
                prompts=prompts,
                batch_size=BATCH,
                call=call,
                progress=False,
                **settings,
                **options,
            )
        ]

    masked = {"lambda_1": 0.1, "threshold": 0.5, "reconstruct_unconditional": True}
    variants = {
        "paired": lambda: paired,
        "fit": lambda: fit,
        "fit, masked, unconditional": lambda: lambda: fit(**masked),
    }
    laps = interleaved(variants, repeats=REPEATS, warmup=1)
    assert fitted[0].gain is not None and bool((fitted[0].gain != 1).any())
    base = Spread.of(laps["paired"])
    for case in list(variants)[1:]:
        share = ratio(laps, case, "paired")
        report(
            {
                "benchmark": "closed_loop",
                "case": case,
                "prompts": PROMPTS,
                "batch": BATCH,
                "steps": STEPS,
                "paired_ms": base.as_dict(0),
                "fit_over_paired": share.as_dict(),
                "limit": LIMIT,
            },
            f"{case}: {share} x the paired runs ({base.median / 1e3:.1f} s), limit {LIMIT}",
        )


if __name__ == "__main__":
    main()
