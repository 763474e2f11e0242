"""Fits: what is measured on a pipeline and its quantized denoiser, one folder per product."""

from evenkeel.fitting.adapters.fit_adapters import fit_adapters as fit_adapters
from evenkeel.fitting.calibration.calibrate import calibrate as calibrate
from evenkeel.fitting.closed_loop.fit_stepbaq import fit_stepbaq as fit_stepbaq
from evenkeel.fitting.closed_loop.fit_tac import fit_tac as fit_tac
from evenkeel.fitting.readout.fit_readout import fit_readout as fit_readout
from evenkeel.fitting.refit.refit_branches import refit_branches as refit_branches

__all__ = ["calibrate", "fit_adapters", "fit_readout", "fit_stepbaq", "fit_tac", "refit_branches"]
