"""What was measured in closed loop and travels with a record: TAC's and StepbaQ's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evenkeel.corrections.plan import Correction
from evenkeel.corrections.reconstruction import Reconstruction
from evenkeel.corrections.stepbaq import StepbaQ
from evenkeel.corrections.tac import TAC
from evenkeel.statistics.provenance import Provenance

PREFIX = "closed_loop."


@dataclass(frozen=True)
class ClosedLoop:
    """Corrections whose numbers depend on every earlier step's correction, so that parts do not merge.

    Attributes:
        tac: or None.
        stepbaq: or None.

    """

    tac: TAC | None = None
    stepbaq: StepbaQ | None = None

    @property
    def corrections(self) -> dict[str, Correction]:
        """Those that were measured, by name."""
        found = {"tac": self.tac, "stepbaq": self.stepbaq}
        return {name: c for name, c in found.items() if c is not None}

    def as_dict(self) -> dict[str, Any]:
        """Everything that is not a tensor, in types that JSON knows."""
        described: dict[str, Any] = {}
        if self.tac is not None:
            rule = self.tac.reconstruction
            described["tac"] = {
                "branch": self.tac.branch,
                "reconstruction": None if rule is None else asdict(rule),
            }
        if self.stepbaq is not None:
            described["stepbaq"] = self.stepbaq.options
        return described

    def tensors(self) -> dict[str, Tensor]:
        """The tables."""
        found: dict[str, Tensor | None] = {}
        if self.tac is not None:
            found |= {"tac.gain": self.tac.gain, "tac.bias": self.tac.bias}
        if self.stepbaq is not None:
            training = self.stepbaq.training
            found |= {
                "stepbaq.mean": self.stepbaq.mean,
                "stepbaq.variance": self.stepbaq.variance,
                "stepbaq.training": None if training is None else torch.from_numpy(training.copy()),
            }
        return {PREFIX + name: t for name, t in found.items() if t is not None}

    @classmethod
    def from_dict(
        cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor], made_for: Provenance
    ) -> ClosedLoop:
        """From a file's header and tensors; the corrections check their own shapes and values."""
        tables = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        source = replace(made_for, trajectory="corrected")
        tac = stepbaq = None
        if "tac" in described:
            rule = described["tac"]["reconstruction"]
            tac = TAC(
                *made_for.levels,
                tables.pop("tac.gain", None),
                tables.pop("tac.bias", None),
                described["tac"]["branch"],
                None if rule is None else Reconstruction(**rule),
                source,
            )
        if "stepbaq" in described:
            training = tables.pop("stepbaq.training", None)
            stepbaq = StepbaQ(
                *made_for.levels,
                tables.pop("stepbaq.mean"),
                tables.pop("stepbaq.variance"),
                None if training is None else training.numpy(),
                **described["stepbaq"],
                source=source,
            )
        if tables:
            raise ValueError(f"unknown tensors {sorted(tables)}")
        return cls(tac, stepbaq)
