"""``python -m evenkeel.zoo.making.train NAME``: from data to a saved pipeline.

Each network of the twin is trained in a folder of its own below ``--work`` and continues there after a
kill; networks that twins share, and the teachers of the distilled ones, are trained first where they
are missing. The saved folder loads with ``diffusers.DiffusionPipeline.from_pretrained``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evenkeel import zoo
from evenkeel.errors import EvenkeelError
from evenkeel.storage import read_json, write_atomically
from evenkeel.zoo.making.evaluators import train_evaluator
from evenkeel.zoo.making.loop import RUN
from evenkeel.zoo.making.sharing import SHARED, share
from evenkeel.zoo.parts import halved, sign

EMBEDDED = "pixart-sigma"


def train(name: str, work: Path) -> Path:
    """Train the twin of that name and what it is made from; returns the pipeline's folder.

    Args:
        name: of the twin.
        work: folder of all runs; this twin's are in ``work / name``.

    """
    twin = zoo.twin(name)
    place, out = work / name, work / name / "pipeline"
    place.mkdir(parents=True, exist_ok=True)
    module, function = twin.maker.split(":")
    make = getattr(importlib.import_module(f"evenkeel.zoo.making.twins.{module}"), function)
    if twin.teacher is None:
        make(place, out)
    else:
        taught = work / twin.teacher / "pipeline"
        if not (taught / "model_index.json").is_file():
            taught = train(twin.teacher, work)
        make(place, out, zoo.load_folder(taught))
    if name != EMBEDDED:  # what was measured on it was measured in single precision
        _halve(out)
    _bring_evaluator(name, work, out)
    runs = [place, *(work / SHARED / x for x in twin.shares)]
    if twin.pictures == "scenes":
        runs.append(work / SHARED / "evaluator")
    described = _describe(name, runs, out)
    write_atomically(out / "training.json", json.dumps(described, indent=1) + "\n")
    sign(out, name, twin.pictures)
    return out


def _halve(folder: Path) -> None:
    """Weights in half precision: half the size, and pictures that differ by less than 8 bits show."""
    for path in folder.glob("*/*.safetensors"):
        write_atomically(path, halved(path.read_bytes()))


def _bring_evaluator(name: str, work: Path, out: Path) -> None:
    from safetensors.torch import save

    path = out / zoo.EVALUATOR_FILE
    if zoo.twin(name).pictures == "scenes":
        network, _ = train_evaluator(work / SHARED)
        write_atomically(path, halved(save(network.state_dict())))
    elif not path.is_file():  # a maker can bring its own
        shutil.copy(zoo.path_of(EMBEDDED) / zoo.EVALUATOR_FILE, path)


def _describe(name: str, runs: list[Path], out: Path) -> dict[str, Any]:
    """Command, machine, and the recipe and time of every network; copies the loss curves."""
    networks = {}
    for curve in sorted(p for run in runs for p in run.rglob("loss.jsonl")):
        recipe = read_json(curve.parent / "recipe.json", RUN)["recipe"]
        networks[curve.parent.name] = {
            "recipe": recipe,
            "last": json.loads(curve.read_text().splitlines()[-1]),
        }
        shutil.copy(curve, out / f"loss-{curve.parent.name}.jsonl")
    cuda = torch.cuda.is_available()
    return {
        "command": f"python -m evenkeel.zoo.making.train {name}",
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "networks": networks,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train; returns the exit code, as of every command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(zoo.TWINS))
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"), help="folder of all runs")
    parser.add_argument(
        "--out", type=Path, default=Path("zoo"), help="the twin's folder is made in here"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # is Ctrl-C
    try:
        made = train(options.name, options.work)
        place = shutil.copytree(made, options.out / options.name, dirs_exist_ok=True)
        share(place)
    except KeyboardInterrupt:
        kept = f"what was trained is kept in {options.work}; the same command continues"
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130
    except (EvenkeelError, OSError) as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 1
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
