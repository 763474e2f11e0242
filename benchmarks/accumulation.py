"""What collecting statistics costs, relative to the two denoisers it rides on.

Time: one batch of 32 prompts at 20 steps on the embedded pipeline's denoiser (untrained: the weights
do not matter), statistics of the batch against its 20 x 2 guided evaluations. Memory: the peak of a
whole calibration with more and more prompts at the same batch size.
Run: OMP_NUM_THREADS=1 python benchmarks/accumulation.py
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Spread, interleaved, report

import evenkeel
from evenkeel.fitting import calibrate
from evenkeel.statistics.error_structure import radial_spectrum, step_gram
from evenkeel.statistics.histogram import ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.zoo.captions import vocabulary
from evenkeel.zoo.making.autoencoders import build_kl
from evenkeel.zoo.making.text_encoders import build_t5
from evenkeel.zoo.making.twins import pixart_sigma as networks

PROMPTS, STEPS, REPEATS = 32, 20, 40
MEMORY_PROMPTS, MEMORY_BATCH, MEMORY_STEPS = (32, 128, 512), 8, 4
LATENT = (networks.LATENT_CHANNELS, networks.LATENT_SIZE, networks.LATENT_SIZE)
CAPTION = (networks.CAPTION_TOKENS, networks.CAPTION_WIDTH)


def two_evaluations() -> Callable[[], None]:
    """Both denoisers once, guided; at full precision, which is the cheaper of the two."""
    denoiser = networks.build_denoiser().eval()
    inputs = {
        "hidden_states": torch.randn(2 * PROMPTS, *LATENT),
        "encoder_hidden_states": torch.randn(2 * PROMPTS, *CAPTION),
        "timestep": torch.full((2 * PROMPTS,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }

    def evaluate() -> None:
        with torch.no_grad():
            for _ in range(2):
                denoiser(**inputs)

    return evaluate


def statistics_of_a_batch() -> dict[str, Callable[[], object]]:
    """The parts of what calibration does with a batch, and all of it."""
    e, noise, x = torch.randn(3, PROMPTS, STEPS, *LATENT)
    q = e + 0.05 * noise
    d = q.double() - e.double()
    e_c, d_c, x_c = (t.flatten(3) for t in (e, d, x))
    spread = d_c.std((0, 3))
    means = d_c.mean((0, 3)), e_c.double().mean((0, 3))
    frame = Frame(means[0], spread, means[1], e_c.double().std((0, 3)), 0 * spread, spread)
    parts: dict[str, Callable[[], object]] = {
        "error": lambda: (q.double() - e.double()).any(),
        "moments": lambda: PairedMoments.of(e_c, d_c, x_c),
        "gram": lambda: step_gram(d_c),
        "spectrum": lambda: radial_spectrum(d),
        "histogram": lambda: ErrorHistogram.of(frame, e_c, d_c),
    }
    return {**parts, "statistics": lambda: [part() for part in parts.values()]}


def _ready(work: Callable[[], object]) -> Callable[[], object]:
    """Nothing to prepare."""
    return work


def measure_time() -> None:
    torch.manual_seed(0)
    works = {"evaluations": two_evaluations(), **statistics_of_a_batch()}
    laps = interleaved(
        {name: partial(_ready, work) for name, work in works.items()}, repeats=REPEATS
    )
    pairs = zip(laps["statistics"], laps["evaluations"], strict=True)
    share = Spread.of([100 * s / (STEPS * ev) for s, ev in pairs])
    medians = {name: Spread.of(laps[name]) for name in works}
    report(
        {
            "benchmark": "accumulation",
            "case": "time",
            "prompts": PROMPTS,
            "steps": STEPS,
            "statistics_percent_of_evaluations": share.as_dict(),
            "two_evaluations_ms": medians.pop("evaluations").as_dict(1),
            **{f"{name}_ms": m.as_dict(2) for name, m in medians.items()},
        },
        f"statistics take {share} % of the time of {STEPS} x 2 evaluations; ms per batch: "
        + ", ".join(f"{name} {m.median:.1f}" for name, m in medians.items()),
    )


def untrained_pipeline() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    tokenizer, text_encoder = build_t5(
        vocabulary(), networks.CAPTION_TOKENS, networks.CAPTION_WIDTH, layers=2
    )
    denoiser = networks.build_denoiser().eval()
    torch.nn.init.normal_(denoiser.proj_out.weight, std=0.1)
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=build_kl(networks.LATENT_CHANNELS).eval(),
        transformer=denoiser,
        scheduler=DPMSolverMultistepScheduler(**networks.SCHEDULER),
    )


def peak_megabytes(work: Callable[[], object]) -> tuple[float, object]:
    """Highest resident memory while working, above that before (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # or what was freed before would hide what is needed now
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far

    def status(field: str) -> float:
        text = Path("/proc/self/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) / 1024

    before = status("VmRSS")
    result = work()
    return status("VmHWM") - before, result


def measure_memory() -> None:
    torch.manual_seed(0)
    pipeline = untrained_pipeline()
    quantized, _ = evenkeel.quantize_module(pipeline.transformer, evenkeel.QuantizerSpec(4))

    def run(prompts: int, histograms: bool) -> Any:
        return calibrate(
            pipeline,
            quantized=quantized,
            prompts=[f"a {i}" for i in range(prompts)],
            num_inference_steps=MEMORY_STEPS,
            guidance_scale=4.5,
            batch_size=MEMORY_BATCH,
            histograms=histograms,
            call={"use_resolution_binning": False, "height": 32, "width": 32},
            progress=False,
        )

    for histograms in (True, False):
        run(4 * MEMORY_BATCH, histograms)  # whatever is allocated once
        for prompts in MEMORY_PROMPTS:
            megabytes, record = peak_megabytes(partial(run, prompts, histograms))
            report_memory(prompts, histograms, megabytes, record)


def report_memory(prompts: int, histograms: bool, megabytes: float, record: Any) -> None:
    rows = sum(t.nbytes for t in vars(record.moments).values()) + record.gram.nbytes
    kept = rows / 2**20
    report(
        {
            "benchmark": "accumulation",
            "case": "memory",
            "prompts": prompts,
            "batch": MEMORY_BATCH,
            "steps": MEMORY_STEPS,
            "histograms": histograms,
            "peak_mb": round(megabytes, 2),
            "rows_of_record_mb": round(kept, 2),
        },
        f"{prompts} prompts, {'with' if histograms else 'without'} histograms: peak "
        f"{megabytes:.1f} MB above the start; the record's rows are {kept:.2f} MB of it",
    )


def main() -> None:
    torch.set_num_threads(1)
    measure_time()
    measure_memory()


if __name__ == "__main__":
    main()
