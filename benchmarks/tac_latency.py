"""TAC's Table 5 on the twin of its DDIM: what the correction adds to a quantized run, by batch.

The paper times 100 steps with int8 kernels of convolutions, which PyTorch lacks on CPUs; here the
quantized arm is plain rounding to W8A8, and torchao's int8 where a layer is linear. Ten of the 100 steps.
Run: OMP_NUM_THREADS=1 python benchmarks/tac_latency.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from timing import Spread, interleaved, ratio, report
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import evenkeel
from evenkeel import zoo
from evenkeel.corrections.reconstruction import Reconstruction
from evenkeel.fitting.closed_loop.fit_tac import fit_tac
from evenkeel.hosts.pipeline.pipelines import quiet, run_pipeline
from evenkeel.quantizers.methods.spec import QuantizerSpec

STEPS, REPEATS, BATCHES = 10, 15, (1, 16, 32, 64)


def main() -> None:
    torch.set_num_threads(1)
    pipeline = zoo.load("ddim-cifar")
    int8 = copy.deepcopy(pipeline.unet)
    quantize_(int8, Int8DynamicActivationInt8WeightConfig(), lambda m, _: isinstance(m, nn.Linear))
    rounded, _ = evenkeel.quantize_module(pipeline.unet, QuantizerSpec(8, 8))
    for name, denoiser in (("rounded W8A8", rounded), ("torchao int8", int8)):
        tac = fit_tac(
            pipeline,
            quantized=denoiser,
            prompts=[None] * 4,
            num_inference_steps=STEPS,
            batch_size=4,
            reconstruction=Reconstruction.published(),
            progress=False,
        )
        plain, corrected = (shell_of(pipeline, denoiser) for _ in range(2))
        evenkeel.apply(corrected, tac)
        for batch in BATCHES:
            timed(name, {"full": pipeline, "plain": plain, "corrected": corrected}, batch)


def shell_of(pipeline: Any, denoiser: nn.Module) -> Any:
    """The pipeline with another denoiser and a scheduler of its own."""
    shell = copy.copy(pipeline)
    shell.unet, shell.scheduler = denoiser, copy.deepcopy(pipeline.scheduler)
    return shell


def timed(name: str, arms: dict[str, Any], batch: int) -> None:
    def of(pipe: Any) -> Callable[[], object]:
        def work() -> None:
            with quiet(pipe):
                run_pipeline(pipe, [None] * batch, range(batch), call={}, **asked)

        return work

    asked: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": None,
        "output_type": "pt",
    }
    work = {arm: of(pipe) for arm, pipe in arms.items()}
    laps = interleaved({arm: (lambda w=w: w) for arm, w in work.items()}, repeats=REPEATS, warmup=1)
    share, of_full = ratio(laps, "corrected", "plain"), ratio(laps, "plain", "full")
    plain = Spread.of(laps["plain"])
    report(
        {
            "benchmark": "tac_latency",
            "case": name,
            "batch": batch,
            "steps": STEPS,
            "plain_ms": plain.as_dict(0),
            "corrected_over_plain": share.as_dict(),
            "plain_over_full": of_full.as_dict(),
        },
        f"{name}, batch {batch}: {share} x the quantized run ({plain.median:.0f} ms), which is {of_full} x "
        f"full precision",
    )


if __name__ == "__main__":
    main()
