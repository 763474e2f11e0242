"""The folder that ``restore`` writes: adapters in both forms, model card, numbers, pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from evenkeel.comparing.restore import RESTORED as ARM
from evenkeel.comparing.restore import Restored
from evenkeel.record import save
from evenkeel.record.correction_file import RESTORED
from evenkeel.record.lora_file import FILE, write_lora
from evenkeel.reports.html import write_report
from evenkeel.storage import json_safe, write_folder

SHOWN = 12


def write_restored(
    folder: str | os.PathLike[str],
    found: Restored,
    settings: dict[str, Any],
    prompts: list[str],
) -> Path:
    """All files at once, whole or not at all; ``evenkeel.load(folder)`` gives the correction back.

    Args:
        folder: made if missing.
        found: with at least one part.
        settings: of the run, for card and report.
        prompts: of the images that were measured.

    """
    results = json_safe({"settings": settings, **found.as_dict()})
    files: dict[str, Any] = {
        f"{part.name}.safetensors": partial(_saved, part) for part in found.parts
    }
    if found.adapters.layers:
        files[FILE] = partial(_lora, found)
    files["README.md"] = card(found, settings)
    files["results.json"] = json.dumps(results, indent=1) + "\n"
    report = _report(found, settings, prompts)
    if report is not None:
        files["report.html"] = report
    return write_folder(folder, RESTORED, {"parts": [part.name for part in found.parts]}, files)


def _saved(part: Any, path: Path) -> None:
    save(part, path)


def _lora(found: Restored, path: Path) -> None:
    write_lora(found.adapters, path)


def _report(
    found: Restored, settings: dict[str, Any], prompts: list[str]
) -> Callable[[Path], Any] | None:
    """The pictures at the fitted number of steps; None where none were made."""
    comparison = next(iter(found.measured.values()), None)
    if comparison is None:
        return None
    results = json_safe(
        {
            "settings": settings,
            "arms": [arm.as_dict() for arm in comparison.arms],
            "calibration": None,
            "not_applicable": {},
        }
    )
    images = {name: pictures[:SHOWN] for name, pictures in comparison.images.items()}
    return lambda path: write_report(path, results, images, prompts[:SHOWN])


def card(found: Restored, settings: dict[str, Any]) -> str:
    """A model card as the hub wants it."""
    adapters, report = found.adapters, found.report
    made_for = adapters.provenance
    size, plain = (
        adapters.stored_bytes,
        sum(2 * a.rank * (a.down.width + a.up.width) for a in adapters.layers),
    )
    share = 100 * size / report.quantized_bytes
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [evenkeel, lora, quantization, recovery-adapter]",
        "---",
        "",
        "# Recovery adapters",
        "",
        f"{found.sentence[0].upper()}{found.sentence[1:]}.",
        "",
        f"- pipeline: `{settings['pipeline']}`, a {made_for.pipeline_class}",
        f"- full-precision {made_for.denoiser}: `{made_for.reference}`",
        f"- quantized {made_for.denoiser}: `{settings['quantized']}`, `{made_for.quantizer}`, "
        f"`{made_for.quantized}`",
        f"- fitted on {report.prompts} prompts, {made_for.num_inference_steps} steps of "
        f"{made_for.scheduler_class}, guidance {made_for.guidance_scale}, seed {settings['seed']}",
        f"- {adapters.report}",
        f"- {size / 1e6:.3f} MB packed, on disk and in memory (+{share:.1f} % of the quantized denoiser's "
        f"{report.quantized_bytes / 1e6:.3f} MB); {plain / 1e6:.3f} MB as a plain LoRA in 16 bits",
        "",
        "**Never merge it.** Fused into the weights and quantized again, 84 to 118 % of what it brings was "
        "lost wherever that was measured. It belongs beside this quantized network and no other.",
        "",
        "## Measured on prompts and noise that the fit has not seen",
        "",
        "| steps | images | PSNR quantized, dB | with this, dB | difference [95 %] |",
        "|---|---|---|---|---|",
    ]
    for steps, comparison in found.measured.items():
        before, after = (comparison[n].measures["psnr"] for n in ("quantized", ARM))
        change = comparison[ARM].difference_to_quantized["psnr"]
        lines.append(
            f"| {steps} | {change.n} | {before.value:.2f} | {after.value:.2f} | {change.value:+.2f} "
            f"[{change.low:+.2f}, {change.high:+.2f}] |"
        )
    lines += [f"\nAt {steps} steps: {why}" for steps, why in found.unmeasured.items()]
    return "\n".join([*lines, "", *_loading(found, made_for.denoiser), ""])


def _loading(found: Restored, denoiser: str) -> list[str]:
    """The lines that load it."""
    lines = [
        "## Use it",
        "",
        "With evenkeel, factors packed, everything in this folder together:",
        "",
        "```python",
        "import evenkeel",
        f"pipe.{denoiser} = quantized",
        'evenkeel.apply(pipe, evenkeel.load("restored"))',
        "```",
    ]
    if not found.adapters.layers:
        return lines
    return [
        *lines,
        "",
        f"Without it, `{FILE}` is an ordinary LoRA. Where the pipeline has a loader (FLUX, SD, SDXL, SD 3, "
        "Sana, Wan, Qwen-Image):",
        "",
        "```python",
        'pipe.load_lora_weights("restored")',
        "```",
        "",
        "Where it has none (PixArt, DiT, UNet2DModel):",
        "",
        "```python",
        "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict",
        "from evenkeel.record.lora_file import lora_config, lora_tensors",
        "",
        'adapters = evenkeel.load("restored/adapters.safetensors")',
        f"config = {{k.removeprefix('{denoiser}.'): v for k, v in lora_config(adapters).items()}}",
        f"inject_adapter_in_model(LoraConfig(**config), pipe.{denoiser})",
        f"set_peft_model_state_dict(pipe.{denoiser}, lora_tensors(adapters))",
        "```",
        "",
        "stable-diffusion.cpp and ComfyUI-GGUF add a LoRA at run time, which is right. ComfyUI's own loader "
        "dequantizes, adds and quantizes again, which is not: use its loader that bypasses the weight.",
    ]
