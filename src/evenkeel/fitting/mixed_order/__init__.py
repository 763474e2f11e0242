"""Runs of a first- and a second-order solver from one noise, paired interval by interval."""
