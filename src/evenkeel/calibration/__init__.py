"""Calibrate: run the two denoisers side by side and keep statistics. Start reading at ``run.py``."""

from evenkeel.calibration.branch_refit import refit_branches as refit_branches
from evenkeel.calibration.readout import fit_readout as fit_readout
from evenkeel.calibration.run import calibrate as calibrate
from evenkeel.calibration.settings import json_safe as json_safe
from evenkeel.calibration.stepbaq import fit_stepbaq as fit_stepbaq
from evenkeel.calibration.tac import fit_tac as fit_tac

__all__ = ["calibrate", "fit_readout", "fit_stepbaq", "fit_tac", "json_safe", "refit_branches"]
