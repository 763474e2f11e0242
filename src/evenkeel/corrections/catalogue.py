"""Every correction by the name used in tables and on the command line, and which of them apply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evenkeel.corrections.base import Correction
from evenkeel.corrections.cnc import CNC
from evenkeel.corrections.composite import Composite
from evenkeel.corrections.covariance_drift import CovarianceDrift
from evenkeel.corrections.d2_dpm import D2DPM
from evenkeel.corrections.dcnc import DCNC
from evenkeel.corrections.dns import DNS
from evenkeel.corrections.epsilon_scaling import EpsilonScaling
from evenkeel.corrections.exact_drift import ExactDrift
from evenkeel.corrections.ptqd import PTQD
from evenkeel.corrections.q_drift import QDrift
from evenkeel.corrections.qncd import QNCD
from evenkeel.corrections.readout import Readout
from evenkeel.corrections.recovery_adapters import RecoveryAdapters
from evenkeel.corrections.self_consistent import SelfConsistent
from evenkeel.corrections.stepbaq import StepbaQ
from evenkeel.corrections.tac import TAC
from evenkeel.corrections.tcec import TCEC
from evenkeel.corrections.temporal_score_rescaling import TemporalScoreRescaling
from evenkeel.errors import EvenkeelError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence

EVIDENCE, CLOSED_LOOP, FILE = "evidence", "closed loop", "file"
# What has to be done for a correction that is measured, and not made from evidence.
_MISSING = {
    CLOSED_LOOP: "measured in closed loop, which this record does not hold: calibrate with "
    "closed_loop=True (--closed-loop)",
    FILE: "it needs a file of its own, made by evenkeel readout or evenkeel restore",
}


@dataclass(frozen=True)
class Entry:
    """What a correction of the catalogue is made from.

    Attributes:
        source: ``EVIDENCE`` of a record; ``CLOSED_LOOP``, tables that a record holds; ``FILE``, tables
            in a file of its own; or the name of another entry.
        make: of the evidence, of the tables and what they were made for, or of that other correction.
        version: of the schema of its own file.

    """

    source: str
    make: Callable[..., Correction]
    version: int = 1


# Our defaults: the papers' where these do no harm; each docstring says where not.
ALL: dict[str, Entry] = {
    "q-drift": Entry(EVIDENCE, QDrift),
    "exact-drift": Entry(EVIDENCE, ExactDrift),
    "covariance-drift": Entry(EVIDENCE, CovarianceDrift),
    "self-consistent": Entry(EVIDENCE, SelfConsistent),
    "d2-dpm": Entry(EVIDENCE, D2DPM),
    "s-d2-dpm": Entry(EVIDENCE, lambda evidence: D2DPM(evidence, stochastic=True)),
    "ptqd": Entry(EVIDENCE, PTQD),
    "cnc": Entry(EVIDENCE, CNC),
    "dcnc": Entry(EVIDENCE, DCNC),
    "dns": Entry(EVIDENCE, DNS),
    "dcnc+dns": Entry(
        EVIDENCE, lambda evidence: Composite((DCNC(evidence), DNS(evidence, estimator="iqr")))
    ),
    "tcec": Entry(EVIDENCE, TCEC),
    "tcec-window-1": Entry(EVIDENCE, lambda evidence: TCEC(evidence, window=1)),
    "qncd": Entry(EVIDENCE, lambda evidence: QNCD()),
    "epsilon-scaling": Entry(EVIDENCE, lambda evidence: EpsilonScaling()),
    "tsr": Entry(EVIDENCE, lambda evidence: TemporalScoreRescaling()),
    "tac": Entry(CLOSED_LOOP, TAC.from_tables),
    "tac-ibc": Entry(CLOSED_LOOP, TAC.from_tables),
    "stepbaq": Entry(CLOSED_LOOP, StepbaQ.from_tables),
    "readout": Entry(FILE, Readout.from_tables),
    "readout+drift": Entry("readout", Readout.with_drift),
    "adapters": Entry(FILE, RecoveryAdapters.from_tables),
}

# As the papers print them and as their code computes them, where either differs from our defaults, and
# TAC's parts and variants one by one.
FORMS: dict[str, Entry] = {
    "q-drift:published": Entry(EVIDENCE, QDrift.published),
    "q-drift:released": Entry(EVIDENCE, QDrift.released),
    "d2-dpm:published": Entry(EVIDENCE, D2DPM.published),
    "d2-dpm:released": Entry(EVIDENCE, D2DPM.released),
    "s-d2-dpm:published": Entry(EVIDENCE, lambda e: D2DPM.published(e, stochastic=True)),
    "s-d2-dpm:released": Entry(EVIDENCE, lambda e: D2DPM.released(e, stochastic=True)),
    "ptqd:published": Entry(EVIDENCE, PTQD.published),
    "ptqd:released": Entry(EVIDENCE, PTQD.released),
    "cnc:published": Entry(EVIDENCE, CNC.published),
    "dcnc:published": Entry(EVIDENCE, DCNC.published),
    "dns:published": Entry(EVIDENCE, DNS.published),
    "dcnc+dns:published": Entry(
        EVIDENCE, lambda e: Composite((DCNC.published(e), DNS.published(e)))
    ),
    "tac:published": Entry(CLOSED_LOOP, TAC.from_tables),
    "tac-unconditional:published": Entry(CLOSED_LOOP, TAC.from_tables),
    "tac-least-squares": Entry(CLOSED_LOOP, TAC.from_tables),
    "tac-ner": Entry(CLOSED_LOOP, TAC.from_tables),
    "tac-ibc-channel": Entry(CLOSED_LOOP, TAC.from_tables),
    "tac-output-bias": Entry(CLOSED_LOOP, TAC.from_tables),
}


def root_of(name: str) -> str:
    """``EVIDENCE``, ``CLOSED_LOOP`` or ``FILE``: what an entry is made from in the end."""
    source = (ALL | FORMS)[name].source
    return root_of(source) if source in ALL else source


def available(
    evidence: Evidence | None, measured: Mapping[str, Correction], *, forms: bool = False
) -> tuple[dict[str, Correction], dict[str, str]]:
    """All corrections that can be made of this, and for the others the reason why not.

    Args:
        evidence: of a record; None leaves out what needs a record.
        measured: by name, those that were read from tables; without one of a file, what needs a file
            is left out.
        forms: those of ``FORMS``, too; otherwise only those of them that were measured.

    """
    roots = {root_of(name) for name in measured}
    roots |= {EVIDENCE, CLOSED_LOOP} if evidence is not None else set()
    made: dict[str, Correction] = {}
    reasons: dict[str, str] = {}
    for name, entry in (ALL | FORMS).items():
        if not (forms or name in ALL or name in measured):
            continue
        if name in measured:
            made[name] = measured[name]
        elif root_of(name) in roots:
            source: Any = evidence if entry.source == EVIDENCE else made.get(entry.source)
            try:
                if source is None:
                    raise EvenkeelError(_MISSING[root_of(name)])
                made[name] = entry.make(source)
            except EvenkeelError as error:
                reasons[name] = str(error)
    return made, reasons


def applicable(
    corrections: Mapping[str, Correction], law: StepLaw, *, allow_range: bool = False
) -> tuple[dict[str, Correction], dict[str, str]]:
    """Those that change something in a run of this law, and for the others the reason why not.

    A changed head and adapters count whatever the sampler does.

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
        changed = correction.beside or not (
            correction.heads is None or correction.heads.table.is_identity
        )
        if plan.is_identity and not changed:
            notes = Counter(note for note in plan.explanations if note)
            reasons[name] = (
                notes.most_common(1)[0][0] if notes else "it changes nothing in this run"
            )
        else:
            found[name] = correction
    return found, reasons
