"""What was measured in closed loop and travels with a record: the tables of its corrections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from evenkeel.corrections.base import Correction, Tables
from evenkeel.corrections.catalogue import ALL, CLOSED_LOOP, FORMS
from evenkeel.statistics.provenance import Provenance

PREFIX = "closed_loop."


@dataclass(frozen=True)
class ClosedLoop:
    """Corrections whose numbers depend on every earlier step's correction, so that parts do not merge.

    Attributes:
        corrections: by the name of their entry in ``corrections.ALL`` or ``FORMS``.

    """

    corrections: Mapping[str, Correction] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything that is not a tensor, in types that JSON knows."""
        return {name: tables.described for name, tables in self._tables().items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tables."""
        return {
            f"{PREFIX}{name}.{n}": tensor
            for name, tables in self._tables().items()
            for n, tensor in tables.tensors.items()
        }

    def _tables(self) -> dict[str, Tables]:
        found = {name: correction.tables() for name, correction in self.corrections.items()}
        return {name: tables for name, tables in found.items() if tables is not None}

    @classmethod
    def from_dict(
        cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor], made_for: Provenance
    ) -> ClosedLoop:
        """From a file's header and tensors; the corrections check their own shapes and values."""
        source = replace(made_for, trajectory="corrected")
        made, entries = {}, ALL | FORMS
        for name, own in described.items():
            if name not in entries or entries[name].source != CLOSED_LOOP:
                raise ValueError(f"{name} is not measured in closed loop")
            start = f"{PREFIX}{name}."
            tables = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            made[name] = entries[name].make(Tables(own, tables), source)
        found = cls(made)
        unknown = {n for n in tensors if n.startswith(PREFIX)} - found.tensors().keys()
        if unknown:
            raise ValueError(f"unknown tensors {sorted(unknown)}")
        return found
