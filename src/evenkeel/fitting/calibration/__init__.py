"""Calibrate: the two denoisers side by side, and the statistics of their difference."""
