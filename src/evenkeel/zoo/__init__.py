"""Small trained twins of the papers' models, as real diffusers pipelines, with data and evaluators."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenkeel.errors import EvenkeelError

FOLDER_VARIABLE = "EVENKEEL_ZOO"


@dataclass(frozen=True, slots=True)
class Twin:
    """One pipeline of the zoo and the settings of its original.

    Attributes:
        name: as in ``zoo:NAME``.
        original: the model it is a twin of.
        num_inference_steps, guidance_scale: of the original's default inference.

    """

    name: str
    original: str
    num_inference_steps: int
    guidance_scale: float


TWINS = {"pixart-sigma": Twin("pixart-sigma", "PixArt-Sigma", 20, 4.5)}


def twin(name: str) -> Twin:
    """The twin of that name.

    Raises:
        EvenkeelError: unknown; lists what there is.

    >>> twin("pixart-sigma").num_inference_steps
    20

    """
    if name not in TWINS:
        raise EvenkeelError(f"no twin called {name!r} in the zoo; there is {', '.join(TWINS)}.")
    return TWINS[name]


def path_of(name: str) -> Path:
    """The twin's folder: in the package, or in the folder that EVENKEEL_ZOO names."""
    twin(name)
    places = [Path(__file__).parent / "weights" / name]
    if os.environ.get(FOLDER_VARIABLE):
        places.insert(0, Path(os.environ[FOLDER_VARIABLE]) / name)
    for place in places:
        if (place / "model_index.json").is_file():
            return place
    raise EvenkeelError(
        f"the weights of {name} are in none of {[str(p) for p in places]}; train them with "
        f"python -m evenkeel.zoo.train {name}, or set {FOLDER_VARIABLE}."
    )


def load(name: str) -> Any:
    """The pipeline, as ``DiffusionPipeline.from_pretrained`` loads any other, in evaluation mode."""
    from evenkeel.hosts.pipelines import load as load_pipeline

    return load_pipeline(path_of(name), local_files_only=True)
