"""What a denoiser's output means: noise, velocity, sample or flow, and how one becomes another.

At a state ``x = alpha * x0 + sigma * eps`` every prediction type is linear in (eps, x):

    eps = to_eps * output + from_sample * x

so an *error* of the output, at fixed x, converts by ``to_eps`` alone, and anything conditional on
the output needs the sample's moments too (x adds its own variance).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from evenkeel.errors import UnsupportedSampler

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


@dataclass(frozen=True, slots=True)
class EpsilonForm:
    """``eps = to_eps * output + from_sample * x`` at one noise level.

    Attributes:
        to_eps: dimensionless; 0 where the output says nothing about the noise that x does not
            already say (flow matching at alpha = 0).
        from_sample: in units of 1 / x.

    """

    to_eps: float
    from_sample: float


def epsilon_form(prediction: str, alpha: float, sigma: float) -> EpsilonForm:
    """The conversion to noise prediction at level ``x = alpha x0 + sigma eps``.

    - ``epsilon``: the output itself.
    - ``v_prediction`` (Salimans & Ho 2022): v = a eps - s x0 with a = alpha / norm, s = sigma / norm,
      norm = sqrt(alpha^2 + sigma^2), hence eps = a v + s x / norm.
    - ``sample``: eps = (x - alpha x0) / sigma.
    - ``flow_prediction``: v = eps - x0, hence eps = (x + alpha v) / (alpha + sigma).

    Raises:
        UnsupportedSampler: for another name, or for ``sample`` at sigma = 0.

    >>> epsilon_form("flow_prediction", 0.25, 0.75)
    EpsilonForm(to_eps=0.25, from_sample=1.0)

    """
    if prediction == "epsilon":
        return EpsilonForm(1.0, 0.0)
    if prediction == "v_prediction":
        norm2 = alpha**2 + sigma**2
        return EpsilonForm(alpha / norm2**0.5, sigma / norm2)
    if prediction == "sample":
        if sigma == 0:
            raise UnsupportedSampler(
                "a sample prediction at sigma = 0 has no noise form: the state is clean already."
            )
        return EpsilonForm(-alpha / sigma, 1 / sigma)
    if prediction == "flow_prediction":
        return EpsilonForm(alpha / (alpha + sigma), 1 / (alpha + sigma))
    raise UnsupportedSampler(
        f"prediction type {prediction!r} is not known; expected one of {PREDICTION_TYPES}."
    )


def clean_output(prediction: str, alpha: float, sigma: float, x0: float, eps: float) -> float:
    """The output that an exact denoiser gives at ``x = alpha x0 + sigma eps``.

    >>> clean_output("flow_prediction", 0.5, 0.5, x0=2.0, eps=3.0)
    1.0
    """
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x0
    if prediction == "flow_prediction":
        return eps - x0
    if prediction == "v_prediction":
        norm = math.hypot(alpha, sigma)
        return (alpha * eps - sigma * x0) / norm
    raise UnsupportedSampler(
        f"prediction type {prediction!r} is not known; expected one of {PREDICTION_TYPES}."
    )
