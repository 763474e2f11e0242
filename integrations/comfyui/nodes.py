"""The four nodes: what they are called, what goes in, what comes out."""

from __future__ import annotations

import os
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io, ui

import evenkeel
from evenkeel.corrections import Readout
from evenkeel.corrections.catalogue import ALL, EVIDENCE, FORMS, root_of
from evenkeel.errors import Incompatible
from evenkeel.record import Record

from .correct import correct
from .inspection import picture, text
from .readout import apply_readout
from .recover import recover

FOLDER = "evenkeel"
CATEGORY = "model_patches/evenkeel"
CORRECTIONS = [n for n in ALL | FORMS if root_of(n) == EVIDENCE and n != "qncd"]

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def _files() -> list[str]:
    found = folder_paths.get_filename_list(FOLDER)
    return [name for name in found if name.endswith(".safetensors")]


def _file() -> Any:
    return io.Combo.Input("file", options=_files(), tooltip=f"in ComfyUI/models/{FOLDER}")


def _opened(name: str, kind: type, made_by: str) -> Any:
    found = evenkeel.load(folder_paths.get_full_path_or_raise(FOLDER, name))
    if not isinstance(found, kind):
        raise Incompatible(
            f"{name} holds a {type(found).__name__}, expected a {kind.__name__}: what {made_by} writes."
        )
    return found


class EvenkeelRecover(io.ComfyNode):
    """Recovery adapters beside quantized layers."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="EvenkeelRecover",
            display_name="Evenkeel Recover",
            category=CATEGORY,
            description="Recovery adapters beside the quantized layers they were fitted for.",
            inputs=[
                io.Model.Input("model"),
                _file(),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01),
                io.Boolean.Input(
                    "check_base",
                    default=True,
                    tooltip="refuse a model that is not the quantized one the adapters were fitted for",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, file: str, strength: float, check_base: bool) -> Any:
        """A patched clone."""
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        return io.NodeOutput(recover(model, path, strength, check_base))


class EvenkeelCorrect(io.ComfyNode):
    """A correction of the sampler, from a record."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="EvenkeelCorrect",
            display_name="Evenkeel Correct",
            category=CATEGORY,
            description="Change what the sampler does at each sigma, as a calibration record says.",
            inputs=[
                io.Model.Input("model"),
                _file(),
                io.Combo.Input("correction", options=CORRECTIONS, default="exact-drift"),
                io.Boolean.Input(
                    "allow_range",
                    default=False,
                    tooltip="leave steps outside the calibrated noise levels alone",
                ),
                io.Boolean.Input(
                    "check_guidance",
                    default=True,
                    tooltip="refuse another cfg than the calibrated one",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, file: str, correction: str, allow_range: bool, check_guidance: bool
    ) -> Any:
        """A patched clone."""
        record = _opened(file, Record, "evenkeel calibrate")
        made, reasons = record.corrections()
        if correction not in made:
            entry = FORMS.get(correction)
            if entry is None:
                raise Incompatible(f"{file} allows no {correction}: {reasons[correction]}")
            made[correction] = entry.make(record.evidence)
        chosen, made_for = made[correction], record.provenance
        return io.NodeOutput(correct(model, chosen, made_for, allow_range, check_guidance))


class EvenkeelReadout(io.ComfyNode):
    """An output head per noise level."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="EvenkeelReadout",
            display_name="Evenkeel Readout",
            category=CATEGORY,
            description="Another output layer at each sigma, as evenkeel readout fitted it.",
            inputs=[
                io.Model.Input("model"),
                _file(),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01),
                io.Boolean.Input(
                    "allow_range",
                    default=False,
                    tooltip="keep the original head outside the fitted noise levels",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, file: str, strength: float, allow_range: bool) -> Any:
        """A patched clone."""
        readout = _opened(file, Readout, "evenkeel readout")
        return io.NodeOutput(apply_readout(model, readout, strength, allow_range))


class EvenkeelInspect(io.ComfyNode):
    """What a file says."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="EvenkeelInspect",
            display_name="Evenkeel Inspect",
            category=CATEGORY,
            description="What a record, a readout or adapters say of themselves, as text and picture.",
            inputs=[_file()],
            outputs=[io.String.Output("text"), io.Image.Output("picture")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, file: str) -> Any:
        """Text and picture."""
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        said = text(path)
        return io.NodeOutput(said, picture(path), ui=ui.PreviewText(said))


class EvenkeelExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return [EvenkeelRecover, EvenkeelCorrect, EvenkeelReadout, EvenkeelInspect]


async def comfy_entrypoint() -> EvenkeelExtension:
    """Where ComfyUI begins."""
    return EvenkeelExtension()
