"""What does not change from batch to batch, and its JSON form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from evenkeel.corrections.plan import Correction
from evenkeel.hosts.layouts import LatentLayout

TRAJECTORIES = ("full-precision", "quantized", "corrected")


@dataclass(frozen=True)
class Settings:
    """What does not change from batch to batch; the arguments of ``calibrate``, and the twins.

    Attributes:
        twins: fingerprints of the full-precision and the quantized denoiser.
        quantizer: what quantized it, as text.
        (others): see ``calibrate``.

    """

    num_inference_steps: int
    guidance_scale: float | None
    call: dict[str, Any]
    trajectory: str
    correction: Correction | None
    layout: LatentLayout | None
    histograms: bool
    side_by_side: bool
    twins: tuple[str, str]
    quantizer: str


def config_of(scheduler: Any) -> dict[str, Any]:
    """The scheduler's configuration as JSON, without private entries."""
    return json_safe({k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")})


def json_safe(values: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON reads it back; what JSON cannot hold becomes its type's name."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=lambda v: type(v).__name__))
    return plain
