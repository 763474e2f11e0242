"""Every sampler-side correction on the embedded pipeline.

Frozen: calibration on 64 captions of seed 0, evaluation on captions of seed 1, the same noise in every
arm, guidance 4.5. All arms of a JOB are paired by prompt and noise. The marginal check runs before the
images are made, on 64 other captions (seed 2), and its verdicts are stored beside what the images then
show. Finished arms are kept in --work, so an interrupted run continues. Writes corrections/JOB.json and
CORRECTIONS.md beside this file.

    python experiments/corrections.py --list            # the jobs, in the order of their worth
    python experiments/corrections.py JOB [JOB ...]     # run some of them
    python experiments/corrections.py --table           # CORRECTIONS.md from the results on disk
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, Arm, compare
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.zoo.evaluation import HandwritingEvaluator, reference_images, sample_prompts

HERE = Path(__file__).parent
RESULTS = HERE / "corrections"
GUIDANCE = 4.5
CALIBRATION_PROMPTS = CHECK_PROMPTS = 64


@dataclass(frozen=True)
class Setting:
    """A scheduler, how many steps it takes, and what else the pipeline call is given."""

    scheduler: str
    steps: int
    config: tuple[tuple[str, Any], ...] = ()
    call: tuple[tuple[str, Any], ...] = ()


DDIM = (("clip_sample", False), ("set_alpha_to_one", False))
SETTINGS = {
    "dpm20": Setting("DPMSolverMultistepScheduler", 20),
    "euler30": Setting("EulerDiscreteScheduler", 30),
    "ddim50": Setting("DDIMScheduler", 50, DDIM),
    "ddim50-eta1": Setting("DDIMScheduler", 50, DDIM, (("eta", 1.0),)),
    "dpm4": Setting("DPMSolverMultistepScheduler", 4),
}
QUANTIZERS = {"w3a4": "w3a4-g32-r16", "w4a4": "w4a4-g32-r16", "w4a8": "w4a8-g32"}


@dataclass(frozen=True)
class Job:
    """One table."""

    quantizer: str
    setting: str
    images: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.quantizer}-{self.setting}-{self.images}"


JOBS = [
    *(Job(q, "dpm20", 2000) for q in ("w3a4", "w4a8", "w4a4")),
    Job("w3a4", "dpm4", 2000),
    *(Job("w3a4", s, 500) for s in ("ddim50-eta1", "euler30", "ddim50")),
    *(Job(q, "dpm4", 2000) for q in ("w4a8", "w4a4")),
    *(Job(q, s, 500) for q in ("w4a8", "w4a4") for s in ("ddim50-eta1", "euler30", "ddim50")),
]


def pipeline_for(setting: Setting) -> Any:
    """The embedded pipeline with this scheduler."""
    pipe = zoo.load("pixart-sigma")
    kind = getattr(diffusers, setting.scheduler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **dict(setting.config))
    return pipe


def common(job: Job, pipe: Any, quantized: Any) -> dict[str, Any]:
    """What every measurement and fit of a job is asked for."""
    setting = SETTINGS[job.setting]
    return {
        "quantized": quantized,
        "prompts": sample_prompts(CALIBRATION_PROMPTS, 0),
        "num_inference_steps": setting.steps,
        "guidance_scale": GUIDANCE,
        "seed": 0,
        "batch_size": 32,
        "call": dict(setting.call),
        "progress": False,
    }


def corrections_for(job: Job, pipe: Any, quantized: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Every correction by name, and the seconds that its measurement took."""
    from evenkeel.corrections import CNC, Composite, ExactDrift
    from evenkeel.corrections.catalogue import available
    from evenkeel.corrections.reconstruction import Reconstruction
    from evenkeel.fitting import calibrate
    from evenkeel.fitting.closed_loop.fit_stepbaq import fit_stepbaq
    from evenkeel.fitting.closed_loop.fit_tac import fit_tac

    asked = common(job, pipe, quantized)
    seconds = {}

    def timed(name: str, make: Any) -> Any:
        began = time.perf_counter()
        made = make()
        seconds[name] = time.perf_counter() - began
        return made

    record = timed("calibrate", lambda: calibrate(pipe, **asked))
    made = available(record.evidence, {})[0]
    how = {"reconstruction": Reconstruction.least_squares(), **asked}
    made["tac"] = timed("tac", lambda: fit_tac(pipe, **how))
    made["tac-ner"] = timed("tac-ner", lambda: fit_tac(pipe, input_bias=False, **how))
    made["tac-ibc"] = timed("tac-ibc", lambda: fit_tac(pipe, reconstruction=None, **asked))
    made["tac-unconditional"] = timed(
        "tac-unconditional", lambda: fit_tac(pipe, reconstruct_unconditional=True, **how)
    )
    made["stepbaq"] = timed("stepbaq", lambda: fit_stepbaq(pipe, **asked))
    made["tac-ibc+cnc+exact-drift"] = Composite(
        (made["tac-ibc"], CNC(record.evidence, per_channel=True), ExactDrift(record.evidence))
    )
    return made, seconds


def run(job: Job, work: Path) -> None:
    from evenkeel.comparing.marginal_check import marginal_check
    from evenkeel.corrections import applicable
    from evenkeel.hosts.pipeline.pipelines import run_pipeline
    from evenkeel.hosts.scheduler.interception import install, uninstall
    from evenkeel.hosts.scheduler.tape import Recorder, Tape

    setting = SETTINGS[job.setting]
    pipe = pipeline_for(setting)
    quantized = quantize_module(denoiser_of(pipe), QuantizerSpec.parse(QUANTIZERS[job.quantizer]))[
        0
    ]
    made, seconds = corrections_for(job, pipe, quantized)
    tape = Tape()
    install(pipe.scheduler, Recorder(tape))
    options = {
        "num_inference_steps": setting.steps,
        "guidance_scale": GUIDANCE,
        "call": dict(setting.call),
    }
    run_pipeline(pipe, sample_prompts(1, 0), [0], output_type="latent", **options)
    uninstall(pipe.scheduler)
    assert tape.law is not None
    found, reasons = applicable(made, tape.law)
    arms = [Arm(FULL_PRECISION, pipe.transformer), Arm(QUANTIZED, quantized)]
    arms += [Arm(name, quantized, correction) for name, correction in found.items()]
    began = time.perf_counter()
    check = marginal_check(
        pipe,
        arms,
        prompts=sample_prompts(CHECK_PROMPTS, 2),
        batch_size=32,
        progress=False,
        **options,
    )
    seconds["marginal check"] = time.perf_counter() - began
    prompts = sample_prompts(job.images, 1)
    comparison = compare(
        pipe,
        arms,
        prompts=prompts,
        batch_size=100,
        evaluator=HandwritingEvaluator(zoo.path_of("pixart-sigma")),
        reference_images=reference_images(prompts, 1),
        folder=_folder(job, work),
        progress=False,
        **options,
    )
    results = {
        "job": vars(job),
        "arms": [a.as_dict() for a in comparison.arms],
        "not applicable": reasons,
        "check": _without_curves(check.as_dict()),
        "seconds": seconds,
        "torch_threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{job.name}.json").write_text(json.dumps(results) + "\n")


def _without_curves(check: dict[str, Any]) -> dict[str, Any]:
    """Verdicts and scores; curves over steps are ten times as long and no table reads them."""
    arms = [{k: v for k, v in arm.items() if k != "curves"} for arm in check["arms"]]
    return {k: v for k, v in check.items() if k != "quantized"} | {"arms": arms}


def _folder(job: Job, work: Path) -> Path:
    """Where a job keeps its images; full precision is shared by the quantizers."""
    folder = work / job.name
    shared = work / f"{job.setting}-{job.images}" / FULL_PRECISION
    shared.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / FULL_PRECISION
    if not link.exists():
        link.symlink_to(shared.resolve())
    return folder


def start(job: Job, work: Path) -> None:
    """The two arms that no correction is in, ahead of time."""
    setting = SETTINGS[job.setting]
    pipe = pipeline_for(setting)
    quantized = quantize_module(denoiser_of(pipe), QuantizerSpec.parse(QUANTIZERS[job.quantizer]))[
        0
    ]
    compare(
        pipe,
        [Arm(FULL_PRECISION, pipe.transformer), Arm(QUANTIZED, quantized)],
        prompts=sample_prompts(job.images, 1),
        num_inference_steps=setting.steps,
        guidance_scale=GUIDANCE,
        call=dict(setting.call),
        batch_size=100,
        folder=_folder(job, work),
        progress=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", help="names, or their beginnings; all without")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/corrections"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--start", action="store_true", help="only the uncorrected arms")
    options = parser.parse_args()
    if options.list:
        print("\n".join(j.name for j in JOBS))
        return
    chosen = [j for j in JOBS if not options.jobs or j.name.startswith(tuple(options.jobs))]
    for job in [] if options.table else chosen:
        if options.start:
            start(job, options.work)
        elif not (RESULTS / f"{job.name}.json").exists():
            run(job, options.work)
    if not options.start:
        from corrections_table import write_table

        write_table(JOBS, RESULTS, HERE / "CORRECTIONS.md")


if __name__ == "__main__":
    main()
