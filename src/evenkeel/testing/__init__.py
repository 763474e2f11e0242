"""For whoever writes a correction: prove that it keeps what every correction promises.

>>> from evenkeel.testing import check_correction
>>> from evenkeel.corrections import QDrift
>>> check_correction(QDrift, schedulers=SOME)

``LINEAR`` and ``NONLINEAR`` are the schedulers of diffusers in the configurations that matter;
``drawn_evidence`` is evidence with a known error; ``tiny_pipeline`` is a real pipeline that takes
milliseconds.
"""

from evenkeel.testing.check import check_correction as check_correction
from evenkeel.testing.pipeline import tiny_pipeline as tiny_pipeline
from evenkeel.testing.scheduler_cases import LINEAR as LINEAR
from evenkeel.testing.scheduler_cases import NONLINEAR as NONLINEAR
from evenkeel.testing.scheduler_cases import SOME as SOME
from evenkeel.testing.scheduler_cases import Case as Case
from evenkeel.testing.synthetic import drawn_evidence as drawn_evidence
from evenkeel.testing.synthetic import law_of as law_of
