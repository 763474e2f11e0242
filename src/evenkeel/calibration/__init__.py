"""Calibrate: run the two denoisers side by side and keep statistics. Start reading at ``run.py``."""

from evenkeel.calibration.run import calibrate as calibrate
from evenkeel.calibration.settings import json_safe as json_safe

__all__ = ["calibrate", "json_safe"]
