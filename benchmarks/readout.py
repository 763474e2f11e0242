"""What a readout costs: in use, to fit, in memory and on disk.

In use: one iteration of a sampling loop (the denoiser's call and ``scheduler.step``) with a head per
step, put in place by a real ``HeadSwitch``, against the same without, at the widths of PixArt and
DiT-XL (1,152) and of FLUX (3,072), 1,024 tokens. The models have one or two blocks: the fewer, the
larger the head's share. Fitting: on the embedded pipeline, against one run of both denoisers.
Memory: one step's normal equations at FLUX's width, in a process of its own.
Run: OMP_NUM_THREADS=1 python benchmarks/readout.py [call] [select] [fit] [memory] [file]
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Spread, interleaved, ratio, report
from torch import Tensor, nn

import evenkeel
from evenkeel import zoo
from evenkeel.calibration.head_fit import CallFit, new_folds, take_in, units_of
from evenkeel.calibration.readout import fit_readout
from evenkeel.corrections.head_table import HeadTable
from evenkeel.hosts.head_switch import HeadSwitch
from evenkeel.hosts.interception import install
from evenkeel.hosts.pipelines import quiet, run_pipeline
from evenkeel.hosts.probing import probe_scheduler
from evenkeel.quantizers.layers import QuantizedLinear
from evenkeel.quantizers.spec import QuantizerSpec
from evenkeel.record import Provenance
from evenkeel.record.readout import HeadFit, Readout
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import PairedMoments

STEPS, TOKENS, TEXT = 20, 1024, 16
CALL_REPEATS, SELECT_REPEATS, FIT_REPEATS = {"PixArt": 40, "FLUX": 20}, 40, 15
PROMPTS, GUIDANCE = 32, 4.5  # of the fit
FLUX_PROMPTS, FLUX_TOKENS = 4, 4096
# Features and outputs of the head, steps, latent channels.
SIZES = {"FLUX, 20 steps": (3072, 64, 20, 16), "SDXL, 20 steps": (320 * 9, 4, 20, 4)}
SIZES |= {"SDXL, 50 steps": (320 * 9, 4, 50, 4)}


# ---- in use


def pixart() -> tuple[nn.Module, Any, dict[str, Any]]:
    """Two of 28 blocks."""
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    denoiser = PixArtTransformer2DModel(num_layers=2, sample_size=64, caption_channels=4096)
    inputs = {
        "hidden_states": torch.randn(1, 4, 64, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return denoiser, DPMSolverMultistepScheduler(), inputs


def flux() -> tuple[nn.Module, Any, dict[str, Any]]:
    """One of 57 blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    denoiser = FluxTransformer2DModel(num_layers=0, num_single_layers=1)
    inputs = {
        "hidden_states": torch.randn(1, TOKENS, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return denoiser, FlowMatchEulerDiscreteScheduler(shift=3.0), inputs


MODELS = {"PixArt": (pixart, 1152, 2), "FLUX": (flux, 3072, 1)}


def random_table(scheduler: Any, features: int, targets: int) -> HeadTable:
    """A head per step of this schedule, of the size that fits give."""
    law = probe_scheduler(scheduler)
    weight = 1e-3 * torch.randn(law.steps, 1, features, targets)
    constant = 1e-3 * torch.randn(law.steps, 1, targets)
    active = torch.ones(law.steps, 1, dtype=torch.bool)
    return HeadTable.of(law.alpha[:-1], law.sigma[:-1], weight, constant, active)


def ready(scheduler: Any) -> Any:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)
    return scheduler


def with_own_head(denoiser: nn.Module, head: nn.Module) -> Any:
    """The same denoiser around another head; every other weight is shared."""
    shared = {id(t): t for t in denoiser.parameters()}
    other = copy.deepcopy(denoiser, shared)
    other.proj_out = copy.deepcopy(head)
    return other


class Loop:
    """A sampling loop, one iteration at a time; runs follow each other without end."""

    def __init__(self, denoiser: Any, scheduler: Any, inputs: dict[str, Any]) -> None:
        self.denoiser, self.scheduler, self.inputs = denoiser, scheduler, inputs
        self.switch: HeadSwitch | None = None
        self.output = torch.zeros(())
        self._next = STEPS

    def correct(self, table: HeadTable) -> Loop:
        """From now on with a head per step."""
        self.switch = HeadSwitch(table, self.denoiser, "proj_out")
        self.switch.attach()
        install(self.scheduler, self.switch)
        return self

    def __call__(self) -> Callable[[], None]:
        """Begin a run if one is over; the iteration remains to be done."""
        if self._next == STEPS:
            self.scheduler.set_timesteps(STEPS)
            self._next = 0
        return self._iterate

    @torch.no_grad()
    def _iterate(self) -> None:
        sample = self.inputs["hidden_states"]
        output = self.denoiser(**self.inputs, return_dict=False)[0]
        t = self.scheduler.timesteps[self._next]
        self.scheduler.step(output[:, : sample.shape[1]], t, sample, return_dict=False)
        self.output = output
        self._next += 1


def measure_call(name: str) -> None:
    """The corrected iteration against the plain one: head overwritten, and change beside it."""
    make, width, blocks = MODELS[name]
    torch.manual_seed(0)
    denoiser, scheduler, inputs = make()
    denoiser.eval().requires_grad_(False)
    scheduler = ready(scheduler)
    head: Any = denoiser.get_submodule("proj_out")
    quantized = QuantizedLinear.of(head, QuantizerSpec(4, 8))
    table = random_table(scheduler, head.in_features, head.out_features)
    heads = {"plain": head, "corrected": head, "plain beside": quantized, "beside": quantized}
    loops = {
        n: Loop(with_own_head(denoiser, h), copy.deepcopy(scheduler), inputs)
        for n, h in heads.items()
    }
    for n in ("corrected", "beside"):
        loops[n].correct(table)
    laps = interleaved(loops, repeats=CALL_REPEATS[name])
    for n, base in (("corrected", "plain"), ("beside", "plain beside")):
        assert not torch.equal(loops[n].output, loops[base].output)
    ratios = {
        "corrected": ratio(laps, "corrected", "plain"),
        "beside": ratio(laps, "beside", "plain beside"),
    }
    plain = Spread.of(laps["plain"])
    report(
        {
            "benchmark": "readout",
            "case": "call",
            "model": name,
            "width": width,
            "blocks": blocks,
            "tokens": TOKENS,
            "plain_ms": plain.to_dict(1),
            **{f"{n}_over_plain": r.to_dict() for n, r in ratios.items()},
        },
        f"{name}, {blocks} block(s), width {width}: corrected {ratios['corrected']} x plain; beside "
        f"a quantized head {ratios['beside']} x plain; plain {plain.median:.0f} ms",
    )


def measure_select(name: str) -> None:
    """What is added, by itself: ms per step, where the call's own noise hides it."""
    make, width, _ = MODELS[name]
    torch.manual_seed(0)
    denoiser, scheduler, inputs = make()
    scheduler = ready(scheduler)
    head: Any = denoiser.get_submodule("proj_out")
    h = torch.randn(1, TOKENS, head.in_features)
    quantized = with_own_head(denoiser, QuantizedLinear.of(head, QuantizerSpec(4, 8)))
    table = random_table(scheduler, head.in_features, head.out_features)
    later, beside = Loop(denoiser, scheduler, inputs), Loop(quantized, ready(scheduler), inputs)
    for loop in (later, beside):
        loop.correct(table).scheduler.set_timesteps(STEPS)

    def selections(switch: Any, new: bool) -> Callable[[], None]:
        if new:
            switch._place.forget()  # as at the first run, or after another schedule
        switch.begin(later.scheduler)

        def work() -> None:
            for _ in range(STEPS):
                switch.after(None, h, h, h)

        return work

    @torch.no_grad()
    def heads(layer: Any) -> None:
        for _ in range(STEPS):
            layer(h)

    kept: Any = QuantizedLinear.of(head, QuantizerSpec(4, 8))
    works = {
        "first run": partial(selections, later.switch, True),
        "later runs": partial(selections, later.switch, False),
        "head": lambda: partial(heads, kept),
        "head and beside": lambda: partial(heads, quantized.proj_out),
    }
    laps = interleaved(works, repeats=SELECT_REPEATS)
    ms = {n: Spread.of([t / STEPS for t in laps[n]]) for n in ("first run", "later runs")}
    pairs = zip(laps["head and beside"], laps["head"], strict=True)
    ms["beside"] = Spread.of([(a - b) / STEPS for a, b in pairs])
    report(
        {
            "benchmark": "readout",
            "case": "select",
            "width": width,
            "outputs": head.out_features,
            **{f"{n.replace(' ', '_')}_ms": s.to_dict() for n, s in ms.items()},
        },
        f"{name}: added ms per step: " + ", ".join(f"{n} {s}" for n, s in ms.items()),
    )


# ---- fitting


def measure_fit() -> None:
    """``fit_readout`` against one run of both denoisers over the same prompts."""
    pipeline = zoo.load("pixart-sigma")
    quantized, _ = evenkeel.quantize_module(pipeline.transformer, QuantizerSpec(3, 4))
    twin = copy.copy(pipeline)
    twin.transformer = quantized
    prompts = [f"a {i}" for i in range(PROMPTS)]
    call = {"use_resolution_binning": False, "height": 32, "width": 32}
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    fitted = []

    def paired() -> None:
        with quiet(pipeline):
            for pipe in (pipeline, twin):
                run_pipeline(
                    pipe, prompts, range(PROMPTS), output_type="latent", call=call, **settings
                )

    def fit() -> None:
        fitted[:] = [
            fit_readout(
                pipeline,
                quantized=quantized,
                prompts=prompts,
                batch_size=PROMPTS,
                call=call,
                progress=False,
                **settings,
            )
        ]

    laps = interleaved(
        {"paired": lambda: paired, "fit": lambda: fit}, repeats=FIT_REPEATS, warmup=1
    )
    assert fitted[0].accepted > 0
    share, base = ratio(laps, "fit", "paired"), Spread.of(laps["paired"])
    report(
        {
            "benchmark": "readout",
            "case": "fit",
            "prompts": PROMPTS,
            "steps": STEPS,
            "paired_ms": base.to_dict(0),
            "fit_over_paired": share.to_dict(),
        },
        f"fitting takes {share} x the paired runs ({base.median / 1e3:.1f} s)",
    )


# ---- memory and file


def resident(field: str) -> float:
    """MB of this process (Linux): VmRSS now, VmHWM at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def prompts_of_flux() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (FLUX_TOKENS, 3072), (FLUX_TOKENS, 64)
    return [
        (torch.randn(shapes[0], generator=generator), torch.randn(shapes[1], generator=generator))
        for _ in range(FLUX_PROMPTS)
    ]


def one_step() -> dict[str, float]:
    """Sums and solution of one step at FLUX's width; seconds and MB beyond the prompts' rows."""
    rows = prompts_of_flux()
    units = units_of(FLUX_PROMPTS, FLUX_TOKENS, 3072)
    folds = new_folds(units, 3072, 64, True)
    folds_mb = sum(f.hh.nbytes for f in folds) / 2**20
    warm = torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own buffers
    assert np.isfinite(np.linalg.norm(warm.numpy()))
    del folds
    tracemalloc.start()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = resident("VmRSS")
    folds = new_folds(units, 3072, 64, True)
    start = time.process_time()
    take_in(folds, ((u, h, t) for u, (h, t) in zip(units, rows, strict=True)))
    summed = time.process_time()
    fit = CallFit.of(folds)
    solved = time.process_time()
    assert all(bool(w.isfinite().all()) for w, _ in fit.without)
    return {
        "folds": len(folds),
        "folds_mb": folds_mb,
        "resident_mb": resident("VmHWM") - before,
        "traced_mb": tracemalloc.get_traced_memory()[1] / 2**20,
        "sums_s": summed - start,
        "solve_s": solved - summed,
    }


def measure_memory() -> None:
    """Three fresh processes."""
    runs = []
    for _ in range(3):
        command = [sys.executable, __file__, "one-step"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(out))
    found = {key: Spread.of([run[key] for run in runs]) for key in runs[0]}
    report(
        {
            "benchmark": "readout",
            "case": "memory",
            "prompts": FLUX_PROMPTS,
            "tokens": FLUX_TOKENS,
            **{key: spread.to_dict(2) for key, spread in found.items()},
        },
        f"FLUX, one step of {FLUX_PROMPTS} prompts: "
        + ", ".join(f"{key} {spread}" for key, spread in found.items()),
    )


def measure_file(name: str) -> None:
    """Megabytes of the saved readout, without and with the evidence for a drift."""
    features, targets, steps, channels = SIZES[name]
    sigma = np.linspace(0.98, 0.02, steps)
    levels = 1 - sigma, sigma
    active = torch.ones(steps, 1, dtype=torch.bool)
    weight, constant = torch.randn(steps, 1, features, targets), torch.randn(steps, 1, targets)
    table = HeadTable.of(*levels, weight, constant, active)
    fits = tuple(HeadFit(k, 0, 0.1, 0.5, 0.6, "") for k in range(steps))
    moments = PairedMoments.of(*torch.randn(3, PROMPTS, steps, channels, 16))
    evidence = Evidence("flow", *levels, moments)
    made = provenance(*levels)
    megabytes = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, kept in (("heads", None), ("with_evidence", evidence)):
            readout = Readout(made, "proj_out", "per-step", table, fits, kept)
            megabytes[key] = readout.save(Path(folder) / key).stat().st_size / 1e6
    report(
        {
            "benchmark": "readout",
            "case": "file",
            "size": name,
            "steps": steps,
            **{f"{key}_mb": round(value, 3) for key, value in megabytes.items()},
        },
        f"{name}: heads {megabytes['heads']:.2f} MB, with the evidence of {PROMPTS} prompts "
        f"{megabytes['with_evidence']:.2f} MB",
    )


def provenance(alpha: Any, sigma: Any) -> Provenance:
    """Of no pipeline in particular."""
    return Provenance(
        pipeline_class="FluxPipeline",
        denoiser="transformer",
        reference="0" * 64,
        quantized="1" * 64,
        quantizer="w4a4",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        scheduler_config={},
        prediction="flow",
        num_inference_steps=len(sigma),
        guidance_scale=3.5,
        timesteps=(1000 * sigma).tolist(),
        alpha=alpha.tolist(),
        sigma=sigma.tolist(),
        call={},
        trajectory="corrected",
        layout={},
        latent_shape=[4096, 64],
        dtype="float32",
        elements=16384,
        versions={},
    )


CASES: dict[str, list[Callable[[], None]]] = {
    "call": [partial(measure_call, name) for name in MODELS],
    "select": [partial(measure_select, name) for name in MODELS],
    "fit": [measure_fit],
    "memory": [measure_memory],
    "file": [partial(measure_file, name) for name in SIZES],
}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["one-step"]:
        print(json.dumps(one_step()))
        return
    for name in sys.argv[1:] or CASES:
        for measure in CASES[name]:
            measure()


if __name__ == "__main__":
    main()
