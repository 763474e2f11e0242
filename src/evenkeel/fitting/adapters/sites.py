"""The layers that may get an adapter, and where their rows are kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError
from evenkeel.fitting.adapters.effective_weight import rounds_inputs
from evenkeel.fitting.adapters.row_sample import RowFile, RowSample
from evenkeel.hosts.actuators.beside import shape_of
from evenkeel.hosts.actuators.head_rows import Head
from evenkeel.hosts.pipeline.offloaded import present
from evenkeel.hosts.pipeline.pipelines import uncompiled
from evenkeel.hosts.run import Run


@dataclass
class Site:
    """A layer that may get an adapter, and the rows kept of it.

    Attributes:
        head: its name and geometry.
        quantized, reference: the layer in both denoisers.
        inputs: rows that enter it.
        gradients: of random probes of the denoiser's output with respect to rows that leave it; the last
            column is the weight of the probe's step.
        outputs: what the quantized layer gives for the rows of ``inputs``; None where it is a linear map.
        dtype: of what enters it.

    """

    head: Head
    quantized: Any
    reference: Any
    inputs: RowSample
    gradients: RowSample
    outputs: RowSample | None = None
    dtype: torch.dtype = torch.float32

    def felt(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys (n,), gradients (n, O) and weights of their steps (n, 1).

        None where the output feels nothing of the layer: text queries in the last block of an MM-DiT.
        """
        keys, rows = self.gradients.sorted()
        gradients, weights = rows[:, :-1], rows[:, -1:]
        return (keys, gradients, weights) if bool(gradients.any()) else None

    @property
    def nbytes(self) -> int:
        """Of all rows kept."""
        return sum(sample.nbytes for sample in self.samples.values())

    @property
    def samples(self) -> dict[str, RowSample]:
        """All rows kept, by what they are."""
        found = {"inputs": self.inputs, "gradients": self.gradients}
        return found if self.outputs is None else found | {"outputs": self.outputs}

    def use(self, samples: Mapping[str, RowSample]) -> None:
        """Keep rows in these from now on."""
        for side, sample in samples.items():
            setattr(self, side, sample)


@dataclass(frozen=True)
class Place:
    """A layer of both denoisers; ``rounds`` says whether the quantized one rounds its inputs."""

    head: Head
    quantized: Any
    reference: Any
    rounds: bool


def sites_of(run: Run) -> dict[str, Place]:
    """Every quantized layer that may get an adapter.

    Raises:
        CalibrationError: there is none.

    """
    full, quantized = (uncompiled(m) for m in run.pair)
    originals = dict(full.named_modules())
    dtype = getattr(quantized, "dtype", torch.float32)
    places = {}
    for name, layer in quantized.named_modules():
        original: Any = originals.get(name)
        if type(original) not in (nn.Linear, nn.Conv2d) or _computes_alike(layer, original):
            continue
        shape = shape_of(layer)
        if shape is None or shape != shape_of(original):
            continue
        kind = "linear" if isinstance(original, nn.Linear) else "convolution"
        head = Head(name, kind, shape[1], shape[0], original.bias is not None, ())  # type: ignore[arg-type]
        places[name] = Place(head, layer, original, rounds_inputs(layer, dtype))
    if not places:
        raise CalibrationError(
            f"no layer of {type(quantized).__name__} is quantized: expected linear layers or convolutions "
            f"that are plain in the pipeline's own denoiser and of another class in `quantized`."
        )
    return places


@contextmanager
def opened(
    places: Mapping[str, Place], rows: int, memory: float, *, gradients: bool
) -> Iterator[dict[str, Site]]:
    """Room for so many rows of every layer: in memory, or in files where that is too little.

    Args:
        places: the layers.
        rows: of each, at most.
        memory: bytes for all of them.
        gradients: whether any will be kept.

    Raises:
        CalibrationError: the disk has no room for them.

    """

    def width(place: Place) -> int:
        outputs = gradients + place.rounds
        return place.head.features + outputs * place.head.targets + gradients

    needed = 4 * rows * sum(map(width, places.values()))
    with tempfile.TemporaryDirectory() if needed > memory else nullcontext() as folder:
        if folder is not None and needed > (free := shutil.disk_usage(folder).free):
            raise CalibrationError(
                f"{rows} rows of {len(places)} layers take {needed / 1e9:.1f} GB: more than the "
                f"{memory / 1e9:.1f} GB of memory that they may take, and than the {free / 1e9:.1f} GB free "
                f"in {Path(folder).parent}. Let TMPDIR name a larger disk, or pass fewer rows."
            )

        def sample(index: int, kind: str) -> RowSample:
            return RowFile(rows, Path(folder) / f"{index}.{kind}") if folder else RowSample(rows)

        yield {
            name: Site(
                place.head,
                place.quantized,
                place.reference,
                sample(i, "inputs"),
                sample(i, "gradients"),
                sample(i, "outputs") if place.rounds else None,
            )
            for i, (name, place) in enumerate(places.items())
        }


def _computes_alike(layer: Any, original: nn.Module) -> bool:
    """Whether a layer is a plain one with the original's weight."""
    weight = getattr(layer, "weight", None)
    plain = type(layer) is type(original) and type(weight) in (Tensor, nn.Parameter)
    if not plain or weight is None:
        return False
    full = present(original, "weight", original.get_parameter("weight"))
    return torch.equal(present(layer, "weight", weight), full)
