"""Several corrections as one, in the order in which they act within a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from evenkeel.corrections.base import Correction, Heads, stages_of, text_of
from evenkeel.corrections.plan import STAGES, SamplerPlan, plain_plan
from evenkeel.errors import CalibrationError, Incompatible
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.provenance import Provenance

# Three places at which the output is changed, and each time by the same error.
_PLACE = {"branch": "output", "refresh": "output"}
# All three make room for the variance of the same error.
_ROOM = {"level", "increment", "noise"}


@dataclass(frozen=True)
class Composite(Correction):
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

    parts: tuple[Correction, ...] = ()

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
    def stages(self) -> tuple[str, ...]:
        """Of all parts."""
        return stages_of(self.parts)

    @property
    def made_for(self) -> Provenance | None:
        """Of the first part that was made for something."""
        found = (part.made_for for part in self.parts)
        return next((made_for for made_for in found if made_for is not None), None)

    @property
    def heads(self) -> Heads | None:
        """Of the part that changes the head.

        Raises:
            Incompatible: several do.

        """
        found = [part for part in self.parts if part.heads is not None]
        if len(found) > 1:
            raise Incompatible(
                f"{found[0].name} and {found[1].name} both change the denoiser's head. Use one of them."
            )
        return found[0].heads if found else None

    @property
    def beside(self) -> tuple[Any, ...]:
        """Of all parts; several beside one layer add up."""
        return tuple(adapter for part in self.parts for adapter in part.beside)

    @property
    def report(self) -> str:
        """Of all parts that say something."""
        return "\n".join(part.report for part in self.parts if part.report)

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
            if whole.edit is not None:
                plan = part.plan_after(law, whole.edit, allow_range=allow_range)
            whole = _merged(whole, plan)
        return whole


def _refuse_contradiction(
    first: tuple[Correction, SamplerPlan], second: tuple[Correction, SamplerPlan]
) -> None:
    (a, plan_a), (b, plan_b) = first, second
    measured_after = {text_of(a), text_of(b)} & {_along(a), _along(b)} - {""}
    places_a, places_b = ({_PLACE.get(s, s) for s in p.stages} for p in (plan_a, plan_b))
    same = sorted(places_a & places_b, key=STAGES.index)
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
    return "" if part.made_for is None else part.made_for.correction


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
