"""The file's layout: names, dtypes and shapes of its tensors, its digest, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.histogram import BINS, Frame
from evenkeel.statistics.moments import ORDERS, PairedMoments
from evenkeel.statistics.provenance import Provenance
from evenkeel.statistics.residual import RESIDUAL_BINS

MOMENTS = tuple(f.name for f in fields(PairedMoments) if f.name != "count")
FRAME = tuple(f.name for f in fields(Frame))
LAW = tuple(f.name for f in fields(StepLaw) if f.name not in ("sampler", "prediction"))


_KINDS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float | None": (float, int, type(None)),
    "list[float]": list,
    "list[int]": list,
    "dict[str, Any]": dict,
    "dict[str, int]": dict,
    "dict[str, str]": dict,
}


def digest(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor's name, dtype, shape and bytes."""
    running = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        running.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        running.update(tensor.numpy().tobytes())
    return running.hexdigest()


def refuse_malformed(p: Provenance, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless fields, names, dtypes, shapes and numbers are those of a record."""
    for f in fields(Provenance):
        if not isinstance(getattr(p, f.name), _KINDS[str(f.type)]):
            raise ValueError(f"{f.name} is {getattr(p, f.name)!r}, expected {f.type}")
    if set(p.layout) != {"ndim", "axis", "channels", "patch"} or p.elements < 1:
        raise ValueError(f"layout {p.layout} of {p.elements} elements is incomplete")
    prompts, steps, channels = tensors["moments.mean_e"].shape
    wanted = _expected(prompts, steps, channels)
    missing, foreign = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    optional = {"histogram", "residual", "spectrum"}
    if not any(n in tensors for n in wanted if n.startswith("law.")):
        optional |= {n for n in wanted if n.startswith("law.")}
    if missing - optional or foreign:
        raise ValueError(f"missing tensors {sorted(missing)}, unknown tensors {sorted(foreign)}")
    for name, tensor in tensors.items():
        dtype, shape = wanted[name]
        shape = (steps, tensor.shape[-1]) if name == "spectrum" and tensor.dim() else shape
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or 0 in shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {found}, expected {dtype} {shape}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has a value that is not finite")
    for values in (p.timesteps, p.alpha, p.sigma):
        if len(values) != steps or not np.isfinite(np.array(values, dtype=np.float64)).all():
            raise ValueError(f"expected {steps} finite timesteps and levels, found {values}")


def _expected(p: int, t: int, c: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    double, whole = torch.float64, torch.int64
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    wanted = {f"moments.{n}": (double, (p, t, c)) for n in MOMENTS}
    wanted["moments.central"] = (double, (p, t, c, len(ORDERS)))
    wanted |= {f"frame.{n}": (double, (t, c)) for n in FRAME}
    return {
        **wanted,
        "gram": (torch.float32, (p, t * (t + 1) // 2)),
        "prompt_keys": (torch.uint8, (p, 8)),
        "seeds": (whole, (p,)),
        "noise_floor": (double, (t,)),
        **{f"law.{n}": (double, (t,)) for n in ("timesteps", "noise_weights", "sigma_down")},
        **{f"law.{n}": (double, (t, t)) for n in ("sample_weights", "output_weights")},
        **{f"law.{n}": (double, (t + 1,)) for n in ("alpha", "sigma")},
        "spectrum": (whole, (t, 1)),  # any number of rings
        "histogram": (whole, (t, c, BINS + 2, 6)),
        "residual": (whole, (t, c, RESIDUAL_BINS + 2)),
    }


def read_metadata(content: bytes) -> dict[str, str]:
    """The strings in a safetensors header."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError("the header is longer than the file")
    header = json.loads(content[8 : 8 + size])
    found = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return dict(found)
