"""What is fitted in closed loop, by its name in the catalogue: the papers' forms, our defaults, ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evenkeel.corrections.base import Correction
from evenkeel.corrections.reconstruction import Reconstruction
from evenkeel.errors import CalibrationError
from evenkeel.fitting.closed_loop.fit_stepbaq import StepbaQFit
from evenkeel.fitting.closed_loop.fit_tac import TACFit
from evenkeel.hosts.run import Run

RULES: dict[str, Callable[[], TACFit | StepbaQFit]] = {
    "tac": lambda: TACFit(Reconstruction()),
    "tac-ibc": lambda: TACFit(None),
    "stepbaq": StepbaQFit,
    "tac:published": lambda: TACFit(Reconstruction.published()),
    "tac-unconditional:published": lambda: TACFit(Reconstruction.published(), unconditional=True),
    "tac-least-squares": lambda: TACFit(Reconstruction.least_squares()),
    "tac-ner": lambda: TACFit(Reconstruction.least_squares(), input_bias=False),
    "tac-ibc-channel": lambda: TACFit(None, per_channel=True),
    "tac-output-bias": lambda: TACFit(None, of_the_output=True),
}
DEFAULT = ("tac", "tac-ibc", "stepbaq")


def fit_closed_loop(
    run: Run, names: Sequence[str], *, progress: bool = True
) -> dict[str, Correction]:
    """These corrections for this run, each in a loop of its own.

    Raises:
        CalibrationError: one of them cannot be fitted here.

    """
    return {name: RULES[name]().fitted(run, progress=progress) for name in names}


def known_forms(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if all of them are of ``RULES``.

    Raises:
        CalibrationError: one is not; lists those that are.

    >>> known_forms(["tac:published"])
    ('tac:published',)

    """
    if unknown := [name for name in names if name not in RULES]:
        raise CalibrationError(
            f"{', '.join(unknown)} cannot be fitted in closed loop; there is {', '.join(RULES)}."
        )
    return tuple(names)
