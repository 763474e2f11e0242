"""The folder that ``restore`` writes: adapters in both forms, model card, numbers, pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from evenkeel.comparing.restore import Restored
from evenkeel.hosts.recognition import RECOGNITION, recognition
from evenkeel.quantizers import save_quantized
from evenkeel.record import save
from evenkeel.record.correction_file import RESTORED
from evenkeel.record.lora_file import FILE, peft_files, write_lora
from evenkeel.reports.adapter_card import card, hub_id
from evenkeel.reports.html import write_report
from evenkeel.storage import json_safe, valid_json, workplace, write_folder

SHOWN = 64
QUANTIZED = "quantized"  # folder of a refitted denoiser


def write_restored(
    folder: str | os.PathLike[str],
    found: Restored,
    settings: dict[str, Any],
    prompts: list[str],
    denoiser: nn.Module | None = None,
) -> Path:
    """All files at once, whole or not at all; ``evenkeel.load(folder)`` gives the correction back.

    A refitted denoiser stands beside them in ``quantized``.

    Args:
        folder: made if missing.
        found: with at least one part, or a refitted denoiser.
        settings: of the run, for card and report.
        prompts: of the images that were measured.
        denoiser: the quantized one that the adapters stand beside; other programs recognise it by what
            is kept of it in ``recognition.json``.

    """
    results = json_safe({"settings": settings, **found.as_dict()})
    files: dict[str, Any] = {
        f"{part.name}.safetensors": partial(_saved, part) for part in found.parts
    }
    named = getattr(diffusers, found.adapters.provenance.pipeline_class, None)
    loader = hasattr(named, "load_lora_weights")
    if found.adapters.layers and loader:
        files[FILE] = partial(_lora, found)
    elif found.adapters.layers:
        files |= peft_files(found.adapters, hub_id(settings["pipeline"]))
    if denoiser is not None and found.adapters.layers:
        known = recognition(denoiser, [layer.name for layer in found.adapters.layers])
        files[RECOGNITION] = valid_json(known) + "\n"
    files["README.md"] = card(found, settings, loader=loader)
    files["results.json"] = valid_json(results, indent=1) + "\n"
    report = _report(found, settings, prompts)
    if report is not None:
        files["report.html"] = report
    header = {"parts": [part.name for part in found.parts]}
    with workplace(folder) as inside:
        if found.refitted is not None:
            made = save_quantized(found.refitted, inside)
            files |= {f"{QUANTIZED}/{p.name}": partial(os.replace, p) for p in made.iterdir()}
        return write_folder(folder, RESTORED, header, files)


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
