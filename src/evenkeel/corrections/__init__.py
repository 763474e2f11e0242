"""Corrections of the sampler, one file per method, named as the literature names it.

``Correction`` says what each of them declares. ``ALL`` maps the name used in tables and on the command
line to what it is made from; there is no registration at import time.
"""

from evenkeel.corrections.base import Correction as Correction
from evenkeel.corrections.base import FromEvidence as FromEvidence
from evenkeel.corrections.base import Identity as Identity
from evenkeel.corrections.catalogue import ALL as ALL
from evenkeel.corrections.catalogue import FORMS as FORMS
from evenkeel.corrections.catalogue import applicable as applicable
from evenkeel.corrections.cnc import CNC as CNC
from evenkeel.corrections.composite import Composite as Composite
from evenkeel.corrections.confident import Confident as Confident
from evenkeel.corrections.covariance_drift import CovarianceDrift as CovarianceDrift
from evenkeel.corrections.d2_dpm import D2DPM as D2DPM
from evenkeel.corrections.dcnc import DCNC as DCNC
from evenkeel.corrections.dns import DNS as DNS
from evenkeel.corrections.epsilon_scaling import EpsilonScaling as EpsilonScaling
from evenkeel.corrections.exact_drift import ExactDrift as ExactDrift
from evenkeel.corrections.plan import SamplerPlan as SamplerPlan
from evenkeel.corrections.ptqd import PTQD as PTQD
from evenkeel.corrections.q_drift import QDrift as QDrift
from evenkeel.corrections.qncd import QNCD as QNCD
from evenkeel.corrections.readout import HeadFit as HeadFit
from evenkeel.corrections.readout import Readout as Readout
from evenkeel.corrections.recovery_adapters import RecoveryAdapters as RecoveryAdapters
from evenkeel.corrections.self_consistent import SelfConsistent as SelfConsistent
from evenkeel.corrections.stepbaq import StepbaQ as StepbaQ
from evenkeel.corrections.tac import TAC as TAC
from evenkeel.corrections.tcec import TCEC as TCEC
from evenkeel.corrections.temporal_score_rescaling import (
    TemporalScoreRescaling as TemporalScoreRescaling,
)
