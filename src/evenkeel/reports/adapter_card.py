"""The model card of the folder that ``restore`` writes, as the hub wants it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from evenkeel.comparing.restore import RESTORED, Restored
from evenkeel.record.lora_file import FILE

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hub_id(source: str) -> str | None:
    """A source that names a repository of the hub, and no file or folder here.

    >>> hub_id("black-forest-labs/FLUX.1-dev"), hub_id("zoo:pixart-sigma")
    ('black-forest-labs/FLUX.1-dev', None)

    """
    return source if _HUB_ID.fullmatch(source) and not Path(source).exists() else None


def card(found: Restored, settings: dict[str, Any], *, loader: bool) -> str:
    """Metadata, what it is for, what was measured, and the lines that load it.

    Args:
        found: with at least one part.
        settings: of the run.
        loader: whether diffusers loads a LoRA into this pipeline.

    """
    made_for = found.adapters.provenance
    lines = [
        *_metadata(found, settings, loader),
        "",
        "# Recovery adapters",
        "",
        f"{found.sentence[0].upper()}{found.sentence[1:]}.",
        "",
        f"- pipeline: `{settings['pipeline']}`, a {made_for.pipeline_class}",
        f"- full-precision {made_for.denoiser}: `{made_for.reference}`",
        f"- quantized {made_for.denoiser}: `{settings['quantized']}`, `{made_for.quantizer}`, "
        f"`{made_for.quantized}`",
        *_refitted(found),
        f"- fitted on {found.report.prompts} prompts, {made_for.num_inference_steps} steps of "
        f"{made_for.scheduler_class}, guidance {made_for.guidance_scale}, seed {settings['seed']}",
        *_sizes(found),
        "",
        "**Never merge it.** Fused into the weights and quantized again, 84 to 118 % of what it brings was "
        "lost wherever that was measured. It belongs beside this quantized network and no other.",
        "",
        f"## Measured on {settings.get('unseen', 'prompts and noise')} that the fit has not seen",
        "",
        *_measured(found),
        "",
        *_with_evenkeel(made_for.denoiser),
    ]
    if found.adapters.layers:
        lines += ["", *_without(made_for.denoiser, loader)]
    return "\n".join([*lines, ""])


def _metadata(found: Restored, settings: dict[str, Any], loader: bool) -> list[str]:
    """YAML; a base model is named only where the hub has it, which refuses other names."""
    bases = [base for key in ("pipeline", "quantized") if (base := hub_id(settings[key]))]
    named = [f"base_model: {json.dumps(bases)}", "base_model_relation: adapter"] if bases else []
    kind = ["lora"] if found.adapters.layers else []
    return [
        "---",
        f"library_name: {'diffusers' if loader or not kind else 'peft'}",
        *named,
        f"tags: [{', '.join(['evenkeel', *kind, 'quantization', 'recovery-adapter'])}]",
        "---",
    ]


def _refitted(found: Restored) -> list[str]:
    """Where the denoiser is that all of it belongs to, if it is not the given one."""
    if found.refitted is None:
        return []
    return [
        "- its low-rank branches are refitted: load the denoiser in `quantized/` of this folder"
    ]


def _sizes(found: Restored) -> list[str]:
    """Bytes on disk and in memory, in both forms."""
    adapters, whole = found.adapters, found.report.quantized_bytes
    if not adapters.layers:
        return []
    factors = [factor for a in adapters.layers for factor in (a.down, a.up)]
    plain = sum(2 * f.rank * f.width for f in factors)

    def said(size: int) -> str:
        return f"{size / 1e6:.3f} MB (+{100 * size / whole:.1f} %)"

    return [
        f"- {adapters.report}",
        f"- of the quantized denoiser's {whole / 1e6:.3f} MB: packed {said(adapters.stored_bytes)} on disk "
        f"and in memory; as a plain LoRA of 16 bits {said(plain)} "
        f"on disk and in memory, twice that where a loader widens it to float32",
    ]


def _measured(found: Restored) -> list[str]:
    lines = [
        "| steps | images | PSNR quantized, dB | with this, dB | difference [95 %] |",
        "|---|---|---|---|---|",
    ]
    for steps, comparison in found.measured.items():
        before, after = (comparison[n].measures["psnr"] for n in ("quantized", RESTORED))
        change = comparison[RESTORED].difference_to_quantized["psnr"]
        lines.append(
            f"| {steps} | {change.n} | {before.value:.2f} | {after.value:.2f} | {change.value:+.2f} "
            f"[{change.low:+.2f}, {change.high:+.2f}] |"
        )
    return lines + [f"\nAt {steps} steps: {why}" for steps, why in found.unmeasured.items()]


def _with_evenkeel(denoiser: str) -> list[str]:
    return [
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


def _without(denoiser: str, loader: bool) -> list[str]:
    """The lines for everybody else's loaders."""
    load = [f"Without it, diffusers loads `{FILE}`:"]
    code = [f"pipe.{denoiser} = quantized", 'pipe.load_lora_weights("restored")']
    if not loader:
        load = [
            "Without it, peft loads this folder (diffusers has no LoRA loader for this pipeline):"
        ]
        code = [
            "from peft import PeftModel",
            f"pipe.{denoiser} = quantized",
            f'PeftModel.from_pretrained(pipe.{denoiser}, "restored")  # adds to the layers in place',
        ]
    return [
        *load,
        "",
        "```python",
        *code,
        "```",
        "",
        "ComfyUI, with the node *Load LoRA (Bypass)*; its ordinary LoRA node dequantizes, adds and quantizes "
        "again, which loses most of it. ComfyUI-GGUF's loader adds at run time, with either node:",
        "",
        "```",
        "evenkeel export restored --layout comfyui --out ComfyUI/models/loras/restored.safetensors",
        "```",
        "",
        "stable-diffusion.cpp, in the mode that adds at run time:",
        "",
        "```",
        "evenkeel export restored --layout comfyui --out loras/restored.safetensors",
        'sd-cli --lora-model-dir loras --lora-apply-mode at_runtime -p "a cat<lora:restored:1>" ...',
        "```",
    ]
