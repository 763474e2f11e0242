"""What the tests of reports share."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import torch
from PIL import Image

import evenkeel.reports as reports
from evenkeel.reports.measures import MEASURES

BY_KEY = {measure.key: measure for measure in MEASURES}
ATTACK = "<script>alert(1)</script> & \"quoted\" 'too'"
PLOTS = [
    reports.factor_plot,
    reports.variance_plot,
    reports.gain_slope_plot,
    reports.correlation_plot,
    reports.spectrum_plot,
]


def estimate(value, stderr=0.1, n=50):
    return {
        "value": value,
        "stderr": stderr,
        "low": value - 2 * stderr,
        "high": value + 2 * stderr,
        "n": n,
    }


NOTHING = {"value": None, "stderr": None, "low": None, "high": None, "n": 50}


def make_calibration(steps=5, channels=3):
    def row(k, scale, start=0.0):
        return [start + scale * (1 + c) * math.exp(-k / 3) for c in range(channels)]

    return {
        "prompts": 16,
        "quantizer": "w4a8",
        "steps": [
            {
                "step": k,
                "timestep": 999 - 100 * k,
                "noise_to_signal": None if k == 0 else 10.0 / k,
                "factor": row(k, 0.05, 1.0),
                "factor_low": row(k, 0.04, 1.0),
                "factor_high": row(k, 0.06, 1.0),
                "variance": row(k, 1e-3),
                "gain": row(k, -0.02),
                "slope": row(k, -0.03),
                "explanation": "left alone <here>" if k == steps - 1 else "",
            }
            for k in range(steps)
        ],
        "step_correlation": [[0.5 ** abs(i - j) for j in range(steps)] for i in range(steps)],
        "error_spectrum": [[math.exp(-b) * (k + 1) for b in range(8)] for k in range(steps)],
    }


def make_results():
    quantized = {key: estimate(10.0) for key in BY_KEY}
    return {
        "settings": {"pipeline": "toy <b>", "quantizer": "w4a8", "steps": 5, "note": ATTACK},
        "arms": [
            {
                "name": "full-precision",
                "frechet_full_precision": estimate(0.0, 0.0),
                "frechet_reference": estimate(7.5),
                "alignment": estimate(0.9),
                "psnr": NOTHING,
                "ssim": estimate(1.0, 0.0),
                "seconds_per_image": NOTHING,
            },
            {"name": "quantized", **quantized},
            {
                "name": "q-drift",
                **{key: estimate(9.0) for key in BY_KEY},
                "difference_to_quantized": {
                    "frechet_full_precision": estimate(-1.0),
                    "frechet_reference": estimate(0.1),
                    "psnr": estimate(-1.0),
                },
            },
        ],
        "calibration": make_calibration(),
    }


def make_images():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 8, 8), dtype=np.uint8)
    names = ("full-precision", "quantized", "q-drift")
    return dict(zip(names, torch.from_numpy(pixels), strict=True))


@functools.cache
def drawn(plot):
    return plot(make_calibration())


def pixels_of(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
