"""The demo: the embedded pipeline with weights of 3 bits, calibrated, restored, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evenkeel import zoo
from evenkeel.comparing.comparison import compare, standard_arms
from evenkeel.comparing.restore import RESTORED, restore
from evenkeel.corrections import QDrift
from evenkeel.fitting import calibrate
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reports.restored import write_restored
from evenkeel.reports.save import save_results
from evenkeel.zoo.evaluation import HandwritingEvaluator, reference_images, sample_prompts

CALIBRATION_SEED, COMPARISON_SEED = 0, 1
BUDGET = 0.11  # of the quantized denoiser's bytes


def demo(
    *, images: int, calibration_prompts: int, quantizer: str, out: Path, progress: bool
) -> dict[str, Any]:
    """Everything from quantizing to the report; returns the content of ``results.json``.

    Args:
        images: per arm; the same prompts and the same noise in every arm.
        calibration_prompts: other captions than the compared ones.
        quantizer: specification, for example ``w3a16-g32``.
        out: folder for report.html, results.json, the record, what restores the pipeline, and the images.
        progress: show bars.

    """
    twin = zoo.twin("pixart-sigma")
    prompts = sample_prompts(images, COMPARISON_SEED)
    references = reference_images(prompts, COMPARISON_SEED)  # first: they need an optional package
    pipeline = zoo.load(twin.name)
    spec = QuantizerSpec.parse(quantizer)
    quantized, report = quantize_module(denoiser_of(pipeline), spec)
    settings: dict[str, Any] = {
        "num_inference_steps": twin.num_inference_steps,
        "guidance_scale": twin.guidance_scale,
    }
    fitting: dict[str, Any] = {
        "prompts": sample_prompts(calibration_prompts, CALIBRATION_SEED),
        "seed": CALIBRATION_SEED,
        "batch_size": 32,
        "progress": progress,
        **settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    record = calibrate(pipeline, quantized=quantized, **fitting)
    record.save(out / "record.safetensors")
    restored = restore(pipeline, quantized=quantized, measured_on=(), budget=BUDGET, **fitting)
    if restored.parts or restored.refitted is not None:
        described = {"pipeline": f"zoo:{twin.name}", "quantized": quantizer, **settings}
        write_restored(out / RESTORED, restored, {**described, "seed": CALIBRATION_SEED}, [])
    comparison = compare(
        pipeline,
        [*standard_arms(pipeline, quantized, [QDrift(record.evidence)]), *restored.arms(quantized)],
        prompts=prompts,
        batch_size=64,
        evaluator=HandwritingEvaluator(zoo.path_of(twin.name)),
        reference_images=references,
        folder=out / "images",
        progress=progress,
        **settings,
    )
    described = {
        "pipeline": f"zoo:{twin.name}",
        "quantizer": str(spec),
        "scheduler": type(pipeline.scheduler).__name__,
        **settings,
        "images per arm": images,
        "calibration prompts": calibration_prompts,
        "calibration seed": CALIBRATION_SEED,
        "comparison seed": COMPARISON_SEED,
        "quantized layers": len(report.quantized),
        "megabytes of recovery adapters": round(restored.adapters.stored_bytes / 1e6, 3),
        "quantized megabytes": round(report.stored_bytes / 1e6, 2),
        "full-precision megabytes (16 bit)": round(report.full_precision_bytes / 1e6, 2),
    }
    return save_results(out, comparison, described, record, prompts)
