"""A record's layout: names, dtypes and shapes of its tensors, fields of its provenance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import RecordError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.histogram import BINS, Frame
from evenkeel.statistics.moments import moments_schema
from evenkeel.statistics.provenance import Provenance
from evenkeel.statistics.residual import RESIDUAL_BINS
from evenkeel.storage import Number, Tensors, check_json, check_tensors

FRAME = tuple(f.name for f in fields(Frame))
LAW = tuple(f.name for f in fields(StepLaw) if f.name not in ("sampler", "prediction"))
LAYOUT = dict.fromkeys(("ndim", "axis", "channels", "patch"), int)

_KINDS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float | None": (float, None),
    "list[float]": [float],
    "list[int]": [int],
    "dict[str, Any]": dict,
    "dict[str, int]": {str: int},
    "dict[str, str]": {str: str},
}


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Inside, what is about to be written is checked as it will be when it is read.

    Raises:
        RecordError: it could not be read again.

    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"this {what} is not saved, because it could not be loaded again: {error}"
        ) from error


def check_provenance(p: Provenance, steps: int) -> None:
    """Raise ValueError unless every field is of its type and there is a finite level per step."""
    wanted = {f.name: _KINDS[str(f.type)] for f in fields(Provenance)}
    wanted |= {"layout": LAYOUT, "elements": Number(int, low=1)}
    check_json(asdict(p), wanted, "provenance")
    for values in (p.timesteps, p.alpha, p.sigma):
        if len(values) != steps:
            raise ValueError(f"expected {steps} timesteps and levels, found {values}")


def check_record(p: Provenance, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless fields, names, dtypes, shapes and numbers are those of a record."""
    prompts, steps, channels = tensors["moments.mean_e"].shape
    check_provenance(p, steps)
    law = any(n.startswith("law.") for n in tensors)
    check_tensors(tensors, expected_tensors(steps, law), P=prompts, T=steps, C=channels)


def expected_tensors(t: int, law: bool) -> dict[str, Tensors]:
    """The tensors of a record of ``t`` steps, by name; sizes that vary are letters."""
    double, whole = torch.float64, torch.int64
    times = {n: Tensors(double, ("T",), optional=not law) for n in LAW}
    times |= {n: replace(times[n], shape=("T", "T")) for n in ("sample_weights", "output_weights")}
    times |= {n: replace(times[n], shape=(t + 1,)) for n in ("alpha", "sigma")}
    return {
        **moments_schema(),
        **{f"frame.{n}": Tensors(double, ("T", "C")) for n in FRAME},
        **{f"law.{n}": wanted for n, wanted in times.items()},
        "gram": Tensors(torch.float32, ("P", t * (t + 1) // 2)),
        "prompt_keys": Tensors(torch.uint8, ("P", 8)),
        "seeds": Tensors(whole, ("P",)),
        "noise_floor": Tensors(double, ("T",)),
        "spectrum": Tensors(whole, ("T", "rings"), optional=True),
        "histogram": Tensors(whole, ("T", "C", BINS + 2, 6), optional=True),
        "residual": Tensors(whole, ("T", "C", RESIDUAL_BINS + 2), optional=True),
    }
