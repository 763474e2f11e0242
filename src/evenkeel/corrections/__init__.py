"""Corrections of the sampler, one file per method, named as the literature names it.

``ALL`` maps the name used in tables and on the command line to the class; there is no registration
at import time.
"""

from evenkeel.corrections.exact_drift import ExactDrift as ExactDrift
from evenkeel.corrections.plan import Correction as Correction
from evenkeel.corrections.plan import Identity as Identity
from evenkeel.corrections.plan import SamplerPlan as SamplerPlan
from evenkeel.corrections.q_drift import QDrift as QDrift

ALL: dict[str, type[QDrift] | type[ExactDrift]] = {"q-drift": QDrift, "exact-drift": ExactDrift}
