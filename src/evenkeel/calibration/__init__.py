"""Calibrate: run the two denoisers side by side and keep statistics. Start reading at ``run.py``."""

from evenkeel.calibration.branch_refit import refit_branches as refit_branches
from evenkeel.calibration.readout import fit_readout as fit_readout
from evenkeel.calibration.run import calibrate as calibrate
from evenkeel.calibration.settings import json_safe as json_safe

__all__ = ["calibrate", "fit_readout", "json_safe", "refit_branches"]
