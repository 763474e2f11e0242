"""Every correction by the name used in tables and on the command line, and which of them apply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from evenkeel.corrections.cnc import CNC
from evenkeel.corrections.composite import Composite
from evenkeel.corrections.covariance_drift import CovarianceDrift
from evenkeel.corrections.d2_dpm import D2DPM
from evenkeel.corrections.dcnc import DCNC
from evenkeel.corrections.dns import DNS
from evenkeel.corrections.epsilon_scaling import EpsilonScaling
from evenkeel.corrections.exact_drift import ExactDrift
from evenkeel.corrections.plan import Correction
from evenkeel.corrections.ptqd import PTQD
from evenkeel.corrections.q_drift import QDrift
from evenkeel.corrections.qncd import QNCD
from evenkeel.corrections.self_consistent import SelfConsistent
from evenkeel.corrections.tcec import TCEC
from evenkeel.corrections.temporal_score_rescaling import TemporalScoreRescaling
from evenkeel.errors import EvenkeelError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence

# Measured in closed loop; they come with a record that holds their tables.
CLOSED_LOOP = ("tac", "stepbaq")
# Made from a record's statistics, with the papers' defaults where a paper has them.
ALL: dict[str, Callable[[Evidence], Correction]] = {
    "q-drift": QDrift,
    "exact-drift": ExactDrift,
    "covariance-drift": CovarianceDrift,
    "self-consistent": SelfConsistent,
    "d2-dpm": D2DPM,
    "s-d2-dpm": lambda evidence: D2DPM(evidence, stochastic=True),
    "ptqd": PTQD,
    "cnc": CNC,
    "dcnc": DCNC,
    "dns": DNS,
    "dcnc+dns": lambda evidence: Composite((DCNC(evidence), DNS(evidence, estimator="iqr"))),
    "tcec": TCEC,
    "tcec-window-1": lambda evidence: TCEC(evidence, window=1),
    "qncd": lambda evidence: QNCD(),
    "epsilon-scaling": lambda evidence: EpsilonScaling(),
    "tsr": lambda evidence: TemporalScoreRescaling(),
}


def from_evidence(evidence: Evidence) -> tuple[dict[str, Correction], dict[str, str]]:
    """All corrections that this evidence allows, and for the others the reason why not."""
    made: dict[str, Correction] = {}
    reasons: dict[str, str] = {}
    for name, make in ALL.items():
        try:
            made[name] = make(evidence)
        except EvenkeelError as error:
            reasons[name] = str(error)
    return made, reasons


def applicable(
    corrections: Mapping[str, Correction], law: StepLaw, *, allow_range: bool = False
) -> tuple[dict[str, Correction], dict[str, str]]:
    """Those that change something in a run of this law, and for the others the reason why not.

    >>> from evenkeel.hosts.scheduler.probing import probe_scheduler
    >>> from diffusers import DDIMScheduler
    >>> scheduler = DDIMScheduler(clip_sample=False)
    >>> scheduler.set_timesteps(4)
    >>> found, reasons = applicable({"none": EpsilonScaling(1.0)}, probe_scheduler(scheduler))
    >>> reasons
    {'none': 'it changes nothing in this run'}

    """
    found: dict[str, Correction] = {}
    reasons: dict[str, str] = {}
    for name, correction in corrections.items():
        try:
            plan = correction.plan(law, allow_range=allow_range)
        except EvenkeelError as error:
            reasons[name] = str(error)
            continue
        if plan.is_identity:
            notes = Counter(note for note in plan.explanations if note)
            reasons[name] = (
                notes.most_common(1)[0][0] if notes else "it changes nothing in this run"
            )
        else:
            found[name] = correction
    return found, reasons
