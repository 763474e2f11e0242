"""Readout: the output head refitted per step, its evidence, and the safe file that holds both."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.corrections.exact_drift import ExactDrift
from evenkeel.corrections.head_table import HeadTable
from evenkeel.corrections.plan import Correction, Identity, SamplerPlan, digest_of, text_of
from evenkeel.errors import CalibrationError, RecordError
from evenkeel.record.file import read_file, write_file
from evenkeel.record.schema import MOMENTS
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import ORDERS, PairedMoments
from evenkeel.statistics.provenance import Provenance

KIND, SCHEMA_VERSION = "readout", 1
FORMS = ("per-step", "shared", "hierarchical")


@dataclass(frozen=True)
class HeadFit:
    """How the fit of one denoiser call went.

    Attributes:
        step, branch: which call.
        penalty: ridge penalty that cross-validation chose, in units of the features' mean scatter.
        held_out: squared error that is left on prompts that the fit did not see, relative to the
            error before; 1 is no change.
        bound: one-sided 95 % upper bound of ``held_out``.
        explanation: why the original head is kept, or "".

    """

    step: int
    branch: int
    penalty: float
    held_out: float
    bound: float
    explanation: str


@dataclass(frozen=True)
class Readout:
    """At step i, use the output head W + dW_i instead of W; the same multiply, nothing else runs.

    With features h that enter the head of the quantized denoiser and targets t, what the
    full-precision denoiser's head gives at the same input minus what the quantized one gives,

        dW_i, db_i = argmin sum |t - dW h - db|^2 + p s |dW|^2      (s: mean scatter of a feature)

    p by cross-validation over prompts. Ours; derived in docs/readout.md. A step whose held-out error
    does not fall with 95 % confidence keeps its head, so that without evidence nothing changes.

    A head acts before guidance, so a table is valid at every guidance scale. A sampler correction
    may follow (``then``): ``with_drift`` hands the rest of the error, measured on prompts that the
    head in use was not fitted to, to ``ExactDrift``; that part belongs to one guidance scale.

    Attributes:
        provenance: what it was fitted for; ``trajectory`` is ``corrected``.
        head: name of the layer in the denoiser.
        form: ``per-step``, ``shared`` (one change for all steps, can be folded into the checkpoint)
            or ``hierarchical`` (per-step changes drawn to the shared one).
        table: the heads over noise levels.
        fits: one per denoiser call.
        evidence: moments of the error that is left after guidance; None where guidance is not a
            linear combination of the denoiser's outputs.
        then: a correction of the sampler on top, or None.

    """

    provenance: Provenance
    head: str
    form: str
    table: HeadTable
    fits: tuple[HeadFit, ...]
    evidence: Evidence | None
    then: Correction | None = None

    @property
    def name(self) -> str:
        """``readout``, and what follows: ``readout+exact-drift``."""
        return "readout" if self.then is None else f"readout+{self.then.name}"

    @property
    def references(self) -> tuple[str, ...]:
        """Derived here; docs/readout.md."""
        return ("evenkeel, docs/readout.md",)

    @property
    def options(self) -> dict[str, Any]:
        """The knobs, without what was fitted."""
        return {"form": self.form, "then": text_of(self.then)}

    @property
    def accepted(self) -> int:
        """How many of the denoiser calls have a head of their own."""
        return int(self.table.active.sum())

    def with_drift(self) -> Readout:
        """The same with exact drift on the error that is left.

        Raises:
            CalibrationError: nothing is known about that error.

        """
        if self.evidence is None:
            raise CalibrationError(
                "this readout holds no evidence of the error that is left: its pipeline combines the "
                "guidance branches in a way that is not linear. Use it without drift."
            )
        return replace(self, then=ExactDrift(self.evidence))

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """What the sampler does differently: nothing, or what follows.

        Nothing either where no head was changed: evidence that did not hold for the heads is none.
        """
        if self.then is None or self.table.is_identity:
            return Identity().plan(law)
        return self.then.plan(law, allow_range=allow_range)

    def content_digest(self) -> str:
        """Tells any two tables apart, and what follows them."""
        running = hashlib.sha256(f"{self.head} {digest_of(self.then)}".encode())
        for level in (self.table.alpha, self.table.sigma):
            running.update(np.asarray(level, dtype=np.float64).tobytes())
        for tensor in _table_tensors(self.table).values():
            running.update(tensor.numpy().tobytes())
        return running.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file atomically; float16 heads, float64 moments, a JSON header.

        Raises:
            RecordError: something follows the readout; the file holds none of that.

        """
        if self.then is not None:
            raise RecordError(
                f"a file holds the readout and its evidence, not what follows it ({self.then.name}). "
                f"Save the readout itself, and call with_drift() after loading."
            )
        tensors = _table_tensors(self.table)
        if self.evidence is not None:
            tensors |= {f"moments.{n}": getattr(self.evidence.moments, n) for n in MOMENTS}
        fit = {"head": self.head, "form": self.form, "fits": [asdict(f) for f in self.fits]}
        texts = {
            "provenance": json.dumps(asdict(self.provenance), sort_keys=True),
            "readout": json.dumps(fit, sort_keys=True),
        }
        return write_file(path, KIND, SCHEMA_VERSION, texts, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Readout:
        """Read and check a file; never executes anything in it.

        Args:
            path: written by ``save``.

        Raises:
            RecordError: missing, foreign, damaged, changed, or of another schema version.

        """
        texts = ("provenance", "readout")
        metadata, tensors = read_file(path, KIND, SCHEMA_VERSION, texts, "readout")
        try:
            return cls._from_file(metadata, tensors)
        except Exception as e:  # anyone can compute a digest
            raise RecordError(f"{path} is not a valid readout: {e}. Fit again.") from e

    @classmethod
    def _from_file(cls, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Readout:
        provenance = Provenance(**json.loads(metadata["provenance"]))
        described = json.loads(metadata["readout"])
        steps, branches, features, targets = tensors["table.weight"].shape
        wanted = {
            "weight": (torch.float16, (steps, branches, features, targets)),
            "scale": (torch.float32, (steps, branches)),
            "constant": (torch.float32, (steps, branches, targets)),
            "active": (torch.bool, (steps, branches)),
        }
        for n, (dtype, shape) in wanted.items():
            tensor = tensors[f"table.{n}"]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape or 0 in shape:
                raise ValueError(f"{n} is {tensor.dtype} {tuple(tensor.shape)}, expected {shape}")
        foreign = (
            tensors.keys() - {f"table.{n}" for n in wanted} - {f"moments.{n}" for n in MOMENTS}
        )
        if foreign or not all(torch.isfinite(t).all() for t in tensors.values()):
            raise ValueError(f"unknown tensors {sorted(foreign)}, or values that are not finite")
        levels = provenance.levels
        fits = tuple(HeadFit(**f) for f in described["fits"])
        _refuse_malformed(provenance, described, fits, (steps, branches))
        weight, scale, constant, active = (tensors[f"table.{n}"] for n in wanted)
        table = HeadTable(*levels, weight, scale, constant, active)
        evidence = None
        if any(n.startswith("moments.") for n in tensors):
            moments = _moments_of(provenance, tensors, steps)
            evidence = Evidence(provenance.prediction, *levels, moments, source=provenance)
        return cls(provenance, described["head"], described["form"], table, fits, evidence)

    def __str__(self) -> str:
        lines = [
            f"{self.form} readout of {self.head} ({self.table.weight.shape[2]} features, "
            f"{self.table.weight.shape[3]} outputs): {self.accepted} of {len(self.fits)} heads "
            f"changed",
            "step  branch  sigma/alpha  penalty  error left on held-out prompts (95 % bound)",
        ]
        for f in self.fits:
            with np.errstate(divide="ignore"):
                level = self.table.sigma[f.step] / self.table.alpha[f.step]
            lines.append(
                f"{f.step:4d}  {f.branch:6d}  {level:11.4g}  {f.penalty:7.2g}  {f.held_out:6.3f} "
                f"(< {f.bound:.3f})  {f.explanation}".rstrip()
            )
        return "\n".join(lines)


def _table_tensors(table: HeadTable) -> dict[str, Tensor]:
    kept = [f.name for f in fields(HeadTable) if f.name not in ("alpha", "sigma")]
    return {f"table.{n}": getattr(table, n) for n in kept}


def _refuse_malformed(
    p: Provenance, described: dict[str, Any], fits: tuple[HeadFit, ...], size: tuple[int, int]
) -> None:
    """Raise ValueError unless the header's numbers and names are those of a readout."""
    for values in (p.timesteps, p.alpha, p.sigma):
        found = np.array(values, dtype=np.float64)
        if found.shape != size[:1] or not np.isfinite(found).all() or (found < 0).any():
            raise ValueError(f"expected {size[0]} finite timesteps and levels, found {values}")
    if set(p.layout) != {"ndim", "axis", "channels", "patch"} or p.elements < 1:
        raise ValueError(f"layout {p.layout} of {p.elements} elements is incomplete")
    if not isinstance(described["head"], str) or described["form"] not in FORMS:
        raise ValueError(f"head {described['head']!r}, form {described['form']!r}")
    calls = [(f.step, f.branch) for f in fits]
    if len(set(calls)) != len(calls) or not set(calls) <= set(np.ndindex(*size)):
        raise ValueError(f"fits of the denoiser calls {calls} for heads of {size} calls")
    numbers = np.array([(f.penalty, f.held_out, f.bound) for f in fits], dtype=np.float64)
    if not np.isfinite(numbers).all() or not all(isinstance(f.explanation, str) for f in fits):
        raise ValueError("a fit has a value that is not finite, or no text where one belongs")


def _moments_of(p: Provenance, tensors: dict[str, Tensor], steps: int) -> PairedMoments:
    shape = tensors["moments.mean_e"].shape
    if len(shape) != 3 or shape[1] != steps or 0 in shape:
        raise ValueError(f"moments of shape {tuple(shape)} for {steps} steps")
    for n in MOMENTS:
        tensor = tensors[f"moments.{n}"]
        expected = (*shape, len(ORDERS)) if n == "central" else tuple(shape)
        if tensor.dtype != torch.float64 or tuple(tensor.shape) != expected:
            raise ValueError(f"moments.{n} is {tensor.dtype} {tuple(tensor.shape)}")
    count = torch.full(shape, p.elements, dtype=torch.int64)
    return PairedMoments(count=count, **{n: tensors[f"moments.{n}"] for n in MOMENTS})
