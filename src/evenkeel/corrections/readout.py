"""Readout: the output head refitted per step, and the evidence of what is left."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from evenkeel.corrections.base import Correction, Heads, Identity, Tables, stages_of, text_of
from evenkeel.corrections.exact_drift import ExactDrift
from evenkeel.corrections.head_table import HeadTable
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import CalibrationError, RecordError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import MOMENTS, PairedMoments, moments_schema
from evenkeel.statistics.provenance import Provenance
from evenkeel.storage.checks import Number, Tensors, check_json, check_tensors

FORMS = ("per-step", "shared", "hierarchical")
# What its file holds.
TABLE = {
    "table.weight": Tensors(torch.float16, ("T", "B", "F", "O")),
    "table.scale": Tensors(torch.float32, ("T", "B")),
    "table.constant": Tensors(torch.float32, ("T", "B", "O")),
    "table.active": Tensors(torch.bool, ("T", "B")),
}
_FIT = {
    "step": Number(int, low=0),
    "branch": Number(int, low=0),
    **dict.fromkeys(("penalty", "held_out", "bound"), float),
    "explanation": str,
}
_DESCRIPTION = {"head": str, "form": set(FORMS), "fits": [_FIT]}


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
class Readout(Correction):
    """At step i, use the output head W + dW_i instead of W: dW_i h is added to what the head gives.

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

    references = ("evenkeel, docs/readout.md",)

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
    def stages(self) -> tuple[str, ...]:
        """The head, and what follows."""
        return ("head", *stages_of(self.parts))

    @property
    def made_for(self) -> Provenance:
        """What it was fitted for."""
        return self.provenance

    @property
    def parts(self) -> tuple[Correction, ...]:
        """What follows."""
        return () if self.then is None else (self.then,)

    @property
    def heads(self) -> Heads:
        """The table, and the layer that it belongs to."""
        return Heads(self.head, self.table)

    @property
    def report(self) -> str:
        """How every head was fitted."""
        return str(self)

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

    def description(self) -> dict[str, Any]:
        """Per denoiser call: penalty, error left on held-out prompts with its bound, why it is left alone."""
        return {
            "head": self.head,
            "form": self.form,
            "quantizer": self.provenance.quantizer,
            "changed": self.accepted,
            "steps": [asdict(fit) for fit in self.fits],
            "provenance": asdict(self.provenance),
        }

    def tables(self) -> Tables:
        """float16 heads and float64 moments.

        Raises:
            RecordError: something follows the readout; its file holds none of that.

        """
        if self.then is not None:
            raise RecordError(
                f"a file holds the readout and its evidence, not what follows it ({self.then.name}). "
                f"Save the readout itself, and call with_drift() after loading."
            )
        tensors = {n: getattr(self.table, n.removeprefix("table.")) for n in TABLE}
        if self.evidence is not None:
            tensors |= {f"moments.{n}": getattr(self.evidence.moments, n) for n in MOMENTS}
        fits = [asdict(f) for f in self.fits]
        return Tables({"head": self.head, "form": self.form, "fits": fits}, tensors)

    @classmethod
    def from_tables(cls, tables: Tables, made_for: Provenance) -> Readout:
        """See ``Correction``."""
        provenance, described, tensors = made_for, tables.described, tables.tensors
        moments = any(n.startswith("moments.") for n in tensors)
        wanted = {**TABLE, **moments_schema(optional=not moments)}
        sizes = check_tensors(tensors, wanted, T=len(provenance.timesteps))
        if min(*provenance.timesteps, *provenance.alpha, *provenance.sigma) < 0:
            raise ValueError("a timestep or level is negative")
        check_json(described, _DESCRIPTION, "readout")
        fits = tuple(HeadFit(**f) for f in described["fits"])
        calls = [(f.step, f.branch) for f in fits]
        if len(set(calls)) != len(calls) or not set(calls) <= set(
            np.ndindex(sizes["T"], sizes["B"])
        ):
            raise ValueError(f"fits of the denoiser calls {calls} for heads of {sizes} calls")
        levels = provenance.levels
        table = HeadTable(*levels, *(tensors[n] for n in TABLE))
        evidence = None
        if moments:
            own = {n: tensors[f"moments.{n}"] for n in MOMENTS}
            count = torch.full(own["mean_e"].shape, provenance.elements, dtype=torch.int64)
            evidence = Evidence(
                provenance.prediction, *levels, PairedMoments(count=count, **own), source=provenance
            )
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
