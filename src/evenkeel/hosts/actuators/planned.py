"""A correction's plan for one run, which may be shorter than its schedule."""

from __future__ import annotations

from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import Incompatible, OutOfRange
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import same_levels


def planned(
    correction: Correction, law: StepLaw, *, allow_range: bool
) -> tuple[SamplerPlan, OutOfRange | None]:
    """The plan, and what to raise if a step beyond it is taken.

    Whoever measured along a run that ends early (``denoising_end``, a pipeline for the first of two
    denoisers) knows nothing of the steps after it. A run on the same levels has a plan for those that
    were measured; only if it goes on, it is out of range.

    Raises:
        OutOfRange: levels that were not calibrated are met before that.
        Incompatible: the plan changes what the correction does not declare.

    """
    refusal: OutOfRange | None = None
    try:
        plan = correction.plan(law, allow_range=allow_range)
    except OutOfRange as error:
        short = _measured_part(correction, law)
        if short is None:
            raise
        plan, refusal = correction.plan(short, allow_range=allow_range), error
    undeclared = [s for s in plan.stages if s not in correction.stages]
    if undeclared:
        raise Incompatible(
            f"{correction.name} declares the stages {correction.stages}, but its plan also changes "
            f"{', '.join(undeclared)}, which nobody would carry out. Declare it in stages."
        )
    return plan, refusal


def _measured_part(correction: Correction, law: StepLaw) -> StepLaw | None:
    """The first steps of ``law``, where the correction was measured along these and no others."""
    made_for = correction.made_for
    if made_for is None or not 0 < len(made_for.timesteps) < law.steps:
        return None
    short = law.until(len(made_for.timesteps))
    return short if same_levels(short, *made_for.levels) else None
