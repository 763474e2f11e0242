"""The command that writes recovery adapters for other tools: export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evenkeel.cli.options import command, say
from evenkeel.cli.outputs import lora, output

_LAYOUTS = ("peft", "kohya", "comfyui")


def add_export(commands: Any) -> None:
    """``evenkeel export``."""
    parser = command(
        commands,
        "export",
        _run_export,
        "Write the adapters that evenkeel restore fitted as a LoRA of 16 bits, with the names of the "
        "tool that loads it. What is written is the same; load it beside the quantized layers, never "
        "merge it into them.",
        example="export restored --layout comfyui --out restored-comfyui.safetensors",
    )
    parser.add_argument(
        "folder", type=Path, help="what evenkeel restore wrote, or adapters.safetensors"
    )
    parser.add_argument(
        "--layout",
        choices=_LAYOUTS,
        default="peft",
        help="names of diffusers and peft, of kohya's scripts, or of ComfyUI's models, with q, k and v in "
        "one where these have one (default: peft)",
    )
    output(parser, lora, required=True, metavar="FILE", help="a .safetensors file")


def _run_export(options: argparse.Namespace) -> None:
    from evenkeel.corrections import Composite, Correction, RecoveryAdapters
    from evenkeel.errors import RecordError
    from evenkeel.hosts.foreign_files import loading
    from evenkeel.hosts.recognition import RECOGNITION, in_comfyui
    from evenkeel.record import load
    from evenkeel.record.lora_file import write_lora
    from evenkeel.storage import parse_json

    found = load(options.folder)
    parts = found.parts if isinstance(found, Composite) else (found,)
    adapters = [part for part in parts if isinstance(part, RecoveryAdapters)]
    if not adapters:
        raise RecordError(
            f"{options.folder} holds no recovery adapters; expected what evenkeel restore wrote."
        )
    known = None
    kept = options.folder / RECOGNITION
    if options.layout == "comfyui" and kept.is_file():
        made_for = adapters[0].provenance
        with loading(str(kept), "what the denoiser is recognised by; run evenkeel restore again"):
            known = in_comfyui(parse_json(kept.read_bytes()), made_for.pipeline_class)
    write_lora(adapters[0], options.out, options.layout, known)
    left = [part.name for part in parts if part is not adapters[0] and isinstance(part, Correction)]
    size = options.out.stat().st_size
    said = {
        "out": str(options.out),
        "layout": options.layout,
        "layers": len(adapters[0].layers),
        "bytes": size,
        "left_out": left,
    }
    lines = [f"{options.out}: {len(adapters[0].layers)} layers, {size / 1e6:.3f} MB"]
    if left:
        lines.append(f"not in it, as no LoRA can hold it: {', '.join(left)}")
    lines.append(
        "load it beside the quantized layers; merged into them it loses most of what it brings"
    )
    say(options, said, "\n".join(lines))
