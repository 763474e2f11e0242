"""Several corrections as one, in the order in which they act within a step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

from evenkeel.corrections.plan import (
    STAGES,
    Correction,
    OutputEdit,
    SamplerPlan,
    digest_of,
    plain_plan,
    text_of,
)
from evenkeel.errors import CalibrationError, Incompatible
from evenkeel.sampling.step_law import StepLaw

# All three make room for the variance of the same error.
_ROOM = {"level", "increment", "noise"}


@runtime_checkable
class FollowsEdit(Protocol):
    """A correction whose numbers depend on what is done to the output before it."""

    def plan(
        self, law: StepLaw, *, allow_range: bool = False, edit: OutputEdit | None = None
    ) -> SamplerPlan:
        """As ``Correction.plan``, for outputs that ``edit`` has changed."""
        ...


@dataclass(frozen=True)
class Composite:
    """Corrections that act at different places of a step, together.

    They act in the order of ``STAGES`` whatever order they are given in: the level the network is told,
    its output, the step's length, the injected noise, the state. A correction of the step's length is
    planned for the error of the *edited* output, so that nothing is counted twice.

    Refused: two corrections at the same place (each would take off the same error), unless the second
    was calibrated along the trajectory that the first one corrects (``calibrate(correction=first)``);
    and two that make room for the variance of the error (a shorter noise, a longer step, a higher
    level).

    Attributes:
        parts: at least one.

    Raises:
        CalibrationError: no parts.

    """

    parts: tuple[Correction, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise CalibrationError("a composite needs at least one correction.")

    @property
    def name(self) -> str:
        """The names, joined: ``cnc+dns``."""
        return "+".join(part.name for part in self.parts)

    @property
    def references(self) -> tuple[str, ...]:
        """Of all parts."""
        return tuple(r for part in self.parts for r in part.references)

    @property
    def options(self) -> dict[str, Any]:
        """Text of the parts."""
        return {"parts": tuple(text_of(part) for part in self.parts)}

    @property
    def source(self) -> object:
        """Provenance of the first part that has one."""
        found = [getattr(getattr(p, "evidence", p), "source", None) for p in self.parts]
        return next((s for s in found if s is not None), None)

    @property
    def acts_on_denoiser(self) -> bool:
        """Whether some part acts inside the denoiser call."""
        return any(getattr(part, "acts_on_denoiser", False) for part in self.parts)

    def content_digest(self) -> str:
        """Tells any two composites apart."""
        return hashlib.sha256(" ".join(map(digest_of, self.parts)).encode()).hexdigest()

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """All parts' plans in one.

        Raises:
            Incompatible: parts that contradict each other on this sampler.

        """
        alone = [(part, part.plan(law, allow_range=allow_range)) for part in self.parts]
        alone = [(part, plan) for part, plan in alone if not plan.is_identity]
        for first, second in combinations(alone, 2):
            _refuse_contradiction(first, second)
        alone.sort(key=lambda pair: STAGES.index(pair[1].stages[0]))
        whole = plain_plan(law)
        for part, plan in alone:
            if whole.edit is not None and isinstance(part, FollowsEdit) and _follows(part):
                plan = part.plan(law, allow_range=allow_range, edit=whole.edit)
            whole = _merged(whole, plan)
        return whole


def _follows(part: Any) -> bool:
    """Structural typing looks at names only; the parameter decides."""
    return "edit" in type(part).plan.__annotations__


def _refuse_contradiction(
    first: tuple[Correction, SamplerPlan], second: tuple[Correction, SamplerPlan]
) -> None:
    (a, plan_a), (b, plan_b) = first, second
    measured_after = {text_of(a), text_of(b)} & {_along(a), _along(b)} - {""}
    same = sorted(set(plan_a.stages) & set(plan_b.stages), key=STAGES.index)
    if same and not measured_after:
        raise Incompatible(
            f"{a.name} and {b.name} both correct the {same[0]}: each takes off the same error, together "
            f"they take it off twice. Use one of them, or calibrate the second one along the corrected "
            f"trajectory: calibrate(..., trajectory='corrected', correction=<the first>)."
        )
    room_a, room_b = _ROOM & set(plan_a.stages), _ROOM & set(plan_b.stages)
    if room_a and room_b and not measured_after:
        raise Incompatible(
            f"{a.name} (by the {min(room_a)}) and {b.name} (by the {min(room_b)}) both make room for "
            f"the variance of the same error. Use one of them."
        )


def _along(part: Correction) -> str:
    source = getattr(getattr(part, "evidence", part), "source", None)
    return str(getattr(source, "correction", ""))


def _merged(a: SamplerPlan, b: SamplerPlan) -> SamplerPlan:
    """Both plans; at most one of them changes the step beyond its output and a shift."""
    edit = b.edit if a.edit is None else a.edit if b.edit is None else a.edit.then(b.edit)
    shift = b.shift if a.shift is None else a.shift if b.shift is None else a.shift + b.shift
    notes = tuple(
        "; ".join(filter(None, pair)) for pair in zip(a.explanations, b.explanations, strict=True)
    )
    stepping = b if _ROOM & set(b.stages) else a
    return replace(
        stepping,
        active=a.active | b.active,
        explanations=notes,
        shift=shift,
        edit=edit,
        relabel=a.relabel or b.relabel,
        refresh=a.refresh if b.refresh is None else b.refresh,
    )
