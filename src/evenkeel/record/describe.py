"""What a record says, as plain numbers for tables, plots and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from evenkeel.corrections.confident import resampled_factors
from evenkeel.corrections.q_drift import QDrift
from evenkeel.record import Record


def describe(record: Record, *, resamples: int = 200) -> dict[str, Any]:
    """Per step: noise level, V, gain k, slope a, Q-Drift's factor with its bootstrap band.

    Also the step-to-step correlation of the error and its spectrum. Keys as in ``results.json``.

    Args:
        record: a calibration.
        resamples: of prompts, for the 95 % band of the factors.

    """
    evidence = record.evidence
    second = evidence.by_channel
    variance = evidence.variance(per_channel=True, kind="conditional", trim=None, on="epsilon")
    correction = QDrift(evidence)
    factors = low = high = None
    notes = ["" for _ in record.provenance.timesteps]
    if record.law is not None:
        plan = correction.plan(record.law)
        factors, notes = plan.factor, list(plan.explanations)
        band = resampled_factors(correction, record.law, resamples=resamples)
        low, high = torch.quantile(band, torch.tensor([0.025, 0.975], dtype=band.dtype), dim=0)
    levels = np.array(record.provenance.sigma) / np.maximum(record.provenance.alpha, 1e-300)
    steps = []
    for k, timestep in enumerate(record.provenance.timesteps):
        steps.append(
            {
                "step": k,
                "timestep": timestep,
                "noise_to_signal": float(levels[k]) if levels[k] < 1e12 else None,
                "factor": None if factors is None else factors[k].tolist(),
                "factor_low": None if low is None else low[k].tolist(),
                "factor_high": None if high is None else high[k].tolist(),
                "variance": variance[k].tolist(),
                "gain": second.gain[k].tolist(),
                "slope": second.slope[k].tolist(),
                "explained": second.explained[k].tolist(),
                "explanation": notes[k],
            }
        )
    spectrum = record.error_spectrum()
    correlation = record.step_correlation()
    return {
        "prompts": record.prompts,
        "quantizer": record.provenance.quantizer,
        "steps": steps,
        "step_correlation": correlation.tolist(),
        "error_spectrum": None if spectrum is None else spectrum.tolist(),
        "noise_floor": record.noise_floor.tolist(),
        "provenance": asdict(record.provenance),
    }


def text(description: dict[str, Any]) -> str:
    """The description for a terminal: provenance first, then one line per step."""
    made_for = description["provenance"]
    correlation = np.array(description["step_correlation"])
    lag = np.diagonal(correlation, 1)
    lines = [
        f"{made_for['pipeline_class']}, {made_for['quantizer']}, {description['prompts']} prompts, "
        f"{made_for['num_inference_steps']} steps of {made_for['scheduler_class']}, guidance "
        f"{made_for['guidance_scale']}, along the {made_for['trajectory']} trajectory",
        f"error correlation between neighbouring steps: {_mean(lag):.2f} on average (variance-based "
        f"corrections assume 0)",
        "step  timestep  sigma/alpha           V  gain k  slope a        c",
    ]
    for s in description["steps"]:
        c = "-" if s["factor"] is None else f"{_mean(s['factor']) - 1:8.5f}"
        level = "inf" if s["noise_to_signal"] is None else f"{s['noise_to_signal']:.4f}"
        lines.append(
            f"{s['step']:4d}  {s['timestep']:8.2f}  {level:>11}  {_mean(s['variance']):10.3e}  "
            f"{_mean(s['gain']):6.3f}  {_mean(s['slope']):7.3f} {c:>8}  {s['explanation']}"
        )
    return "\n".join(lines)


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
