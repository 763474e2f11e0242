"""Small trained twins of the papers' models, as real diffusers pipelines, with data and evaluators."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evenkeel.errors import EvenkeelError
from evenkeel.zoo.parts import EVALUATOR_FILE as EVALUATOR_FILE
from evenkeel.zoo.parts import TWIN_FILE as TWIN_FILE
from evenkeel.zoo.parts import complete, signed
from evenkeel.zoo.registry import TWINS as TWINS
from evenkeel.zoo.registry import Sampler as Sampler
from evenkeel.zoo.registry import Twin as Twin
from evenkeel.zoo.registry import twin as twin

FOLDER_VARIABLE = "EVENKEEL_ZOO"


def places_of(name: str) -> list[Path]:
    """Where the twin's folder may be: in that of EVENKEEL_ZOO, in the package, in a checkout's zoo/."""
    here = Path(__file__).resolve()
    places = [here.parent / "weights" / name]
    checkout = here.parents[3]
    if (checkout / "pyproject.toml").is_file():  # not where the package is installed
        places.append(checkout / "zoo" / name)
    if os.environ.get(FOLDER_VARIABLE):
        places.insert(0, Path(os.environ[FOLDER_VARIABLE]) / name)
    return places


def find(name: str) -> Path | None:
    """The twin's folder, as it lies there; None where its weights are in none of its places."""
    twin(name)
    return next((p for p in places_of(name) if (p / "model_index.json").is_file()), None)


def path_of(name: str) -> Path:
    """The twin's folder, complete: networks that it shares with others are laid into it.

    Raises:
        EvenkeelError: no such twin, or its weights are nowhere; says where they were looked for.
        StorageError: a file of it is missing or was changed.

    """
    place = find(name)
    if place is None:
        raise EvenkeelError(
            f"the weights of {name} are in none of {[str(p) for p in places_of(name)]}. An installed "
            f"package carries pixart-sigma alone; the others are in the folder zoo/ of a checkout of "
            f"the repository: name it in {FOLDER_VARIABLE}, or train the twin with python -m "
            f"evenkeel.zoo.making.train {name}."
        )
    signed(complete(place))
    return place


def load(name: str, scheduler: str | None = None, dtype: Any = None) -> Any:
    """The pipeline, as ``DiffusionPipeline.from_pretrained`` loads any other, in evaluation mode.

    Args:
        name: of the twin.
        scheduler: another of its original's samplers (``twin(name).schedulers``).
        dtype: of all networks, whatever they were saved in; float32 without.

    Raises:
        EvenkeelError: no such twin or scheduler, or no weights.

    """
    from evenkeel.hosts.scheduler.schedulers import change_scheduler

    chosen = None if scheduler is None else twin(name).sampler(scheduler)
    pipeline = load_folder(path_of(name), dtype)
    if chosen is not None:
        change_scheduler(pipeline, chosen.scheduler, **chosen.changes)
    return pipeline


def load_folder(folder: Path, dtype: Any = None) -> Any:
    """The pipeline in a twin's folder, its networks in ``dtype`` (float32 without)."""
    import torch

    from evenkeel.hosts.pipeline.pipelines import load as load_pipeline

    return load_pipeline(folder, local_files_only=True, torch_dtype=dtype or torch.float32)
