"""What every command may write over: its own kind of file, and nothing else."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evenkeel.storage import FileOutput, FolderOutput

    Outputs = list[tuple[str, FileOutput | FolderOutput]]


def output(parser: argparse.ArgumentParser, found: Callable[[], Outputs], **described: Any) -> None:
    """``--out`` and ``--force``.

    Args:
        parser: of the command.
        found: places below ``--out`` ("" is that itself), and what is written there.
        described: of ``--out``, as ``add_argument`` takes it.

    """
    parser.add_argument("--out", type=Path, **described)
    parser.add_argument(
        "--force", action="store_true", help="replace what is there and is not this command's own"
    )
    parser.set_defaults(outputs=found)


def try_outputs(options: argparse.Namespace) -> None:
    """Before any work: everything that will be written can be, and is nobody else's.

    Raises:
        StorageError: names the place, and what is there.

    """
    found = getattr(options, "outputs", None)
    if found is None or os.environ.get("RANK", "0") != "0":  # of several processes one writes
        return
    for below, place in found():
        place.check(options.out / below, options.force)
    if getattr(options, "resume", None) is not None:
        from evenkeel.storage import check_folder

        check_folder(options.resume)


def file_of(name: str) -> Outputs:
    """A record, a readout, ..."""
    from evenkeel.storage import FileOutput, kind_of

    return [("", FileOutput(name, lambda path: kind_of(path) == name))]


def record() -> Outputs:
    """What calibrate writes."""
    return file_of("record")


def readout() -> Outputs:
    """What readout writes."""
    return file_of("readout")


def lora() -> Outputs:
    """What export writes."""
    from evenkeel.record.lora_file import is_ours
    from evenkeel.storage import FileOutput

    return [("", FileOutput("LoRA", is_ours))]


def denoiser() -> Outputs:
    """What refit, fold and quantize write, whoever quantized it."""
    from evenkeel.fitting.bits.layouts import LAYOUTS
    from evenkeel.fitting.bits.report import FILE, KIND
    from evenkeel.quantizers.saved import folder
    from evenkeel.quantizers.saved.foreign_folder import FOREIGN
    from evenkeel.storage import FolderOutput

    files = tuple(layout.file for layout in LAYOUTS.values())
    return [
        ("", FolderOutput(folder.KIND, (folder.TENSORS,))),
        ("", FolderOutput(FOREIGN, ("config.json", "diffusion_pytorch_model*"))),
        ("", FolderOutput(KIND, files, FILE, also=(folder.KIND,))),
    ]


def pictures() -> Outputs:
    """What sample writes."""
    from evenkeel.cli.pictures import PICTURES
    from evenkeel.storage import FolderOutput

    return [("", FolderOutput(PICTURES, ("[0-9][0-9][0-9][0-9][0-9]*.png", "prompts.txt")))]


def comparison() -> Outputs:
    """What compare writes."""
    from evenkeel.reports.save import COMPARISON
    from evenkeel.storage import FolderOutput

    return [("", FolderOutput(COMPARISON, ("results.json", "report.html")))]


def restored() -> Outputs:
    """What restore writes."""
    from evenkeel.record.correction_file import RESTORED
    from evenkeel.storage import FolderOutput

    names = ("*.safetensors", "README.md", "results.json", "report.html", "adapter_config.json")
    return [("", FolderOutput(RESTORED, (*names, "quantized/*")))]


def demonstration() -> Outputs:
    """What demo writes."""
    return [
        *comparison(),
        ("record.safetensors", record()[0][1]),
        ("restored", restored()[0][1]),
    ]
