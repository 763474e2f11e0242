"""``python -m evenkeel.zoo.making.card NAME [--images 1000]``: measure a twin and write its model card.

One page of Markdown, from what was trained and what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from evenkeel import zoo
from evenkeel.errors import EvenkeelError
from evenkeel.reports.measures import value_text
from evenkeel.storage import write_atomically
from evenkeel.zoo.folders import saved_dtypes
from evenkeel.zoo.making.quality import measure
from evenkeel.zoo.pictures import KINDS

GRID = (6, 10)
SHOWN_SIDE = 64  # of a sample in the grid, in pixels


def write_card(name: str, images: int = 1000, work: Path | None = None) -> Path:
    """Measure the twin and write quality.json, samples.png and README.md into its folder.

    Args:
        name: of the twin.
        images: how many samples to measure with; twice as many take twice as long.
        work: where finished batches are kept, so that a killed run continues.

    Returns:
        The card, README.md.

    Raises:
        EvenkeelError: no such twin, no weights, or no training.json beside them.

    """
    twin, folder = zoo.twin(name), zoo.path_of(name)
    training = training_of(folder)
    quality, samples = measure(twin, images, work)
    write_atomically(folder / "quality.json", json.dumps(quality, indent=1) + "\n")
    _write_grid(samples, folder / "samples.png")
    text = card(twin, parameters(zoo.load(name)), saved_dtypes(folder), training, quality)
    return write_atomically(folder / "README.md", text)


def training_of(folder: Path) -> dict[str, Any]:
    """What the training command noted about itself: command, machine, torch, and its networks.

    Raises:
        EvenkeelError: no training.json, or it does not say these.

    """
    file = folder / "training.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as e:
        raise EvenkeelError(
            f"{file} cannot be read ({e}); python -m evenkeel.zoo.making.train writes it beside the weights."
        ) from e
    expected = {"command", "machine", "torch"}
    if not isinstance(found, dict) or not expected <= set(found):
        raise EvenkeelError(
            f"{file} does not say {', '.join(sorted(expected))}; train the twin again."
        )
    return found


def parameters(pipeline: Any) -> dict[str, tuple[str, int]]:
    """Class and number of parameters of every network of a pipeline."""
    return {
        name: (type(part).__name__, sum(p.numel() for p in part.parameters()))
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }


def card(
    twin: zoo.Twin,
    networks: Mapping[str, tuple[str, int]],
    dtypes: Sequence[str],
    training: Mapping[str, Any],
    quality: Mapping[str, Any],
) -> str:
    """The Markdown text."""
    kind = KINDS[twin.pictures]
    sections = [
        f"# {twin.name}: a twin of {twin.original}",
        f"diffusers' own `{twin.pipeline}` with small networks trained on {kind.trained_on}. "
        f"`DiffusionPipeline.from_pretrained` loads the folder that `evenkeel zoo path {twin.name}` "
        f"prints; so does `evenkeel ... zoo:{twin.name}`. "
        f"Weights are stored in {', '.join(dtypes)} and were measured in single precision.",
        _table(("network", "class", "parameters"), _network_rows(networks)),
        f"**Data.** {kind.data} Pictures show {kind.shows}.",
        f"**Inference.** {_inference(twin)}",
        f"**Training.** {_training(training)}",
        _table(("network", "steps", "rate", "seed", "minutes"), _recipe_rows(training)),
        "**Differences from the original**, besides size and data:\n\n"
        + "\n".join(f"- {line};" for line in twin.differences)[:-1]
        + ".",
        _quality_text(quality, *kind.held_out),
        _table(("", "samples", kind.held_out[0]), _quality_rows(quality, kind.held_out[0])),
        _samplers(quality),
        _few_steps(twin.name, quality),
        _speed(quality),
        f"![samples](samples.png)\n\n{_samples_text(quality)}",
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def _network_rows(networks: Mapping[str, tuple[str, int]]) -> list[tuple[str, ...]]:
    return [(name, f"`{kind}`", f"{count:,}") for name, (kind, count) in networks.items()]


def _inference(twin: zoo.Twin) -> str:
    names = [f"{s} (`{x.scheduler}`)" for s, x in twin.schedulers.items()]
    guidance = "no guidance" if twin.guidance_scale is None else f"guidance {twin.guidance_scale}"
    others = f"; the original's other samplers: {', '.join(names[1:])}" if names[1:] else ""
    return f"{twin.num_inference_steps} steps, {guidance}, {names[0]}{others}."


def _training(training: Mapping[str, Any]) -> str:
    seconds = [network["last"]["seconds"] for network in _networks(training).values()]
    return (
        f"`{training['command']}` on {training['machine']}, torch {training['torch']}"
        + (f"; {sum(seconds) / 60:.0f} minutes in all." if seconds else ".")
        + " Loss curves in `loss-*.jsonl`."
    )


def _networks(training: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = training.get("networks", {})
    return found


def _recipe_rows(training: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, network in _networks(training).items():
        recipe, minutes = network["recipe"], network["last"]["seconds"] / 60
        settings = (f"{recipe[k]:,g}" for k in ("steps", "learning_rate", "seed"))
        rows.append((name, *settings, f"{minutes:.1f}"))
    return rows


def _quality_text(quality: Mapping[str, Any], held_out: str, training: str) -> str:
    judged = (
        "Shares of the prompts that ask for it, according to the evaluator, which was trained on the "
        f"{training} alone."
        if "shown_by_samples" in quality
        else "Nothing is asked for, so nothing can be wrong; as a stand-in, *recognisable* is a sample of "
        "whose digit the evaluator is at least as sure as of all but 5 % of the held-out pictures."
    )
    return (
        f"**Quality** (`{quality['command']}`; `quality.json`). {judged} Fréchet distances are between "
        f"{quality['images']:,} pictures each, in the evaluator's features; in the right column between two "
        f"sets of pictures of {held_out}. Pictures of the {training} themselves are at "
        f"{value_text(quality['frechet_training_to_held_out'])}. All values ± standard error."
    )


def _quality_rows(quality: Mapping[str, Any], held_out: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if "shown_by_samples" in quality:
        for name, share in quality["shown_by_samples"].items():
            rows.append((name, _percent(share), _percent(quality["shown_by_held_out_scans"][name])))
    else:
        both = quality["recognisable_samples"], quality["recognisable_held_out_scans"]
        rows.append(("recognisable", *map(_percent, both)))
    rows.append(
        (
            f"Fréchet distance to {held_out}",
            value_text(quality["frechet_samples_to_held_out"]),
            value_text(quality["frechet_held_out_to_held_out"]),
        )
    )
    return rows


def _samplers(quality: Mapping[str, Any]) -> str:
    """The original's other samplers."""
    found = quality["samplers"]
    if not found:
        return ""
    measured = "what prompts ask for" if "shown_by_samples" in quality else "recognisable samples"
    shares = [f"{name} {_percent(each['alignment'])}" for name, each in found.items()]
    count = next(iter(found.values()))["alignment"]["n"]
    return (
        f"**The original's other samplers**, same steps and guidance, share of {measured} "
        f"({count} images): {', '.join(shares)}."
    )


def _few_steps(name: str, quality: Mapping[str, Any]) -> str:
    """A distilled twin beside its teacher."""
    if "few_steps" not in quality:
        return ""
    teacher = quality["teacher"]
    rows = []
    for row in quality["few_steps"]:
        both = row["student"], row["teacher"]
        aligned = [_percent(b["alignment"]) for b in both]
        distances = [value_text(b["frechet_to_held_out"]) for b in both]
        rows.append((str(row["steps"]), *aligned, *distances))
    about = (
        f"**Distilled from {teacher}.** With the same few steps, prompts and noise, each with its own "
        "sampler and guidance: share of what the prompts ask for that the samples show, and Fréchet "
        "distance to held-out scans."
    )
    head = (
        "steps",
        f"{name} shows",
        f"{teacher} shows",
        f"{name}, distance",
        f"{teacher}, distance",
    )
    return f"{about}\n\n{_table(head, rows)}"


def _percent(share: Mapping[str, Any]) -> str:
    if not share["stderr"]:
        return f"{100 * share['value']:.0f} %"
    return f"{100 * share['value']:.1f} ± {100 * share['stderr']:.1f} %"


def _speed(quality: Mapping[str, Any]) -> str:
    speed = quality["seconds_per_image_and_step"]
    low, high = (1000 * speed[k] for k in ("fastest", "slowest"))
    return (
        f"**Speed.** {1000 * speed['value']:.2f} ms per picture and step, decoding included, in batches of "
        f"{speed['batch']} (fastest and slowest batch: {low:.2f}, {high:.2f}), where this card was written."
    )


def _samples_text(quality: Mapping[str, Any]) -> str:
    rows, columns = GRID
    first = quality["first_prompts"]
    lines = [f"{r + 1}. {'; '.join(first[r * columns : (r + 1) * columns])}" for r in range(rows)]
    if "shown_by_samples" not in quality:
        return "The first 60 samples."
    return "The first 60 samples. Asked for, row by row:\n\n" + "\n".join(lines)


def _write_grid(samples: Any, file: Path) -> None:
    from PIL import Image

    rows, columns = GRID
    side = samples.shape[-1]
    grid = samples[: rows * columns].reshape(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)
    picture = Image.fromarray(grid.reshape(rows * side, columns * side, 3).contiguous().numpy())
    picture = picture.resize((columns * SHOWN_SIDE, rows * SHOWN_SIDE), 0)
    # Soft backgrounds would get bands in 256 colours.
    picture = fewer_colours(picture) if side < SHOWN_SIDE else fewer_shades(picture)
    picture.save(file, optimize=True)


def fewer_colours(picture: Any) -> Any:
    """A picture for people in 256 colours: a third of the size in a repository that everyone clones."""
    return picture.convert("RGB").quantize(256, dither=0)


def fewer_shades(picture: Any) -> Any:
    """64 shades of red, green and blue instead of 256, which nobody sees: half the size."""
    return picture.convert("RGB").point(lambda v: min(v + 2, 255) & 0xFC)


def main() -> int:
    """Parse the command line and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(zoo.TWINS))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--work", type=Path, help="keep finished batches here (default: nowhere)")
    options = parser.parse_args()
    try:
        print(write_card(options.name, options.images, options.work))
    except EvenkeelError as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
